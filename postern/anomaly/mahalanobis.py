"""Detect outliers and adversarial inputs by the distance of a network's features to the nearest class mean.

Paper: A Simple Unified Framework for Detecting Out-of-Distribution Samples and Adversarial Attacks (arXiv 1807.03888).

Differences: all layers' scores come from one forward pass, and all layers' gradients from one backward graph; the
signs of the gradients are kept while step sizes are compared; scores are standardised before the regression; the
covariance can be shrunk. The score is ``-d^2``, twice that of the paper's code.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from postern.anomaly.detector import OutlierDetector, device_of, sign_direction
from postern.anomaly.ensemble import LayerEnsemble, Quality, choose_ensemble
from postern.anomaly.gaussian import Factors, Shrinkage, TiedGaussian, squared_distances
from postern.anomaly.taps import FeatureTaps, Pool, spatial_mean
from postern.nets.evaluation import evaluating

MAGNITUDES = (0.0, 0.0005, 0.001, 0.0014, 0.002, 0.005, 0.01)
"""Step sizes of the input pre-processing that the paper's code compares, in pixels between 0 and 1."""


class LayerDistances(nn.Module):
    """Squared Mahalanobis distances of tapped features to the class means, layer by layer; differentiable.

    Args:
        taps: the network and its layers.
        factors: one `Factors` a layer, as `TiedGaussian.factors` gives them.

    Raises:
        ValueError: as many factors as do not match the layers.
    """

    def __init__(self, taps: FeatureTaps, factors: Sequence[Factors]) -> None:
        super().__init__()
        if len(factors) != len(taps.layers):
            raise ValueError(f"{len(taps.layers)} layers need as many Gaussians, got {len(factors)}")
        self.taps = taps
        for index, layer_factors in enumerate(factors):
            for name, factor in layer_factors._asdict().items():
                self.register_buffer(f"{name}_{index}", torch.as_tensor(factor, dtype=torch.float32))

    def forward(self, inputs: Tensor) -> tuple[Tensor, list[Float[Tensor, "batch classes"]]]:
        """Return the network's output, and for each layer the squared distance to each class mean."""
        logits, features = self.taps(inputs)
        distances = [
            squared_distances(layer, *(self.get_buffer(f"{name}_{index}") for name in Factors._fields))
            for index, layer in enumerate(features)
        ]
        return logits, distances

    def scores(self, inputs: Tensor) -> Float[Tensor, "batch layers"]:
        """``M_l = max_c -d_{l,c}^2`` of all layers, from one forward pass."""
        _, distances = self(inputs)
        return torch.stack([-layer.amin(dim=1) for layer in distances], dim=1)

    def directions(self, inputs: Tensor, std: Sequence[float] | None = None) -> list[Tensor]:
        """For each layer, the sign (over ``std``) of the gradient of the distance to the class that is closest there.

        The layers share one forward pass; each adds a backward pass.
        """
        with torch.enable_grad():
            inputs = inputs.detach().requires_grad_()
            scores = self.scores(inputs)
            gradients = [
                torch.autograd.grad(-scores[:, layer].sum(), inputs, retain_graph=layer + 1 < scores.shape[1])[0]
                for layer in range(scores.shape[1])
            ]
        return [sign_direction(gradient, std) for gradient in gradients]


