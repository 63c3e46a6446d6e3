"""Generalised zero-shot accuracy: seen against unseen classes, at one threshold or at all of them.

Papers: An Empirical Study and Analysis of Generalized Zero-Shot Learning for Object Recognition in the Wild (arXiv
1605.04253), which has the curve and its area; Zero-Shot Learning -- The Good, the Bad and the Ugly (arXiv 1703.04394),
which has the class-balanced accuracies and their harmonic mean; both as used by Adaptive Confidence Smoothing for
Generalized Zero-Shot Learning (arXiv 1812.09903).

Difference: the curve of a method that changes a sample from its best seen to its best unseen class at one threshold is
computed at every threshold from one sort, and not point by point.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from sklearn.metrics import auc

Accuracies = Float[np.ndarray, " thresholds"]


def gzsl_scores(
    labels: Int[np.ndarray, " samples"],
    scores: Float[np.ndarray, "samples classes"],
    seen: ArrayLike,
    unseen: ArrayLike,
) -> dict[str, float]:
    """Accuracies on seen and on unseen classes when a sample may be of either, and their harmonic mean.

    Every class counts the same, however many samples it has: ``acc_tr = mean_{c in S} P(argmax score = c | y = c)``,
    where the largest score is looked for among all seen and unseen classes; ``acc_ts`` is the same over unseen
    classes; ``acc_h = 2 acc_tr acc_ts / (acc_tr + acc_ts)``. Classes without a sample do not count.

    Args:
        labels: true columns.
        scores: a column a class; columns in neither list are ignored.
        seen: columns of the classes with training images.
        unseen: columns of the classes without.

    Returns:
        ``acc_tr``, ``acc_ts`` and ``acc_h``, between 0 and 1.

    Raises:
        ValueError: sizes that do not agree, scores that are NaN, or no sample of seen or of unseen classes.
    """
    labels, scores = np.asarray(labels), np.asarray(scores)
    if scores.ndim != 2 or labels.shape != scores.shape[:1]:
        raise ValueError(f"scores has a row for each of the labels {labels.shape}, got {scores.shape}")
    if np.isnan(scores).any():
        raise ValueError("scores must be numbers, got NaN")
    columns = np.sort(np.concatenate([np.asarray(seen), np.asarray(unseen)]))
    predicted = columns[scores[:, columns].argmax(axis=1)]
    weights = _balanced_weights(labels, seen), _balanced_weights(labels, unseen)
    acc_tr, acc_ts = (float(weight @ (predicted == labels)) for weight in weights)
    return {"acc_tr": acc_tr, "acc_ts": acc_ts, "acc_h": float(harmonic_mean(acc_tr, acc_ts))}


def harmonic_mean(first: ArrayLike, second: ArrayLike) -> Float[np.ndarray, "*shape"]:
    """``2 a b / (a + b)``, and 0 where both are 0."""
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    total = a + b
    return np.asarray(np.divide(2 * a * b, total, out=np.zeros_like(total), where=total > 0))


def ausuc(acc_tr: ArrayLike, acc_ts: ArrayLike) -> float:
    """Area under the seen-unseen curve: ``acc_ts`` against ``acc_tr``, by the trapezoid rule.

    The curve is continued level to ``acc_tr = 0`` and drops straight at its largest ``acc_tr``. Points may come in any
    order. It warns where the thresholds were not wide enough for the curve to come near both axes.

    Args:
        acc_tr: accuracy on seen classes, one a threshold.
        acc_ts: accuracy on unseen classes.

    Raises:
        ValueError: no points, or lists of different lengths.
    """
    x, y = np.atleast_1d(np.asarray(acc_tr, dtype=np.float64)), np.atleast_1d(np.asarray(acc_ts, dtype=np.float64))
    if x.ndim != 1 or x.shape != y.shape or not len(x):
        raise ValueError(f"the curve has one acc_tr and one acc_ts a threshold, got {x.shape} and {y.shape}")
    for name, values, side in (("acc_tr", x, "seen"), ("acc_ts", y, "unseen")):
        if values.min() > 0.01:
            warnings.warn(
                f"the lowest {name} is {values.min():.3f}: no threshold is far enough that no {side} class is "
                "predicted, so the area is too small; widen the range of thresholds",
                stacklevel=2,
            )
    return _area(x, y)


def _area(acc_tr: Accuracies, acc_ts: Accuracies) -> float:
    order = np.lexsort((-acc_ts, acc_tr))
    x, y = acc_tr[order], acc_ts[order]
    return float(auc(np.r_[0, x, x[-1]], np.r_[y[0], y, 0]))


@dataclass(frozen=True, eq=False)
class SeenUnseenCurve:
    """Accuracies at a list of thresholds, ascending; the higher the threshold, the more is taken for unseen.

    Attributes:
        thresholds: where.
        acc_tr: class-balanced accuracy on seen classes there.
        acc_ts: class-balanced accuracy on unseen classes there.
        is_complete: whether no other threshold gives other accuracies.
    """

    thresholds: Float[np.ndarray, " thresholds"]
    acc_tr: Accuracies
    acc_ts: Accuracies
    is_complete: bool = False

    @property
    def acc_h(self) -> Accuracies:
        """Harmonic mean of both accuracies at each threshold."""
        return harmonic_mean(self.acc_tr, self.acc_ts)

    @property
    def best(self) -> int:
        """Index of the threshold with the best harmonic mean; the first of equals."""
        return int(self.acc_h.argmax())

    def ausuc(self) -> float:
        """Area under the curve, see `ausuc`; a complete curve has nothing to be warned of."""
        return _area(self.acc_tr, self.acc_ts) if self.is_complete else ausuc(self.acc_tr, self.acc_ts)


def seen_unseen_curve(
    critical: Float[np.ndarray, " samples"],
    best_seen: Int[np.ndarray, " samples"],
    best_unseen: Int[np.ndarray, " samples"],
    labels: Int[np.ndarray, " samples"],
    seen: ArrayLike,
    unseen: ArrayLike,
    thresholds: ArrayLike | None = None,
) -> SeenUnseenCurve:
    """Accuracies at many thresholds from one sort: ``O((samples + thresholds) log samples)`` in all.

    A sample is given ``best_unseen`` at thresholds above its critical one, and ``best_seen`` up to it. So the samples
    that are right and seen at a threshold are those with a larger critical one: a cumulative sum.

    Args:
        critical: the threshold up to which the sample is taken for seen; may be infinite.
        best_seen: what is predicted there, a column.
        best_unseen: what is predicted above it, a column.
        labels: true columns.
        seen: columns of the classes with training images.
        unseen: columns of the classes without.
        thresholds: where to evaluate; None for every interval in which nothing changes, which is all there is to know.

    Raises:
        ValueError: thresholds or critical ones that are NaN, or no sample of seen or of unseen classes.
    """
    critical = np.asarray(critical, dtype=np.float64)
    if np.isnan(critical).any():
        raise ValueError(f"critical thresholds are numbers or infinite, got {int(np.isnan(critical).sum())} NaN")
    order = critical.argsort(kind="stable")
    ascending = critical[order]
    if thresholds is None:
        grid = _between(ascending)
    else:
        grid = np.sort(np.atleast_1d(np.asarray(thresholds, dtype=np.float64)))
        if grid.ndim != 1 or not len(grid) or np.isnan(grid).any():
            raise ValueError(f"thresholds is a list of numbers, at least one, got {thresholds!r}")
    right_if_seen = (_balanced_weights(labels, seen) * (best_seen == labels))[order]
    right_if_unseen = (_balanced_weights(labels, unseen) * (best_unseen == labels))[order]
    # taken for unseen are those with critical < threshold, the first so many in ascending order
    changed = np.searchsorted(ascending, grid, side="left")
    # summed from the end, so that nothing is left over where no sample is
    still_seen = np.r_[np.cumsum(right_if_seen[::-1])[::-1], 0.0]
    become_unseen = np.r_[0.0, np.cumsum(right_if_unseen)]
    return SeenUnseenCurve(grid, still_seen[changed], become_unseen[changed], thresholds is None)


def _between(ascending: Float[np.ndarray, " samples"]) -> Float[np.ndarray, " thresholds"]:
    """One threshold in each interval between different critical ones, and one on either side of them all."""
    steps = np.unique(ascending[np.isfinite(ascending)])
    if not len(steps):
        return np.zeros(1)
    return np.asarray(np.r_[steps[0], steps[:-1] + np.diff(steps) / 2, np.nextafter(steps[-1], np.inf)])


def _balanced_weights(labels: Int[np.ndarray, " samples"], classes: ArrayLike) -> Float[np.ndarray, " samples"]:
    """``1 / (samples of the class * classes)`` for samples of the given classes, 0 for others: they sum to one."""
    labels = np.asarray(labels)
    is_member = np.isin(labels, np.asarray(classes))
    if not is_member.any():
        raise ValueError(f"no sample is of the classes {np.asarray(classes).tolist()}, so their accuracy is unknown")
    present, index, counts = np.unique(labels[is_member], return_inverse=True, return_counts=True)
    weights = np.zeros(len(labels))
    weights[is_member] = 1 / (counts[index] * len(present))
    return weights
