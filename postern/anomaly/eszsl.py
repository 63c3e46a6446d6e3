"""ESZSL: a zero-shot classifier in closed form, bilinear in features and class attributes.

Paper: An Embarrassingly Simple Approach to Zero-Shot Learning (Romera-Paredes and Torr, ICML 2015).
"""

from __future__ import annotations

from typing import Self

import numpy as np
from jaxtyping import Float, Shaped
from numpy.typing import ArrayLike
from scipy.linalg import solve
from scipy.special import softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_array, check_is_fitted, validate_data


class ESZSL(ClassifierMixin, BaseEstimator):  # type: ignore[misc, unused-ignore]  # scikit-learn is untyped
    r"""Scores classes, also those without a single training sample, by ``x^T V s_c``.

    ::

        V = (X^T X + gamma I)^{-1} X^T Y S (S^T S + lambda I)^{-1}

    with ``Y`` in {-1, +1}, samples by training classes, and ``S`` the attributes of the training classes, each row
    divided by its length. `predict` takes the best of all classes that have attributes, `predict_proba` is the softmax
    of ``scale`` times their scores. There is no intercept: centre the features, or add a constant one.

    Args:
        attributes: classes by attributes, of training and of other classes; None for an attribute a class, which makes
            it a plain regularised classifier.
        classes: the label of each row of ``attributes``; 0, 1, ... if None.
        feature_penalty: ``gamma``, positive.
        attribute_penalty: ``lambda``, positive.
        scale: of the scores before the softmax, positive.

    Attributes:
        classes_: labels of all classes with attributes, sorted.
        attributes_: their attributes, each row of length one.
        coef_: ``V``, features by attributes.
        n_features_in_: number of features.
    """

    classes_: Shaped[np.ndarray, " classes"]
    attributes_: Float[np.ndarray, "classes attributes"]
    coef_: Float[np.ndarray, "features attributes"]

    def __init__(
        self,
        attributes: ArrayLike | None = None,
        classes: ArrayLike | None = None,
        feature_penalty: float = 10.0,
        attribute_penalty: float = 1.0,
        scale: float = 5.0,
    ) -> None:
        self.attributes = attributes
        self.classes = classes
        self.feature_penalty = feature_penalty
        self.attribute_penalty = attribute_penalty
        self.scale = scale

    def fit(self, features: Float[np.ndarray, "samples features"], labels: Shaped[np.ndarray, " samples"]) -> Self:
        """Learn ``V`` from samples of some of the classes.

        Args:
            features: finite numbers.
            labels: one class a sample, among ``classes``.

        Raises:
            ValueError: penalties or a scale that are not positive, attributes that are not finite or all zero for a
                class, classes that do not match them, or a label without attributes.
        """
        for name in ("feature_penalty", "attribute_penalty", "scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is positive, got {getattr(self, name)}")
        features, labels = validate_data(self, features, labels, dtype=np.float64)
        check_classification_targets(labels)
        trained, index = np.unique(labels, return_inverse=True)
        self.classes_, self.attributes_ = self._described(trained)
        unknown = ~np.isin(trained, self.classes_)
        if unknown.any():
            raise ValueError(f"every label needs attributes, but {trained[unknown].tolist()} have none")
        known = self.attributes_[np.searchsorted(self.classes_, trained)]
        # Y S without Y: minus the sum of all rows, plus twice the own one
        targets = 2 * known[index] - known.sum(axis=0)
        samples, size = features.shape
        if size <= samples:
            gram = features.T @ features
            gram.flat[:: size + 1] += self.feature_penalty
            left = solve(gram, features.T @ targets, assume_a="pos")
        else:
            gram = features @ features.T
            gram.flat[:: samples + 1] += self.feature_penalty
            left = features.T @ solve(gram, targets, assume_a="pos")
        inner = known.T @ known
        inner.flat[:: len(inner) + 1] += self.attribute_penalty
        self.coef_ = np.asarray(solve(inner, left.T, assume_a="pos").T)
        return self

    def class_scores(self, features: Float[np.ndarray, "samples features"]) -> Float[np.ndarray, "samples classes"]:
        """``x^T V s_c`` for all classes with attributes, in the order of ``classes_``."""
        check_is_fitted(self, "coef_")
        features = validate_data(self, features, reset=False, dtype=np.float64)
        return np.asarray(features @ self.coef_ @ self.attributes_.T)

    def predict_proba(self, features: Float[np.ndarray, "samples features"]) -> Float[np.ndarray, "samples classes"]:
        """``softmax(scale * x^T V s_c)`` over all classes with attributes."""
        return np.asarray(softmax(self.scale * self.class_scores(features), axis=1))

    def predict(self, features: Float[np.ndarray, "samples features"]) -> Shaped[np.ndarray, " samples"]:
        """Return the class with the best score, of all that have attributes."""
        scores = self.class_scores(features)
        return np.asarray(self.classes_[scores.argmax(axis=1)])

    def _described(
        self, trained: Shaped[np.ndarray, " trained"]
    ) -> tuple[Shaped[np.ndarray, " classes"], Float[np.ndarray, "classes attributes"]]:
        """All classes, sorted, and their attributes, each of length one."""
        if self.attributes is None:
            if self.classes is not None:
                raise ValueError("classes are labels of the rows of attributes, and attributes is None")
            return trained, np.eye(len(trained))
        attributes = check_array(self.attributes, dtype=np.float64)
        classes = np.arange(len(attributes)) if self.classes is None else np.asarray(self.classes)
        if classes.shape != attributes.shape[:1] or len(np.unique(classes)) != len(classes):
            raise ValueError(
                f"classes are different labels, one for each of {len(attributes)} rows of attributes, got {classes}"
            )
        lengths = np.linalg.norm(attributes, axis=1, keepdims=True)
        if not lengths.all():
            raise ValueError(
                f"attributes of class {classes[lengths[:, 0].argmin()]} are all zero: they tell nothing of it"
            )
        order = classes.argsort()
        return classes[order], (attributes / lengths)[order]
