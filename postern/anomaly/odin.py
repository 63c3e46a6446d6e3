"""ODIN: soften the softmax, and step the input towards confidence; normal inputs gain more than others.

Paper: Enhancing The Reliability of Out-of-distribution Image Detection in Neural Networks (arXiv 1706.02690).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from postern.anomaly.detector import OutlierDetector, sign_direction
from postern.anomaly.ensemble import Quality, choose
from postern.anomaly.mahalanobis import MAGNITUDES

TEMPERATURES = (1.0, 10.0, 100.0, 1000.0)
"""Temperatures that the comparison tries."""


class ODIN(OutlierDetector):
    r"""Largest class probability at a temperature, after a step on the input.

    ::

        x^    = x - eps sign(-grad_x log max_c softmax(z(x) / T)_c)
        score = max_c softmax(z(x^) / T)_c

    Probabilities are computed in float64: at ``T = 1000`` they differ in the fifth digit.

    Args:
        model: a trained classifier that returns logits.
        temperature: ``T``, positive.
        eps: size of the step, in pixels between 0 and 1.
        std: by channel, what the inputs were divided by, where they are normalised before the network; None where
            they are pixels between 0 and 1.
        batch_size: inputs in one pass.

    Attributes:
        temperature_: the temperature in use: ``temperature``, or what `tune` chose.
        eps_: the step in use: ``eps``, or what `tune` chose.
    """

    def __init__(
        self,
        model: nn.Module,
        temperature: float = 1000.0,
        eps: float = 0.0014,
        std: Sequence[float] | None = None,
        batch_size: int = 256,
    ) -> None:
        self.model = model
        self.temperature = temperature
        self.eps = eps
        self.std = std
        self.batch_size = batch_size

    def fit(self, inputs: Any = None, labels: Any = None) -> Self:
        """Take up the given temperature and step; there is nothing to learn.

        Raises:
            ValueError: a temperature that is not positive, or a negative step.
        """
        _check_settings([self.temperature], [self.eps])
        self.temperature_, self.eps_ = float(self.temperature), float(self.eps)
        return self

    def tune(
        self,
        inside: Tensor,
        outside: Tensor,
        temperatures: Sequence[float] = TEMPERATURES,
        magnitudes: Sequence[float] = MAGNITUDES,
        by: Quality = "tnr95",
    ) -> Self:
        """Choose temperature and step, all pairs of them, on normal and abnormal inputs.

        Raises:
            ValueError: no settings, impossible ones, or too few inputs.
        """
        _check_settings(temperatures, magnitudes)
        normal, abnormal = (self._scores_at(inputs, temperatures, magnitudes) for inputs in (inside, outside))
        self.temperature_, self.eps_ = choose(((pair, normal[pair], abnormal[pair]) for pair in normal), by)
        return self

    def score_samples(self, inputs: Tensor) -> Float[np.ndarray, " batch"]:
        """Return the score of each input; higher is more normal.

        Raises:
            ValueError: inputs that are empty or not finite, or a network that does not return logits.
        """
        if not hasattr(self, "eps_"):
            self.fit()
        setting = (self.temperature_, self.eps_)
        return self._scores_at(inputs, setting[:1], setting[1:])[setting]

    def _scores_at(
        self, inputs: Tensor, temperatures: Sequence[float], magnitudes: Sequence[float]
    ) -> dict[tuple[float, float], Float[np.ndarray, " batch"]]:
        """Scores at all pairs; the direction of the step is computed once a temperature."""
        scores: dict[tuple[float, float], list[Tensor]] = {(t, eps): [] for t in temperatures for eps in magnitudes}
        for batch in self._batches(inputs):
            for temperature in temperatures:
                direction = self._direction(batch, temperature) if any(magnitudes) else torch.zeros_like(batch)
                for eps in magnitudes:
                    with torch.no_grad():
                        logits = self._logits(batch - eps * direction)
                    scores[temperature, eps].append((logits / temperature).softmax(dim=1).amax(dim=1).cpu())
        return {setting: torch.cat(parts).numpy() for setting, parts in scores.items()}

    def _direction(self, batch: Tensor, temperature: float) -> Tensor:
        with torch.enable_grad():
            batch = batch.detach().requires_grad_()
            confidence = (self._logits(batch) / temperature).log_softmax(dim=1).amax(dim=1)
            (gradient,) = torch.autograd.grad(-confidence.sum(), batch)
        return sign_direction(gradient, self.std)


def _check_settings(temperatures: Sequence[float], magnitudes: Sequence[float]) -> None:
    if not len(temperatures) or not all(temperature > 0 for temperature in temperatures):
        raise ValueError(f"temperatures are positive, at least one, got {list(temperatures)}")
    if not len(magnitudes) or not all(eps >= 0 for eps in magnitudes):
        raise ValueError(f"eps is the size of a step, at least 0, got {list(magnitudes)}")
