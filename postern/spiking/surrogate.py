"""A step that has a gradient: spikes forwards, the derivative of something smooth backwards.

Paper: "Spiking Neural Networks Need High-Frequency Information", arXiv 2505.18608, whose networks take the sigmoid of
slope 4; the arctangent is the other usual choice.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

Surrogate = Literal["sigmoid", "atan"]


def check_surrogate(surrogate: str, alpha: float) -> None:
    """Raise ValueError unless the surrogate is known and its slope positive and finite."""
    if surrogate not in get_args(Surrogate):
        raise ValueError(f"a surrogate is one of {', '.join(get_args(Surrogate))}, got {surrogate!r}")
    if not 0 < alpha < math.inf:
        raise ValueError(f"the slope of a surrogate is positive and finite, got alpha={alpha}")


def surrogate_derivative(
    x: Float[Tensor, "*shape"], surrogate: Surrogate = "sigmoid", alpha: float = 4.0
) -> Float[Tensor, "*shape"]:
    """What stands in for the derivative of the step at ``x``.

    ===========  =================================================  ==========
    surrogate    derivative                                         at 0
    ===========  =================================================  ==========
    "sigmoid"    ``alpha s (1 - s)`` with ``s = sigmoid(alpha x)``  alpha / 4
    "atan"       ``alpha / 2 / (1 + (pi / 2 * alpha x)^2)``         alpha / 2
    ===========  =================================================  ==========

    Both integrate to 1.

    Args:
        x: membrane potential less the threshold.
        surrogate: which.
        alpha: the slope.

    Raises:
        ValueError: an unknown surrogate or a slope that is not positive.
    """
    check_surrogate(surrogate, alpha)
    if surrogate == "sigmoid":
        s = (alpha * x).sigmoid_()
        return torch.addcmul(s, s, s, value=-1).mul(alpha)
    return alpha / 2 / (1 + (math.pi / 2 * alpha * x).square())


class _Heaviside(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, surrogate: Surrogate, alpha: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.surrogate, ctx.alpha = surrogate, alpha
        return (x >= 0).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return gradients[0] * surrogate_derivative(x, ctx.surrogate, ctx.alpha), None, None


def heaviside(
    x: Float[Tensor, "*shape"], surrogate: Surrogate = "sigmoid", alpha: float = 4.0
) -> Float[Tensor, "*shape"]:
    """``1 if x >= 0 else 0``, with `surrogate_derivative` as its derivative.

    Args:
        x: membrane potential less the threshold.
        surrogate: which.
        alpha: its slope.

    Raises:
        ValueError: an unknown surrogate or a slope that is not positive.
    """
    check_surrogate(surrogate, alpha)
    spikes: Tensor = _Heaviside.apply(x, surrogate, alpha)  # type: ignore[no-untyped-call]
    return spikes
