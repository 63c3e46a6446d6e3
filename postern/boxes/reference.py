"""Soft-NMS as the paper prints it: a loop over boxes in plain Python, in double precision.

Slow, and made to be read: the fast versions of `postern.boxes.soft_nms` are compared with it box by box.
Paper: "Soft-NMS -- Improving Object Detection With One Line of Code" (arXiv 1704.04503), figure 2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence


def overlap(first: Sequence[float], second: Sequence[float], margin: float = 0.0) -> float:
    """Intersection over union of two boxes ``(x1, y1, x2, y2)``; ``margin`` is added to each side's length."""
    width = min(first[2], second[2]) - max(first[0], second[0]) + margin
    height = min(first[3], second[3]) - max(first[1], second[1]) + margin
    intersection = max(width, 0.0) * max(height, 0.0)
    areas = [(box[2] - box[0] + margin) * (box[3] - box[1] + margin) for box in (first, second)]
    union = areas[0] + areas[1] - intersection
    return intersection / union if union > 0 else 0.0


def soft_nms_reference(
    boxes: Sequence[Sequence[float]],
    scores: Sequence[float],
    method: str = "gaussian",
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    score_threshold: float = 1e-3,
    max_out: int | None = None,
    decay: Callable[[float], float] | None = None,
    is_pixel_inclusive: bool = False,
) -> tuple[list[int], list[float]]:
    """Select boxes one by one, decaying the scores of those that overlap the selected one.

    Arguments and result are those of `postern.boxes.soft_nms`, as lists; ``decay`` maps one float to one float.
    """

    def f(v: float) -> float:
        if decay is not None:
            return decay(v)
        if method == "gaussian":
            return math.exp(-(v * v) / sigma)
        if v <= iou_threshold:
            return 1.0
        return 1.0 - v if method == "linear" else 0.0

    margin = float(is_pixel_inclusive)
    remaining = {i: float(score) for i, score in enumerate(scores) if score >= score_threshold and score > 0}
    selected: list[tuple[int, float]] = []
    while remaining and (max_out is None or len(selected) < max_out):
        m = max(remaining, key=lambda index: (remaining[index], -index))
        selected.append((m, remaining.pop(m)))
        for i in list(remaining):
            remaining[i] *= f(overlap(boxes[m], boxes[i], margin))
            if remaining[i] < score_threshold or remaining[i] == 0:
                del remaining[i]
    return [index for index, _ in selected], [score for _, score in selected]
