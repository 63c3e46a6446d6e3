"""Combine the scores of several layers by a logistic regression, and choose a detector's setting on held-out samples.

Paper: A Simple Unified Framework for Detecting Out-of-Distribution Samples and Adversarial Attacks (arXiv 1807.03888),
section 2.2.

Difference: the layers' scores, whose scales differ by orders of magnitude, are standardised before the regression.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from typing import Literal, Self, TypeVar

import numpy as np
from jaxtyping import Float
from sklearn.base import BaseEstimator
from sklearn.linear_model import LogisticRegressionCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.validation import check_array, check_is_fitted

from postern.anomaly.metrics import ood_metrics

Setting = TypeVar("Setting")
Quality = Literal["tnr95", "auroc"]
LayerScores = Float[np.ndarray, "samples layers"]


class LayerEnsemble(BaseEstimator):  # type: ignore[misc, unused-ignore]  # scikit-learn is untyped
    """``sum_l alpha_l M_l + constant``, with the weights of a cross-validated logistic regression.

    Args:
        cv: number of folds for the choice of the regression's penalty.

    Attributes:
        weights_: ``alpha_l``, in units of the raw scores.
    """

    def __init__(self, cv: int = 5) -> None:
        self.cv = cv

    def fit(self, inside: LayerScores, outside: LayerScores) -> Self:
        """Learn the weights from layer scores of normal and of abnormal samples.

        Raises:
            ValueError: too few samples for the folds, scores that are not finite, or different numbers of layers.
        """
        inside, outside = check_array(inside), check_array(outside)
        if inside.shape[1] != outside.shape[1]:
            raise ValueError(f"both sides need the same layers, got {inside.shape[1]} and {outside.shape[1]} scores")
        if min(len(inside), len(outside)) < self.cv:
            raise ValueError(
                f"{self.cv} folds need as many samples on each side, got {len(inside)} inside, {len(outside)} outside"
            )
        self.pipeline_ = make_pipeline(StandardScaler(), LogisticRegressionCV(cv=self.cv, scoring="accuracy"))
        is_inside = np.concatenate([np.ones(len(inside)), np.zeros(len(outside))])
        with warnings.catch_warnings():  # scikit-learn 1.8 announces new defaults, which 1.6 has no arguments to refuse
            warnings.simplefilter("ignore", FutureWarning)
            self.pipeline_.fit(np.concatenate([inside, outside]), is_inside)
        return self

    def score_samples(self, layer_scores: LayerScores) -> Float[np.ndarray, " samples"]:
        """Log-odds of being normal; higher is more normal."""
        check_is_fitted(self, "pipeline_")
        return np.asarray(self.pipeline_.decision_function(check_array(layer_scores)))

    @property
    def weights_(self) -> Float[np.ndarray, " layers"]:
        """The layers' weights in units of the raw scores."""
        check_is_fitted(self, "pipeline_")
        scaler, regression = self.pipeline_[0], self.pipeline_[-1]
        return np.asarray(regression.coef_[0] / scaler.scale_)


def choose(candidates: Iterable[tuple[Setting, np.ndarray, np.ndarray]], by: Quality) -> Setting:
    """Pick the setting whose scores separate best; the first of equals.

    Args:
        candidates: (setting, scores of inside samples, scores of outside samples).
        by: the metric of `ood_metrics` to maximise.

    Raises:
        ValueError: no candidates, or an unknown metric.
    """
    if by not in ("tnr95", "auroc"):
        raise ValueError(f"settings are chosen by 'tnr95' or 'auroc', got {by!r}")
    rated = [(ood_metrics(inside, outside)[by], setting) for setting, inside, outside in candidates]
    if not rated:
        raise ValueError("a choice needs at least one setting, got none")
    return max(rated, key=lambda pair: pair[0])[1]


def choose_ensemble(
    candidates: Iterable[tuple[Setting, LayerScores, LayerScores]], by: Quality, cv: int
) -> tuple[Setting, LayerEnsemble]:
    """Pick the setting with the best ensemble: every second sample fits the regression, the others decide.

    Args:
        candidates: (setting, layer scores of inside samples, layer scores of outside samples).
        by: the metric of `ood_metrics` to maximise.
        cv: folds of the regression.

    Raises:
        ValueError: no candidates, an unknown metric, or too few samples.
    """

    def rated() -> Iterator[tuple[tuple[Setting, LayerEnsemble], np.ndarray, np.ndarray]]:
        for setting, inside, outside in candidates:
            ensemble = LayerEnsemble(cv).fit(inside[0::2], outside[0::2])
            yield (setting, ensemble), ensemble.score_samples(inside[1::2]), ensemble.score_samples(outside[1::2])

    return choose(rated(), by)
