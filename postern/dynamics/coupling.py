"""When normalised attention and SSD are the same function: the equations that tie a normaliser to a step.

With the same queries, keys and values, and a normaliser eta, a step Delta and a rate a, they are equal if and only if

    exp(-a Delta_i) = eta_{i-1} / eta_i    and    Delta_i = 1 / eta_i    for all i (the first for i >= 1).

Both together leave one free number, the first step. Sequences that two layers compute from tokens violate them.

Paper: "Understanding the differences in Foundation Models: Attention, State Space Models, and Recurrent Neural
Networks", arXiv 2405.15731; the exact statement and its solution are ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from scipy.special import lambertw
from torch import Tensor


@dataclass(frozen=True)
class CouplingResiduals:
    """What is left of the coupling equations.

    Attributes:
        transition: ``exp(-a Delta_i) - eta_{i-1} / eta_i``, for all tokens but the first.
        scale: ``Delta_i - 1 / eta_i``.
    """

    transition: Float[Tensor, "*batch time-1"]
    scale: Float[Tensor, "*batch time"]

    @property
    def largest(self) -> float:
        """The largest absolute residual; 0 where attention and SSD are equal."""
        residuals = [self.scale.abs().max().item()]
        if self.transition.numel():
            residuals.append(self.transition.abs().max().item())
        return max(residuals)


def coupling_residuals(
    normaliser: Float[Tensor, "*batch time"], step: Float[Tensor, "*batch time"], rate: float
) -> CouplingResiduals:
    """Return how far normalised attention and SSD are from being the same.

    Args:
        normaliser: ``eta``, positive.
        step: ``Delta``.
        rate: ``a``.

    Raises:
        ValueError: shapes that differ, or a normaliser that is not positive.
    """
    if normaliser.shape != step.shape or not normaliser.dim() or not (normaliser > 0).all():
        raise ValueError(
            f"normalisers and steps are [..., time], the former positive; got {list(normaliser.shape)} and "
            f"{list(step.shape)}, the lowest normaliser {normaliser.min().item():.3g}"
        )
    transition = torch.exp(-rate * step[..., 1:]) - normaliser[..., :-1] / normaliser[..., 1:]
    return CouplingResiduals(transition, step - 1 / normaliser)


def couple(
    first_step: Float[Tensor, "*batch"] | float, rate: float, time: int
) -> tuple[Float[Tensor, "*batch time"], Float[Tensor, "*batch time"]]:
    """Return the normalisers and steps, in float64, with which attention and SSD are equal; the first step is free.

    ``eta_i exp(-a / eta_i) = eta_{i-1}`` has one solution, as its left side grows with ``eta_i``:
    ``eta_i = a / W(a / eta_{i-1})``, with Lambert's W.

    Args:
        first_step: ``Delta_0``, positive.
        rate: ``a``, positive.
        time: number of tokens, at least 1.

    Raises:
        ValueError: numbers that are not positive.
    """
    start = torch.as_tensor(first_step, dtype=torch.float64)
    if not (start > 0).all() or not rate > 0 or time < 1:
        raise ValueError(f"steps, rate and time are positive, got {first_step}, {rate} and {time}")
    eta = [1 / start.cpu()]
    for _ in range(time - 1):
        w = lambertw((rate / eta[-1]).numpy()).real  # type: ignore[call-overload]
        eta.append(rate / torch.as_tensor(w))
    normaliser = torch.stack(eta, dim=-1).to(start.device)
    return normaliser, 1 / normaliser
