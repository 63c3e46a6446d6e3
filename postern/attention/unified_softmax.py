"""Softmax with a constant in the place of every maximum, and an exact recomputation where that constant does not fit.

Paper: "FlashDecoding++: Faster Large Language Model Inference on GPUs", arXiv 2311.01282.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from postern.precision import without_autocast

RangeCheck = Literal["safe", "paper"]

# A row is safe whose exponentials sum to e^-32 .. e^32. Farther from phi nothing overflows yet, but a logit that was
# moved by z has lost |z| 2^-24 to rounding, which at 32 is two parts in a million; and what underflows is below e^-87.
SAFE_EXPONENT = 32.0


@dataclass(frozen=True)
class UnifiedMax:
    """The constant that stands for every maximum of a model's softmaxes, and the logits for which it was chosen.

    Attributes:
        phi: the constant, in the unit of the logits: after the scale ``1 / sqrt(head_dim)`` and after rotations.
        a: lower end of ``logit - phi``, exclusive; infinite where it is not known.
        b: upper end, exclusive.
        enabled: false where the logits of the model range too widely for one constant; attention is synchronised then.

    Raises:
        ValueError: a phi that is not finite, or an empty range.
    """

    phi: float
    a: float = -math.inf
    b: float = math.inf
    enabled: bool = True

    def __post_init__(self) -> None:
        if not math.isfinite(self.phi):
            raise ValueError(f"phi is a finite number, got {self.phi}")
        if not self.a < self.b:
            raise ValueError(f"a lies below b, got {self.a} and {self.b}")


def check_range(check: str) -> None:
    """Check the name of a test.

    Raises:
        ValueError: an unknown one.
    """
    if check not in get_args(RangeCheck):
        raise ValueError(f"check is one of {', '.join(get_args(RangeCheck))}; got {check!r}")


def unified_softmax(
    x: Float[Tensor, "*shape"],
    phi: float,
    *,
    dim: int = -1,
    a: float | None = None,
    b: float | None = None,
    check: RangeCheck = "safe",
) -> tuple[Float[Tensor, "*shape"], Bool[Tensor, "*rows"]]:
    """``e^(x_i - phi) / sum_j e^(x_j - phi)``, and with the row's maximum for phi where phi does not fit the row.

    Whether it fits is told after the exponentials have been summed, so that parts of a row need to know nothing of each
    other before. Minus infinity stands for an entry that is masked: it gets 0 and is not tested.

    Args:
        x: logits; 16-bit ones are summed in float32.
        phi: the constant; see `UnifiedMax`.
        dim: the dimension that is normalised.
        a: lower end of ``x - phi``, exclusive; for ``check="paper"``, -infinity if None.
        b: upper end, likewise.
        check: "safe" computes a row again where its sum lies outside ``e^-32 .. e^32``, which is what float32 needs;
            "paper" where any entry lies outside (a, b).

    Returns:
        The probabilities in the dtype of x, and true for each row that was computed again, without the dimension.

    Raises:
        ValueError: an unknown check, a phi that is not finite, or an empty range.
    """
    check_range(check)
    unified = UnifiedMax(phi, -math.inf if a is None else a, math.inf if b is None else b)
    with without_autocast(x.device):
        logits = x.to(torch.promote_types(x.dtype, torch.float32))
        weights = torch.exp(logits - unified.phi)
        total = weights.sum(dim, keepdim=True)
        is_safe = is_safe_total(total)
        if check == "paper":
            z = logits - unified.phi
            inside = ((z > unified.a) & (z < unified.b)) | (logits == -math.inf)
            is_safe &= inside.all(dim, keepdim=True)
        if not bool(is_safe.all()):
            # The shift cancels, so that it needs no gradient.
            shift = torch.where(is_safe, unified.phi, logits.detach().amax(dim, keepdim=True))
            weights = torch.exp(logits - shift)
            total = weights.sum(dim, keepdim=True)
        probabilities = weights / total
    return probabilities.to(x.dtype), ~is_safe.squeeze(dim)


def is_safe_total(total: Tensor) -> Tensor:
    """Whether sums of ``exp(logit - phi)`` show that no digits were lost; false for NaN."""
    return (total >= math.exp(-SAFE_EXPONENT)) & (total <= math.exp(SAFE_EXPONENT))
