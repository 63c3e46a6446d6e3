"""Soft-NMS beside the plain Python loop of the paper and the NumPy loop that is usually copied.

    python -m benchmarks.boxes [--sizes 100 500 2000] [--seconds S]

Boxes come as a detector emits them: twenty around each object. All results are compared before anything is timed.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from benchmarks._tables import Row, best_times, record
from postern.boxes import Method, _kernel, soft_nms, soft_nms_reference

METHODS: tuple[Method, ...] = ("gaussian", "linear", "hard")


def detector_boxes(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    objects = rng.uniform(0, 1000, (n // 20 + 1, 2))
    centre = objects[rng.integers(0, len(objects), n)] + rng.normal(0, 10, (n, 2))
    half = rng.uniform(20, 60, (n, 2))
    return np.concatenate([centre - half, centre + half], axis=1), rng.uniform(0, 1, n)


def plain_loop(boxes: np.ndarray, scores: np.ndarray, method: Method) -> list[int]:
    return soft_nms_reference(boxes.tolist(), scores.tolist(), method)[0]


def numpy_loop(boxes: np.ndarray, scores: np.ndarray, method: Method) -> list[int]:
    """A loop over selections, with the overlaps of one selection as vectors."""
    remaining, area = scores.copy(), (boxes[:, 2:] - boxes[:, :2]).prod(1)
    index, keep = np.arange(len(scores)), []
    while len(index):
        best = remaining[index].argmax()
        m, index = index[best], np.delete(index, best)
        keep.append(int(m))
        lowest, highest = np.maximum(boxes[m, :2], boxes[index, :2]), np.minimum(boxes[m, 2:], boxes[index, 2:])
        intersection = (highest - lowest).clip(0).prod(1)
        iou = intersection / (area[m] + area[index] - intersection)
        if method == "gaussian":
            remaining[index] *= np.exp(-(iou**2) / 0.5)
        else:
            remaining[index] *= np.where(iou <= 0.3, 1, 1 - iou if method == "linear" else 0)
        index = index[remaining[index] >= 1e-3]
    return keep


def through_torch(boxes: np.ndarray, scores: np.ndarray, method: Method) -> list[int]:
    available, _kernel.is_available = _kernel.is_available, lambda: False
    try:
        return [int(k) for k in soft_nms(boxes, scores, method)[0]]
    finally:
        _kernel.is_available = available


def compiled(boxes: np.ndarray, scores: np.ndarray, method: Method) -> list[int]:
    return [int(k) for k in soft_nms(boxes, scores, method)[0]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 500, 2000])
    parser.add_argument("--seconds", type=float, default=2.0, help="how long to time each row of the table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ways = {"plain loop": plain_loop, "NumPy loop": numpy_loop, "postern, torch": through_torch}
    if _kernel.is_available():
        ways["postern, compiled"] = compiled
    rows: list[Row] = []
    for n in arguments.sizes:
        boxes, scores = detector_boxes(n)
        for method in METHODS:
            results = [way(boxes, scores, method) for way in ways.values()]
            assert all(result == results[0] for result in results), f"results differ: {n} boxes, {method}"
            calls = {name: f"ways[{name!r}](boxes, scores, method)" for name in ways}
            names = {"ways": ways, "boxes": boxes, "scores": scores, "method": method}
            times = best_times(calls, arguments.seconds, names, rounds=3)
            row: Row = {"boxes": f"{n:,}", "method": method}
            for name in ways:
                if name != "plain loop":
                    row[name] = times["plain loop"] / times[name]
            rows.append(row)
    record("boxes", "Soft-NMS against Python loops", {"Times as fast as the plain Python loop, one thread": rows})


if __name__ == "__main__":
    main()
