"""What all detectors over a neural network share: batches, evaluation mode, and the step from scores to decisions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.base import BaseEstimator
from sklearn.exceptions import NotFittedError
from torch import Tensor, nn

from postern.nets.evaluation import evaluating


class OutlierDetector(BaseEstimator, ABC):  # type: ignore[misc, unused-ignore]  # scikit-learn is untyped
    """Scores inputs by how normal they look to a trained network; higher is more normal.

    `score_samples` needs no threshold. `calibrate` sets one on held-out in-distribution inputs (scores of the network's
    own training set lie higher, so it would be too strict there); then `decision_function` is positive for inputs taken
    as normal and `predict` gives 1 for them and -1 for outliers, as in scikit-learn.

    Attributes:
        offset_: the threshold, once calibrated.
    """

    model: nn.Module
    batch_size: int

    @abstractmethod
    def fit(self, inputs: Any, labels: Any = None) -> Self:
        """Learn what is normal."""

    @abstractmethod
    def score_samples(self, inputs: Tensor) -> Float[np.ndarray, " batch"]:
        """Return one number an input; higher is more normal."""

    def calibrate(self, inputs: Tensor, true_positive_rate: float = 0.95) -> Self:
        """Set the threshold that accepts a given share of in-distribution inputs.

        Args:
            inputs: in-distribution inputs that the network was not trained on.
            true_positive_rate: share of them to accept, between 0 and 1.

        Raises:
            ValueError: a rate outside (0, 1), or no inputs.
        """
        if not 0 < true_positive_rate < 1:
            raise ValueError(f"the rate of accepted inputs lies between 0 and 1, got {true_positive_rate}")
        scores = self.score_samples(inputs)
        self.offset_ = float(np.quantile(scores, 1 - true_positive_rate, method="lower"))
        return self

    def decision_function(self, inputs: Tensor) -> Float[np.ndarray, " batch"]:
        """``score_samples(inputs) - offset_``: at least zero for inputs taken as normal.

        Raises:
            NotFittedError: not calibrated yet.
        """
        if not hasattr(self, "offset_"):
            raise NotFittedError(
                f"this {type(self).__name__} has no threshold yet: call calibrate with held-out in-distribution inputs"
            )
        return self.score_samples(inputs) - self.offset_

    def predict(self, inputs: Tensor) -> Int[np.ndarray, " batch"]:
        """1 for inputs taken as normal, -1 for outliers."""
        return np.where(self.decision_function(inputs) >= 0, 1, -1)

    def _batches(self, inputs: Tensor) -> Iterator[Tensor]:
        """Checked inputs in batches on the network's device."""
        inputs = torch.as_tensor(inputs)
        if inputs.dim() < 2 or not len(inputs):
            raise ValueError(f"inputs are a batch of at least one, got shape {list(inputs.shape)}")
        if inputs.is_floating_point() and not torch.isfinite(inputs).all():
            raise ValueError("inputs are finite, got NaN or infinity")
        if self.batch_size < 1:
            raise ValueError(f"batch_size is positive, got {self.batch_size}")
        device = device_of(self.model)
        for start in range(0, len(inputs), self.batch_size):
            yield inputs[start : start + self.batch_size].to(device)

    def _logits(self, batch: Tensor) -> Float[Tensor, "batch classes"]:
        """The network's output on one batch, in float64, in evaluation mode; differentiable."""
        with evaluating(self.model):
            logits = self.model(batch)
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            what = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(f"the network must return logits [batch, classes], got {what}")
        return logits.double()


def device_of(model: nn.Module) -> torch.device:
    """The device of the first parameter or buffer; the CPU for a network without any."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def sign_direction(gradient: Tensor, std: Sequence[float] | None) -> Tensor:
    """``sign(gradient) / std``, with +1 for a zero gradient and ``std`` by channel.

    The paper's code perturbs normalised pixels and divides by the deviation that they were normalised with, so that a
    step is measured in pixels between 0 and 1.

    Raises:
        ValueError: as many deviations as do not match the channels, or one that is not positive.
    """
    sign = torch.where(gradient >= 0, 1.0, -1.0).to(gradient.dtype)
    if std is None:
        return sign
    if len(std) != gradient.shape[1] or min(std) <= 0:
        raise ValueError(f"std has a positive number for each of {gradient.shape[1]} channels, got {list(std)}")
    return sign / torch.as_tensor(std, dtype=gradient.dtype, device=gradient.device).view(-1, *[1] * (sign.dim() - 2))
