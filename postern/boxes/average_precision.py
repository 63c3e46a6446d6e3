"""Mean average precision of detectors, as the COCO benchmark defines it.

A detection is right if it overlaps an object of its class, not yet taken by a better detection, by at least a
threshold. Average precision is the area below the curve of precision against recall; COCO averages it over classes and
over the thresholds 0.50, 0.55 .. 0.95.

Definition: https://cocodataset.org/#detection-eval. The rules are those of pycocotools, ties, crowds and
interpolation included, and the tests compare the two; the difference is in the work: images are matched all at once,
one rank of detections after the other, which makes it fast enough to search for a threshold with it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor

IOU_THRESHOLDS = tuple(np.linspace(0.5, 0.95, 10).round(2).tolist())
RECALLS = np.linspace(0, 1, 101)
# Areas in squared pixels, from and to, that COCO calls small, medium and large.
SIZES: Mapping[str, tuple[float, float]] = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}

# How many objects, with padding, are in work at once; each takes some ten bytes for each threshold.
_OBJECTS_AT_ONCE = 2**19


@dataclass(frozen=True, eq=False)
class DetectionScores:
    """Precision and recall of a detector by class and overlap threshold.

    Attributes:
        iou_thresholds: the overlaps from which a detection is right.
        labels: the classes that have objects.
        precision: highest precision at a recall of at least 0.00, 0.01 .. 1.00; 0 where that is never reached.
        recall: the share of the objects that is found at all.
    """

    iou_thresholds: tuple[float, ...]
    labels: tuple[int, ...]
    precision: Float[np.ndarray, "thresholds 101 classes"]
    recall: Float[np.ndarray, "thresholds classes"]

    @property
    def mean_average_precision(self) -> float:
        """Mean over thresholds, recalls and classes; NaN without an object."""
        return float(self.precision.mean()) if self.labels else math.nan

    @property
    def mean_recall(self) -> float:
        """Mean over thresholds and classes; NaN without an object."""
        return float(self.recall.mean()) if self.labels else math.nan

    def average_precision(self, iou_threshold: float) -> float:
        """Mean over recalls and classes at one threshold; NaN without an object.

        Raises:
            ValueError: a threshold that was not evaluated.
        """
        found = np.flatnonzero(np.isclose(self.iou_thresholds, iou_threshold))
        if not len(found):
            raise ValueError(f"iou_threshold must be one of {self.iou_thresholds}, got {iou_threshold}")
        return float(self.precision[found[0]].mean()) if self.labels else math.nan


def coco_map(
    detections: Sequence[Mapping[str, Any]],
    ground_truths: Sequence[Mapping[str, Any]],
    iou_thresholds: Sequence[float] = IOU_THRESHOLDS,
    max_detections: int = 100,
    *,
    by_size: bool = False,
) -> dict[str, float]:
    """Mean average precision and recall in the manner of COCO.

    Args:
        detections: see `evaluate_detections`.
        ground_truths: see `evaluate_detections`.
        iou_thresholds: see `evaluate_detections`.
        max_detections: see `evaluate_detections`.
        by_size: whether to add the numbers for small, medium and large objects, at four times the cost.

    Returns:
        ``map``; ``map_50`` and ``map_75`` where these thresholds are among those asked for; ``ar`` (recall, mean over
        thresholds and classes); with ``by_size`` also ``map_small``, ``ar_small`` and so on. All in [0, 1], or NaN
        where there is no object.

    Raises:
        ValueError: see `evaluate_detections`.
    """
    scores = evaluate_detections(detections, ground_truths, iou_thresholds, max_detections)
    result = {"map": scores.mean_average_precision}
    for threshold in (0.5, 0.75):
        if np.isclose(scores.iou_thresholds, threshold).any():
            result[f"map_{threshold * 100:.0f}"] = scores.average_precision(threshold)
    result["ar"] = scores.mean_recall
    if by_size:
        for size, area in SIZES.items():
            scores = evaluate_detections(detections, ground_truths, iou_thresholds, max_detections, area)
            result |= {f"map_{size}": scores.mean_average_precision, f"ar_{size}": scores.mean_recall}
    return result


def evaluate_detections(
    detections: Sequence[Mapping[str, Any]],
    ground_truths: Sequence[Mapping[str, Any]],
    iou_thresholds: Sequence[float] = IOU_THRESHOLDS,
    max_detections: int = 100,
    area: tuple[float, float] = (0, 1e10),
) -> DetectionScores:
    """Match detections with objects and draw the curves of precision against recall.

    In each image and class, detections choose by falling score the object that they overlap most among those not
    taken. Several detections of one object count as errors but for the first. Tensors or arrays are both fine.

    Args:
        detections: one mapping an image: ``boxes`` [n, 4] as (x1, y1, x2, y2), ``scores`` [n], and ``labels`` [n]
            where there are several classes.
        ground_truths: one mapping an image: ``boxes``, ``labels`` likewise, and if wanted ``iscrowd`` [n]: regions in
            which detections count neither way.
        iou_thresholds: overlaps in (0, 1] from which a detection is right.
        max_detections: how many detections count in each image and class, best first.
        area: objects outside of this range (squared units of length) count neither way, and neither do the detections
            that match them, or that match nothing and are themselves outside.

    Returns:
        The curves.

    Raises:
        ValueError: lists of different lengths, arrays of different lengths, scores that are NaN, or parameters out of
            range.
    """
    thresholds = tuple(float(threshold) for threshold in iou_thresholds)
    if not thresholds or min(thresholds) <= 0 or max(thresholds) > 1:
        raise ValueError(f"iou_thresholds must lie in (0, 1], at least one of them, got {thresholds}")
    if max_detections < 1:
        raise ValueError(f"max_detections must be at least 1, got {max_detections}")
    if len(detections) != len(ground_truths):
        raise ValueError(
            f"detections and ground_truths have one entry an image each, got {len(detections)} and {len(ground_truths)}"
        )
    found = _Boxes.collect(detections, "scores")
    objects = _Boxes.collect(ground_truths, "iscrowd")
    is_ignored = (objects.value > 0) | (objects.area < area[0]) | (objects.area > area[1])
    labels = np.unique(np.concatenate([objects.label, found.label]))

    # A group is what is matched together: one class in one image.
    group = found.group(labels)
    order = np.lexsort((-found.value, group))
    rank = _rank(group[order])
    order, rank = order[rank < max_detections], rank[rank < max_detections]
    found, group = found[order], group[order]
    is_right, counts = _match(found, group, rank, objects, objects.group(labels), is_ignored, np.array(thresholds))
    is_outside = (found.area < area[0]) | (found.area > area[1])
    counts &= is_right | ~is_outside

    precisions, recalls, evaluated = [], [], []
    for label in labels:
        num_objects = int(((objects.label == label) & ~is_ignored).sum())
        if num_objects == 0:
            continue
        own = np.flatnonzero(found.label == label)
        own = own[np.argsort(-found.value[own], kind="stable")]
        precision, recall = _curve((is_right & counts)[:, own], (~is_right & counts)[:, own], num_objects)
        precisions.append(precision)
        recalls.append(recall)
        evaluated.append(int(label))
    return DetectionScores(
        thresholds,
        tuple(evaluated),
        np.stack(precisions, axis=-1) if evaluated else np.zeros((len(thresholds), len(RECALLS), 0)),
        np.stack(recalls, axis=-1) if evaluated else np.zeros((len(thresholds), 0)),
    )


@dataclass(frozen=True, eq=False)
class _Boxes:
    """The boxes of all images in one array; value is the score of a detection, or whether an object is a crowd."""

    corner: Float[np.ndarray, "n 4"]
    value: Float[np.ndarray, " n"]
    label: Int[np.ndarray, " n"]
    image: Int[np.ndarray, " n"]

    @classmethod
    def collect(cls, images: Sequence[Mapping[str, Any]], value: str) -> _Boxes:
        corners, values, labels, numbers = [np.zeros((0, 4))], [np.zeros(0)], [np.zeros(0, int)], [np.zeros(0, int)]
        for number, image in enumerate(images):
            corner = _array(image["boxes"]).astype(np.float64).reshape(-1, 4)
            n = len(corner)
            if value == "scores" and "scores" not in image:
                raise ValueError(f"the detections of image {number} have no scores")
            per_box = {
                value: _array(image.get(value, np.zeros(n))).astype(np.float64),
                "labels": _array(image.get("labels", np.zeros(n, int))),
            }
            for name, array in per_box.items():
                if array.shape != (n,):
                    raise ValueError(f"image {number} has {n} boxes and {name} of shape {array.shape}")
            if not np.isfinite(corner).all() or np.isnan(per_box[value]).any():
                raise ValueError(f"boxes and {value} of image {number} must be finite, got NaN or infinity")
            corners.append(corner)
            values.append(per_box[value])
            labels.append(per_box["labels"].astype(int))
            numbers.append(np.full(n, number))
        return cls(np.concatenate(corners), np.concatenate(values), np.concatenate(labels), np.concatenate(numbers))

    @property
    def area(self) -> Float[np.ndarray, " n"]:
        sides = self.corner[:, 2:] - self.corner[:, :2]
        return np.asarray(sides[:, 0] * sides[:, 1])

    def __getitem__(self, index: np.ndarray) -> _Boxes:
        return _Boxes(self.corner[index], self.value[index], self.label[index], self.image[index])

    def group(self, labels: np.ndarray) -> Int[np.ndarray, " n"]:
        return self.image * max(len(labels), 1) + np.searchsorted(labels, self.label)


def _match(
    found: _Boxes,
    group: Int[np.ndarray, " d"],
    rank: Int[np.ndarray, " d"],
    objects: _Boxes,
    object_group: Int[np.ndarray, " o"],
    is_ignored: Bool[np.ndarray, " o"],
    thresholds: Float[np.ndarray, " t"],
) -> tuple[Bool[np.ndarray, "t d"], Bool[np.ndarray, "t d"]]:
    """Return whether each detection matches an object, and whether it counts, by threshold."""
    is_right = np.zeros((len(thresholds), len(found.value)), bool)
    counts = np.ones_like(is_right)
    # Objects that do not count come last, so that the others are preferred.
    by_group = np.lexsort((is_ignored, object_group))
    objects, object_group, is_ignored = objects[by_group], object_group[by_group], is_ignored[by_group]
    column = _rank(object_group)
    # Only groups with both detections and objects have something to match.
    for groups in _portions(np.intersect1d(group, object_group), group, object_group):
        o, d = np.flatnonzero(np.isin(object_group, groups)), np.flatnonzero(np.isin(group, groups))
        # Tables of a row for each group: its objects, and its detections by rank; -1 where there are fewer.
        object_at = _table(np.searchsorted(groups, object_group[o]), column[o], o)
        detection_at = _table(np.searchsorted(groups, group[d]), rank[d], d)
        is_free = np.broadcast_to(object_at >= 0, (len(thresholds), *object_at.shape)).copy()
        is_crowd, is_counted = objects.value[object_at] > 0, ~is_ignored[object_at]
        for k in range(detection_at.shape[1]):
            rows = np.flatnonzero(detection_at[:, k] >= 0)
            detection = detection_at[rows, k]
            iou = _overlaps(found.corner[detection][:, None], objects.corner[object_at[rows]], is_crowd[rows])
            candidate = is_free[:, rows] & (iou >= np.minimum(thresholds, 1 - 1e-10)[:, None, None])
            preferred = candidate & is_counted[rows]
            candidate = np.where(preferred.any(-1, keepdims=True), preferred, candidate)
            # The last of equally good ones, as in pycocotools.
            best = candidate.shape[-1] - 1 - np.where(candidate, iou, -1.0)[..., ::-1].argmax(-1)
            t, r = np.nonzero(candidate.any(-1))
            row, best = rows[r], best[t, r]
            is_free[t, row, best] = is_crowd[row, best]
            is_right[t, detection[r]] = True
            counts[t, detection[r]] = is_counted[row, best]
    return is_right, counts


def _table(row: np.ndarray, column: np.ndarray, value: np.ndarray) -> Int[np.ndarray, "rows columns"]:
    table = np.full((row.max() + 1, column.max() + 1), -1)
    table[row, column] = value
    return table


def _portions(shared: np.ndarray, group: np.ndarray, object_group: np.ndarray) -> Iterator[np.ndarray]:
    """Split groups into portions of like sizes whose padded tables fit in memory."""
    depth = np.bincount(np.searchsorted(shared, group[np.isin(group, shared)]), minlength=len(shared))
    width = np.bincount(np.searchsorted(shared, object_group[np.isin(object_group, shared)]), minlength=len(shared))
    order = np.lexsort((depth, width))
    while len(order):
        objects = width[order] * np.arange(1, len(order) + 1)
        size = max(1, int(np.searchsorted(objects, _OBJECTS_AT_ONCE, side="right")))
        yield np.sort(shared[order[:size]])
        order = order[size:]


def _curve(
    is_right: Bool[np.ndarray, "t d"], is_wrong: Bool[np.ndarray, "t d"], num_objects: int
) -> tuple[Float[np.ndarray, "t 101"], Float[np.ndarray, " t"]]:
    """Interpolated precision at the recalls of COCO, and the highest recall."""
    right, wrong = is_right.cumsum(1), is_wrong.cumsum(1)
    recall = right / num_objects
    precision = right / np.maximum(right + wrong, 1)
    envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    curve = np.zeros((len(right), len(RECALLS)))
    for t in range(len(right)):
        first = np.searchsorted(recall[t], RECALLS)
        is_reached = first < right.shape[1]
        curve[t, is_reached] = envelope[t, first[is_reached]]
    return curve, recall[:, -1] if right.shape[1] else np.zeros(len(right))


def _overlaps(first: np.ndarray, second: np.ndarray, is_crowd: np.ndarray) -> np.ndarray:
    """Intersection over union; with a crowd, over the area of the detection alone."""
    lowest, highest = np.maximum(first[..., :2], second[..., :2]), np.minimum(first[..., 2:], second[..., 2:])
    intersection = (highest - lowest).clip(min=0).prod(-1)
    own = (first[..., 2:] - first[..., :2]).prod(-1)
    union = own + np.where(is_crowd, 0, (second[..., 2:] - second[..., :2]).prod(-1) - intersection)
    return np.asarray(intersection / np.where(union > 0, union, 1))


def _rank(group: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """The position of each element within its stretch of equal elements, of a sorted array."""
    starts = np.flatnonzero(np.concatenate([[True], group[1:] != group[:-1]])) if len(group) else np.zeros(0, int)
    sizes = np.diff(np.append(starts, len(group)))
    return np.arange(len(group)) - np.repeat(starts, sizes)


def _array(values: Any) -> np.ndarray:
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
