"""How well scores tell normal from abnormal samples: the five numbers of the out-of-distribution literature."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve


def ood_metrics(inside: ArrayLike, outside: ArrayLike) -> dict[str, float]:
    """Compare the scores of in-distribution and out-of-distribution samples.

    In-distribution samples are the positives, and higher scores mean more normal.

    Args:
        inside: scores of in-distribution samples.
        outside: scores of out-of-distribution samples.

    Returns:
        ``tnr95``: share of outside samples rejected at the strictest threshold that accepts 95 % of the inside ones.
        ``auroc``: area under the ROC curve.
        ``dtacc``: best balanced accuracy, ``max (TPR + TNR) / 2`` over the thresholds.
        ``auin``, ``auout``: average precision with the inside, and with the outside samples as positives. (The paper's
        code integrates the precision-recall curve by the trapezoid rule instead, which is a little optimistic.)

    Raises:
        ValueError: no scores on a side, or scores that are not finite.
    """
    positive, negative = _scores("inside", inside), _scores("outside", outside)
    scores = np.concatenate([positive, negative])
    is_inside = np.concatenate([np.ones(len(positive)), np.zeros(len(negative))])
    false_positive, true_positive, _ = roc_curve(is_inside, scores, drop_intermediate=False)
    return {
        "tnr95": float(1 - false_positive[np.argmax(true_positive >= 0.95)]),
        "auroc": float(roc_auc_score(is_inside, scores)),
        "dtacc": float((1 + true_positive - false_positive).max() / 2),
        "auin": float(average_precision_score(is_inside, scores)),
        "auout": float(average_precision_score(1 - is_inside, -scores)),
    }


def _scores(name: str, values: ArrayLike) -> Float[np.ndarray, " samples"]:
    scores = np.asarray(values, dtype=np.float64)
    if scores.ndim != 1 or not len(scores):
        raise ValueError(f"{name} scores are one number a sample, at least one, got shape {scores.shape}")
    if not np.isfinite(scores).all():
        raise ValueError(f"{name} scores are finite, got {int((~np.isfinite(scores)).sum())} that are not")
    return scores
