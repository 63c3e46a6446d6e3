"""Gaussian discriminant analysis with one covariance for all classes, on features of any origin.

Paper: A Simple Unified Framework for Detecting Out-of-Distribution Samples and Adversarial Attacks (arXiv 1807.03888),
equations 1 and 2 and Algorithm 2.

Differences: the covariance can be shrunk (Ledoit-Wolf or by a given amount); means and covariance can be accumulated
batch by batch, without keeping features; distances come from whitened features, two matrix products whatever the number
of classes, where the paper's code multiplies a batch with its own transpose for each class.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch
from jaxtyping import Float, Shaped
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.covariance import ledoit_wolf_shrinkage, shrunk_covariance
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from torch import Tensor

from postern.precision import without_autocast

Shrinkage = Literal["ledoit_wolf"] | float | None


class Factors(NamedTuple):
    """What distances are computed from: the covariance's pseudo-inverse is ``whitening @ whitening.T``.

    Attributes:
        whitening: ``W``, features by rank.
        origin: a point amid the class means, subtracted first so that float32 suffices for the rest.
        centres: class means in whitened coordinates, ``W^T (mu_c - origin)``.
    """

    whitening: Float[Any, "features rank"]
    origin: Float[Any, " features"]
    centres: Float[Any, "classes rank"]


def whitening_matrix(covariance: Float[np.ndarray, "features features"]) -> Float[np.ndarray, "features rank"]:
    r"""Factor of the pseudo-inverse, ``Sigma^+ = W W^T``, from the eigenvalues of ``Sigma`` that are not zero.

    With ``Sigma = V diag(lambda) V^T``, ``W = V_+ diag(lambda_+)^{-1/2}`` over ``lambda > d * eps * max(lambda)`` in
    float64, as `scipy.linalg.pinvh` has it. Directions without variance, such as dead channels, drop out.

    Raises:
        ValueError: a covariance that is zero or not finite.
    """
    if not np.isfinite(covariance).all():
        raise ValueError("the covariance must be finite, got NaN or infinity")
    eigenvalues, vectors = np.linalg.eigh(covariance)
    is_kept = eigenvalues > len(eigenvalues) * np.finfo(np.float64).eps * eigenvalues[-1]
    if eigenvalues[-1] <= 0 or not is_kept.any():
        raise ValueError(
            f"the features do not vary within any class (largest eigenvalue of the covariance {eigenvalues[-1]:g}), "
            "so distances in units of their spread do not exist"
        )
    return np.asarray(vectors[:, is_kept] / np.sqrt(eigenvalues[is_kept]))


def squared_distances(
    features: Float[Tensor, "batch features"],
    whitening: Float[Tensor, "features rank"],
    origin: Float[Tensor, " features"],
    centres: Float[Tensor, "classes rank"],
) -> Float[Tensor, "batch classes"]:
    r"""Squared Mahalanobis distances to all class means, differentiable in the features.

    ``(f - mu_c)^T Sigma^+ (f - mu_c) = |a|^2 + |b_c|^2 - 2 a . b_c``  with ``a = W^T (f - origin)`` and
    ``b_c = W^T (mu_c - origin)``: one product of batch x features x rank, one of batch x rank x classes. It is computed
    without autocast, since the difference of large numbers does not survive bfloat16.
    """
    with without_autocast(features.device):
        whitened = (features.to(whitening.dtype) - origin) @ whitening
        norms = whitened.square().sum(dim=1, keepdim=True) + centres.square().sum(dim=1)
        return (norms - 2 * whitened @ centres.T).clamp_min(0)


@dataclass
class _Moments:
    """Counts, class means and the scatter within classes; batches merge exactly (Chan, Golub and LeVeque 1983)."""

    classes: Shaped[np.ndarray, " classes"]
    counts: Float[np.ndarray, " classes"]
    means: Float[np.ndarray, "classes features"]
    scatter: Float[np.ndarray, "features features"]

    @classmethod
    def of(cls, features: np.ndarray, labels: np.ndarray) -> tuple[_Moments, np.ndarray]:
        """Moments of one batch, and its features less their class means."""
        classes, index = np.unique(labels, return_inverse=True)
        counts = np.bincount(index, minlength=len(classes)).astype(np.float64)
        is_member = np.zeros((len(classes), len(labels)))
        is_member[index, np.arange(len(labels))] = 1
        means = (is_member @ features) / counts[:, None]
        centred = features - means[index]
        return cls(classes, counts, means, centred.T @ centred), centred

    def merged(self, other: _Moments) -> _Moments:
        classes = np.union1d(self.classes, other.classes)
        counts = np.zeros((2, len(classes)))
        means = np.zeros((2, len(classes), self.means.shape[1]))
        for part, moments in enumerate((self, other)):
            place = np.searchsorted(classes, moments.classes)
            counts[part, place], means[part, place] = moments.counts, moments.means
        total = counts.sum(axis=0)
        difference = means[1] - means[0]
        # n_a n_b / (n_a + n_b) (mu_b - mu_a)(mu_b - mu_a)^T, which vanishes for a class that only one part has
        between = (difference * (counts[0] * counts[1] / total)[:, None]).T @ difference
        average = (counts[0][:, None] * means[0] + counts[1][:, None] * means[1]) / total[:, None]
        return _Moments(classes, total, average, self.scatter + other.scatter + between)


@dataclass(frozen=True, eq=False)
class _Estimate:
    """Means and a covariance as they stand, and the factors that follow from them, computed when first needed."""

    means: Float[np.ndarray, "classes features"]
    covariance: Float[np.ndarray, "features features"]
    shrinkage: float

    @cached_property
    def factors(self) -> Factors:
        covariance = shrunk_covariance(self.covariance, self.shrinkage) if self.shrinkage else self.covariance
        whitening, origin = whitening_matrix(covariance), self.means.mean(axis=0)
        return Factors(whitening, origin, (self.means - origin) @ whitening)


class TiedGaussian(ClassifierMixin, BaseEstimator):  # type: ignore[misc, unused-ignore]  # scikit-learn is untyped
    r"""One Gaussian a class, all with the same covariance: a classifier, and a measure of how normal a sample is.

    ::

        mu_c  = 1/N_c sum_{y_i = c} f_i
        Sigma = 1/N sum_i (f_i - mu_{y_i})(f_i - mu_{y_i})^T
        M_c(f) = -(f - mu_c)^T Sigma^+ (f - mu_c),     M(f) = max_c M_c(f)

    `predict` is ``argmax_c M_c`` (linear discriminant analysis with equal priors) and `score_samples` is ``M``.

    Args:
        shrinkage: None for the maximum-likelihood covariance; a number ``s`` in [0, 1] for
            ``(1 - s) Sigma + s tr(Sigma)/d I``; "ledoit_wolf" for the ``s`` of Ledoit and Wolf.

    Attributes:
        classes_: the labels, sorted.
        class_count_: number of samples of each class.
        means_: ``mu_c``, classes by features.
        covariance_: ``Sigma`` before shrinkage.
        shrinkage_: the ``s`` in use, 0 for none.
        n_features_in_: number of features.
    """

    classes_: Shaped[np.ndarray, " classes"]
    class_count_: Float[np.ndarray, " classes"]
    means_: Float[np.ndarray, "classes features"]
    covariance_: Float[np.ndarray, "features features"]
    shrinkage_: float
    _moments: _Moments | None
    _estimate: _Estimate

    def __init__(self, shrinkage: Shrinkage = None) -> None:
        self.shrinkage = shrinkage

    def fit(self, features: Float[np.ndarray, "samples features"], labels: Shaped[np.ndarray, " samples"]) -> Self:
        """Estimate the means and the covariance.

        Args:
            features: finite numbers.
            labels: one class a sample.

        Raises:
            ValueError: no samples, numbers that are not finite, sizes that do not agree, or a bad shrinkage.
        """
        self._check_shrinkage()
        features, labels = self._checked(features, labels, reset=True)
        moments, centred = _Moments.of(features, labels)
        if self.shrinkage == "ledoit_wolf":
            self.shrinkage_ = float(ledoit_wolf_shrinkage(centred, assume_centered=True))
        self._set(moments)
        return self

    def partial_fit(
        self, features: Float[np.ndarray, "samples features"], labels: Shaped[np.ndarray, " samples"]
    ) -> Self:
        """Add a batch. Any split of the samples into batches gives the result of `fit` on all of them.

        Memory is features x features, whatever the number of samples. New classes may appear in any batch.

        Raises:
            ValueError: as `fit`; also with shrinkage "ledoit_wolf", whose amount needs all samples at once, and after
                `add_class`, which leaves no sample mean to continue from.
        """
        self._check_shrinkage()
        if self.shrinkage == "ledoit_wolf":
            raise ValueError("shrinkage 'ledoit_wolf' needs all samples at once: use fit, or give a number")
        is_first = not hasattr(self, "classes_")
        features, labels = self._checked(features, labels, reset=is_first)
        moments, _ = _Moments.of(features, labels)
        if not is_first:
            if self._moments is None:
                raise ValueError("partial_fit cannot follow add_class: that weighs classes equally, not samples")
            moments = self._moments.merged(moments)
        self._set(moments)
        return self

    def add_class(self, features: Float[np.ndarray, "samples features"], label: Any) -> Self:
        r"""Learn one more class from samples of it alone (Algorithm 2).

        ``mu_{C+1} = mean(f)``, ``Sigma <- C/(C+1) Sigma + 1/(C+1) Sigma_{C+1}``, ``C <- C + 1``: the classes weigh the
        same, however many samples each had.

        Args:
            features: samples of the new class.
            label: its label, not among ``classes_``.

        Raises:
            ValueError: a label that is known already, no samples, or another number of features.
        """
        check_is_fitted(self, "means_")
        if label in self.classes_:
            raise ValueError(f"add_class learns a new class, but {label!r} is among {list(self.classes_)}")
        features = validate_data(self, features, reset=False, dtype=np.float64)
        mean = features.mean(axis=0)
        centred = features - mean
        known = len(self.classes_)
        place = int(np.searchsorted(self.classes_, label))
        self.covariance_ = (known * self.covariance_ + centred.T @ centred / len(features)) / (known + 1)
        self.classes_ = np.insert(self.classes_, place, label)
        self.class_count_ = np.insert(self.class_count_, place, len(features))
        self.means_ = np.insert(self.means_, place, mean, axis=0)
        self._moments, self._estimate = None, _Estimate(self.means_, self.covariance_, self.shrinkage_)
        return self

    def class_scores(self, features: Float[np.ndarray, "samples features"]) -> Float[np.ndarray, "samples classes"]:
        """``M_c(f)``, the negative squared Mahalanobis distance to each class mean, in the order of ``classes_``."""
        check_is_fitted(self, "means_")
        features = validate_data(self, features, reset=False, dtype=np.float64)
        factors = [torch.from_numpy(factor) for factor in self.factors()]
        return np.asarray(-squared_distances(torch.from_numpy(features), *factors).numpy())

    def score_samples(self, features: Float[np.ndarray, "samples features"]) -> Float[np.ndarray, " samples"]:
        """``M(f)``, the score of the closest class; higher is more normal."""
        return np.asarray(self.class_scores(features).max(axis=1))

    def predict(self, features: Float[np.ndarray, "samples features"]) -> Shaped[np.ndarray, " samples"]:
        """Return the class with the closest mean."""
        scores = self.class_scores(features)
        return np.asarray(self.classes_[scores.argmax(axis=1)])

    @property
    def precision_(self) -> Float[np.ndarray, "features features"]:
        """Pseudo-inverse of the covariance in use (shrunk, if so chosen)."""
        check_is_fitted(self, "means_")
        whitening = self.factors().whitening
        return np.asarray(whitening @ whitening.T)

    def factors(self) -> Factors:
        """Whitening, origin and whitened means in float64; computed once after each change of the estimates."""
        check_is_fitted(self, "means_")
        return self._estimate.factors

    def _set(self, moments: _Moments) -> None:
        self.classes_, self.class_count_, self.means_ = moments.classes, moments.counts, moments.means
        self.covariance_ = moments.scatter / moments.counts.sum()
        self._moments, self._estimate = moments, _Estimate(self.means_, self.covariance_, self.shrinkage_)

    def _check_shrinkage(self) -> None:
        amount = self.shrinkage
        if amount is None or amount == "ledoit_wolf":
            self.shrinkage_ = 0.0
        elif isinstance(amount, bool) or not isinstance(amount, int | float) or not 0 <= amount <= 1:
            raise ValueError(f"shrinkage is None, 'ledoit_wolf' or a number in [0, 1], got {amount!r}")
        else:
            self.shrinkage_ = float(amount)

    def _checked(self, features: np.ndarray, labels: np.ndarray, *, reset: bool) -> tuple[np.ndarray, np.ndarray]:
        features, labels = validate_data(self, features, labels, reset=reset, dtype=np.float64)
        check_classification_targets(labels)
        return features, labels