class MahalanobisDetector(OutlierDetector):
    r"""Distance to the closest class-conditional Gaussian, at one layer or several, with input pre-processing.

    ::

        M_l(x) = max_c -(f_l(x) - mu_{l,c})^T Sigma_l^+ (f_l(x) - mu_{l,c})
        x^_l   = x + eps sign(grad_x M_l(x))             # a small step towards the closest class, layer by layer
        score  = sum_l alpha_l M_l(x^_l)                 # after `fit_ensemble` or `tune`; M of the last layer before

    Args:
        model: a trained classifier. It is used in evaluation mode and left in its own.
        layers: names of the submodules whose features are used.
        eps: size of the step on the input, in pixels between 0 and 1; 0 for none. There is no clamping.
        std: by channel, what the inputs were divided by, where they are normalised before the network; None where
            they are pixels between 0 and 1.
        shrinkage: of the covariance, see `TiedGaussian`.
        pool: makes one vector of a layer's output; the mean over space by default.
        batch_size: inputs in one pass.

    Attributes:
        gaussians_: one `TiedGaussian` a layer.
        classes_: labels of the classes.
        ensemble_: the `LayerEnsemble`, None before `fit_ensemble` or `tune`.
        eps_: the step in use: ``eps``, or what `tune` chose.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str],
        eps: float = 0.0,
        std: Sequence[float] | None = None,
        shrinkage: Shrinkage = None,
        pool: Pool = spatial_mean,
        batch_size: int = 256,
    ) -> None:
        self.model = model
        self.layers = layers
        self.eps = eps
        self.std = std
        self.shrinkage = shrinkage
        self.pool = pool
        self.batch_size = batch_size

    def fit(self, inputs: Any, labels: Any = None) -> Self:
        """Estimate the Gaussians of all layers in one pass over the training set.

        Features are not kept, except with shrinkage "ledoit_wolf", whose amount needs all of them at once.

        Args:
            inputs: the network's training inputs, a tensor, without augmentation; or, with no ``labels``, batches of
                inputs and labels, such as a ``DataLoader``, gone through once.
            labels: the true classes.

        Raises:
            ValueError: no inputs, labels of another number, a negative ``eps``, or an unknown layer.
        """
        if not self.eps >= 0:
            raise ValueError(f"eps is the size of a step, at least 0, got {self.eps}")
        gaussians = [TiedGaussian(self.shrinkage) for _ in self.layers]
        kept: list[tuple[list[np.ndarray], np.ndarray]] = []
        with FeatureTaps(self.model, self.layers, self.pool) as taps:
            for batch, classes in self._labelled(inputs, labels):
                features = self._pooled(taps, batch)
                if self.shrinkage == "ledoit_wolf":
                    kept.append((features, classes))
                    continue
                for gaussian, layer in zip(gaussians, features, strict=True):
                    gaussian.partial_fit(layer, classes)
        if kept:
            targets = np.concatenate([classes for _, classes in kept])
            for index, gaussian in enumerate(gaussians):
                gaussian.fit(np.concatenate([features[index] for features, _ in kept]), targets)
        if not hasattr(gaussians[0], "classes_"):
            raise ValueError("fit needs at least one batch of training inputs, got none")
        self.gaussians_ = gaussians
        self.ensemble_: LayerEnsemble | None = None
        self.eps_ = float(self.eps)
        return self

    def add_class(self, inputs: Tensor, label: Any) -> Self:
        """Learn one more class from inputs of it, at all layers, without training the network (Algorithm 2).

        An ensemble fitted before keeps its weights.

        Raises:
            ValueError: a label that is known already, or no inputs.
        """
        for gaussian, features in zip(self.gaussians_, self.features(inputs), strict=True):
            gaussian.add_class(features, label)
        return self

    def features(self, inputs: Tensor) -> list[Float[np.ndarray, "batch features"]]:
        """Pooled features of all layers."""
        check_is_fitted(self, "gaussians_")
        with FeatureTaps(self.model, self.layers, self.pool) as taps:
            parts = [self._pooled(taps, batch) for batch in self._batches(inputs)]
        return [np.concatenate(layer) for layer in zip(*parts, strict=True)]

    def layer_scores(self, inputs: Tensor, eps: float | None = None) -> Float[np.ndarray, "batch layers"]:
        """``M_l`` of all layers, after the step on the input.

        Without a step it costs one forward pass. With one it costs two for one layer; for L layers 1 + L forward and L
        backward passes, since every layer has its own step.

        Args:
            inputs: what the network takes.
            eps: size of the step; None for the one in use.

        Raises:
            ValueError: a negative step, or inputs that are empty or not finite.
        """
        check_is_fitted(self, "gaussians_")
        step = self.eps_ if eps is None else eps
        return self._scores_at(inputs, (step,))[0]

    def fit_ensemble(self, inside: Tensor, outside: Tensor, cv: int = 5) -> Self:
        """Weigh the layers by a logistic regression between normal and abnormal inputs, at the step in use.

        Args:
            inside: in-distribution inputs that the network was not trained on; for the detection of attacks, clean and
                noisy ones.
            outside: abnormal ones: of the kind to be detected, or adversarial ones where that is not known.
            cv: folds for the choice of the penalty.
        """
        self.ensemble_ = LayerEnsemble(cv).fit(self.layer_scores(inside), self.layer_scores(outside))
        return self

    def tune(
        self,
        inside: Tensor,
        outside: Tensor,
        magnitudes: Sequence[float] = MAGNITUDES,
        by: Quality = "tnr95",
        cv: int = 5,
    ) -> Self:
        """Choose the step and weigh the layers: every second input fits the regression, the others choose the step.

        Args:
            inside: in-distribution inputs that the network was not trained on.
            outside: abnormal ones, see `fit_ensemble`.
            magnitudes: the steps to compare.
            by: what decides, "tnr95" or "auroc".
            cv: folds for the choice of the penalty.

        Raises:
            ValueError: no or negative steps, or too few inputs.
        """
        check_is_fitted(self, "gaussians_")
        inside_scores, outside_scores = self._scores_at(inside, magnitudes), self._scores_at(outside, magnitudes)
        candidates = zip(magnitudes, inside_scores, outside_scores, strict=True)
        self.eps_, self.ensemble_ = choose_ensemble(candidates, by, cv)
        return self

    def score_samples(self, inputs: Tensor) -> Float[np.ndarray, " batch"]:
        """The ensemble's score, or before `fit_ensemble` or `tune` that of the last layer; higher is more normal."""
        scores = self.layer_scores(inputs)
        return scores[:, -1] if self.ensemble_ is None else self.ensemble_.score_samples(scores)

    def predict_class(self, inputs: Tensor) -> Shaped[np.ndarray, " batch"]:
        """The class whose mean is closest at the last layer: the Gaussian classifier that comes with the detector."""
        check_is_fitted(self, "gaussians_")
        return self.gaussians_[-1].predict(self.features(inputs)[-1])

    @property
    def classes_(self) -> Shaped[np.ndarray, " classes"]:
        """Labels of the classes, sorted."""
        check_is_fitted(self, "gaussians_")
        return self.gaussians_[0].classes_

    def distances(self) -> LayerDistances:
        """The differentiable part, a module from inputs to logits and distances: for attacks that know the detector.

        It holds the network itself, with hooks on the layers (``.taps.remove()`` takes them off).
        """
        check_is_fitted(self, "gaussians_")
        taps = FeatureTaps(self.model, self.layers, self.pool)
        return LayerDistances(taps, [gaussian.factors() for gaussian in self.gaussians_]).to(device_of(self.model))

    def _scores_at(self, inputs: Tensor, magnitudes: Sequence[float]) -> list[Float[np.ndarray, "batch layers"]]:
        """Layer scores at several steps; the directions of the steps are computed once."""
        if not len(magnitudes) or not all(eps >= 0 for eps in magnitudes):
            raise ValueError(f"eps is the size of a step, at least 0, got {list(magnitudes)}")
        scores: list[list[Tensor]] = [[] for _ in magnitudes]
        distances = self.distances()
        with distances.taps, evaluating(self.model), torch.no_grad():
            for batch in self._batches(inputs):
                directions = distances.directions(batch, self.std) if any(magnitudes) else []
                for eps, parts in zip(magnitudes, scores, strict=True):
                    parts.append(_stepped_scores(distances, batch, directions, eps).cpu())
        return [torch.cat(parts).double().numpy() for parts in scores]

    def _pooled(self, taps: FeatureTaps, batch: Tensor) -> list[np.ndarray]:
        with evaluating(self.model), torch.no_grad():
            _, features = taps(batch)
        return [layer.double().cpu().numpy() for layer in features]

    def _labelled(self, inputs: Any, labels: Any) -> Iterable[tuple[Tensor, Int[np.ndarray, " batch"]]]:
        if labels is None:
            for batch in inputs:
                if not isinstance(batch, tuple | list) or len(batch) != 2:
                    raise ValueError(
                        f"without labels, inputs are batches of (inputs, labels), got {type(batch).__name__}"
                    )
                yield from self._labelled(*batch)
            return
        classes = np.asarray(labels)
        if classes.shape != (len(inputs),):
            raise ValueError(f"{len(inputs)} inputs need as many labels, got shape {classes.shape}")
        start = 0
        for batch in self._batches(inputs):
            yield batch, classes[start : start + len(batch)]
            start += len(batch)


def _stepped_scores(
    distances: LayerDistances, batch: Tensor, directions: list[Tensor], eps: float
) -> Float[Tensor, "batch layers"]:
    if eps == 0:
        return distances.scores(batch)
    columns = [distances.scores(batch - eps * direction)[:, layer] for layer, direction in enumerate(directions)]
    return torch.stack(columns, dim=1)
