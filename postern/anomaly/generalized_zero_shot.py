"""A classifier for classes with and without training samples: two experts, and a combiner tuned on held-out classes.

Paper: Adaptive Confidence Smoothing for Generalized Zero-Shot Learning (arXiv 1812.09903), sections 3 and 4.
"""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from jaxtyping import Float, Shaped
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, ClassifierMixin, clone
from sklearn.linear_model import LogisticRegression
from sklearn.utils.validation import check_is_fitted, validate_data

from postern.anomaly.cosmo import COSMOClassifier
from postern.anomaly.expert_predictions import ExpertPredictions, predict_with_experts
from postern.anomaly.gzsl_combiner import GZSLCombiner
from postern.anomaly.gzsl_split import gzsl_split


class GeneralizedZeroShotClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc, unused-ignore]  # untyped
    """Holds both experts, and tunes their combination on classes that it keeps from them for the time.

    `fit` trains the experts without some of the training classes and without some samples of the others, tunes the
    combiner on these, and then trains the experts on everything.

    Args:
        zero_shot_expert: a classifier that knows all classes once fitted on some, such as `ESZSL`; copied.
        seen_expert: a classifier with ``predict_proba``; logistic regression with ``C = 1`` if None; copied.
        combiner: `COSMOClassifier` if None, or `CalibratedStacking`; copied.
        validation_classes: training classes that play the unseen ones while tuning, or how many of them to draw.
        held_out: share of the other classes' samples that is tuned on, in (0, 0.5).
        random_state: seed of the draws.

    Attributes:
        seen_expert_: trained on all samples.
        zero_shot_expert_: trained on all samples.
        combiner_: tuned.
        classes_: all classes that the zero-shot expert knows.
        seen_: labels of those with training samples.
        unseen_: labels of those without.
        n_features_in_: number of features.
    """

    def __init__(
        self,
        zero_shot_expert: Any,
        seen_expert: Any = None,
        combiner: GZSLCombiner | None = None,
        validation_classes: int | ArrayLike = 2,
        held_out: float = 0.25,
        random_state: int | None = 0,
    ) -> None:
        self.zero_shot_expert = zero_shot_expert
        self.seen_expert = seen_expert
        self.combiner = combiner
        self.validation_classes = validation_classes
        self.held_out = held_out
        self.random_state = random_state

    def fit(self, features: Float[np.ndarray, "samples features"], labels: Shaped[np.ndarray, " samples"]) -> Self:
        """Train the experts and tune their combination.

        Args:
            features: finite numbers.
            labels: one class a sample, all among those that the zero-shot expert knows.

        Raises:
            ValueError: an impossible split (see `gzsl_split`), or no class left that is unseen.
        """
        features, labels = validate_data(self, features, labels, dtype=np.float64)
        phase = gzsl_split(labels, self.validation_classes, 0, self.held_out, self.random_state).validation
        experts = self._trained(features[phase.train], labels[phase.train])
        rows = phase.evaluation
        validation = predict_with_experts(*experts, features[rows], phase.seen, phase.unseen, labels[rows])
        combiner = COSMOClassifier() if self.combiner is None else clone(self.combiner)
        self.combiner_: GZSLCombiner = combiner.tune(validation)
        self.seen_expert_, self.zero_shot_expert_ = self._trained(features, labels)
        self.classes_ = np.asarray(self.zero_shot_expert_.classes_)
        self.seen_ = np.unique(labels)
        self.unseen_ = np.setdiff1d(self.classes_, self.seen_)
        if not len(self.unseen_):
            raise ValueError(f"the zero-shot expert knows no class without training samples, of {len(self.seen_)}")
        return self

    def expert_predictions(
        self, features: Float[np.ndarray, "samples features"], labels: Shaped[np.ndarray, " samples"] | None = None
    ) -> ExpertPredictions:
        """What both experts say, for the combiner and for `save_expert_predictions`.

        Args:
            features: samples of any class.
            labels: their classes, if known.
        """
        check_is_fitted(self, "combiner_")
        features = validate_data(self, features, reset=False, dtype=np.float64)
        return predict_with_experts(
            self.seen_expert_, self.zero_shot_expert_, features, self.seen_, self.unseen_, labels
        )

    def predict(self, features: Float[np.ndarray, "samples features"]) -> Shaped[np.ndarray, " samples"]:
        """Return a class for each sample, with training samples or without."""
        predictions = self.expert_predictions(features)
        return np.asarray(self.classes_[self.combiner_.predict(predictions)])

    def _trained(self, features: np.ndarray, labels: np.ndarray) -> tuple[Any, Any]:
        seen_expert = LogisticRegression(C=1.0, max_iter=2000) if self.seen_expert is None else clone(self.seen_expert)
        return seen_expert.fit(features, labels), clone(self.zero_shot_expert).fit(features, labels)
