"""Uniform quantisation of a tensor, simulated: values are rounded to a grid of ``2**bits`` and kept as floats.

    x_q = s (clip(round(x / s) + z, lowest, highest) - z)

with a scale ``s`` and an integer zero point ``z``. Asymmetric grids (activations) span a range, which always contains
0 so that 0 stays exact; symmetric ones (weights) have ``z = 0``. In the backward pass rounding counts as the identity,
and clipped entries get no gradient.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Grid(NamedTuple):
    """A grid of evenly spaced values: ``scale * (code - zero_point)`` for the codes from lowest to highest."""

    scale: Float[Tensor, ""]
    zero_point: Float[Tensor, ""]
    lowest: int
    highest: int


def asymmetric_grid(low: Float[Tensor, ""], high: Float[Tensor, ""], bits: int) -> Grid:
    """``s = (high - low) / (2**bits - 1)``, ``z = round(-low / s)``, for the range widened to contain 0.

    Args:
        low: lowest value of the range.
        high: highest value of the range.
        bits: 2 to 16.

    Raises:
        ValueError: bits outside 2 to 16.
    """
    check_bits(bits)
    low, high = low.clamp_max(0), high.clamp_min(0)
    highest = 2**bits - 1
    scale = ((high - low) / highest).clamp_min(torch.finfo(low.dtype).tiny)  # a range of nothing but 0 gives 0
    return Grid(scale, torch.round(-low / scale), 0, highest)


def symmetric_grid(largest: Float[Tensor, ""], bits: int) -> Grid:
    """``s = largest / (2**(bits - 1) - 1)``, ``z = 0``.

    Args:
        largest: largest absolute value to represent.
        bits: 2 to 16.

    Raises:
        ValueError: bits outside 2 to 16.
    """
    check_bits(bits)
    highest = 2 ** (bits - 1) - 1
    scale = (largest / highest).clamp_min(torch.finfo(largest.dtype).tiny)
    return Grid(scale, torch.zeros_like(scale), -highest - 1, highest)


def fake_quantize(x: Float[Tensor, "*shape"], grid: Grid) -> Float[Tensor, "*shape"]:
    """Round each entry to the grid, in the dtype of ``x``; ties go to the even code.

    Args:
        x: any shape.
        grid: where to round to.
    """
    scale, zero_point, lowest, highest = grid
    codes = torch.clamp(torch.round(x / scale) + zero_point, lowest, highest)
    rounded = (scale * (codes - zero_point)).to(x.dtype)
    if not (torch.is_grad_enabled() and x.requires_grad):
        return rounded
    inside = torch.clamp(x, scale * (lowest - zero_point), scale * (highest - zero_point)).to(x.dtype)
    return inside + (rounded - inside).detach()


def min_max_weight_grid(weight: Float[Tensor, "*shape"], bits: int) -> Grid:
    """The symmetric grid that reaches the largest absolute weight.

    Args:
        weight: any shape, not empty.
        bits: 2 to 16.

    Raises:
        ValueError: bits outside 2 to 16, or weights that are empty or not finite.
    """
    return symmetric_grid(_largest(weight), bits)


def mse_weight_grid(weight: Float[Tensor, "*shape"], bits: int, candidates: int = 100) -> Grid:
    """The symmetric grid with the smallest mean squared error, among those that reach a part of the largest weight.

    Args:
        weight: any shape, not empty.
        bits: 2 to 16.
        candidates: how many evenly spaced parts to try, the last being the whole.

    Raises:
        ValueError: bits outside 2 to 16, no candidates, or weights that are empty or not finite.
    """
    if candidates < 1:
        raise ValueError(f"candidates must be at least 1, got {candidates}")
    weight = weight.detach()
    largest = _largest(weight)
    errors, grids = [], []
    for step in range(candidates, 0, -1):
        grid = symmetric_grid(largest * (step / candidates), bits)
        grids.append(grid)
        errors.append((fake_quantize(weight, grid) - weight).square().mean())
    return grids[int(torch.stack(errors).argmin())]


class RunningRange(nn.Module):
    """The range of an activation, followed over batches: ``low <- momentum low + (1 - momentum) min(x)``, and so on.

    The first batch sets the range.

    Args:
        momentum: weight of the past, in [0, 1).
        percentile: take this percentile and its mirror image (the nearest entries) instead of maximum and minimum;
            above 50, at most 100.

    Raises:
        ValueError: momentum or percentile out of bounds.
    """

    low: Tensor
    high: Tensor

    def __init__(self, momentum: float = 0.9, percentile: float | None = None) -> None:
        super().__init__()
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum lies in [0, 1), got {momentum}")
        if percentile is not None and not 50 < percentile <= 100:
            raise ValueError(f"percentile is above 50 and at most 100, got {percentile}")
        self.momentum = momentum
        self.percentile = percentile
        self.register_buffer("low", torch.tensor(torch.nan))
        self.register_buffer("high", torch.tensor(torch.nan))

    @torch.no_grad()
    def update(self, x: Float[Tensor, "*shape"]) -> None:
        """Take in a batch.

        Raises:
            ValueError: an empty batch, or one that is not finite.
        """
        if x.numel() == 0 or not torch.isfinite(x).all():
            raise ValueError("a range is calibrated on finite activations, got none or some that are not")
        x = x.detach().flatten().to(self.low.dtype)
        if self.percentile is None:
            low, high = x.aminmax()
        else:
            rank = max(1, math.ceil(self.percentile / 100 * x.numel()))
            low, high = -torch.kthvalue(-x, rank).values, torch.kthvalue(x, rank).values
        if torch.isnan(self.low):
            self.low.copy_(low)
            self.high.copy_(high)
        else:
            self.low.lerp_(low, 1 - self.momentum)
            self.high.lerp_(high, 1 - self.momentum)

    def forward(self, x: Float[Tensor, "*shape"], bits: int) -> Float[Tensor, "*shape"]:
        """Round activations to the asymmetric grid of the range.

        Raises:
            ValueError: bits outside 2 to 16.
        """
        return fake_quantize(x, asymmetric_grid(self.low, self.high, bits))


def check_bits(bits: int) -> None:
    """Check that there are that many bits.

    Raises:
        ValueError: there are fewer than 2 or more than 16.
    """
    if not 2 <= bits <= 16:
        raise ValueError(f"bits lie in 2..16, got {bits}")


def _largest(weight: Tensor) -> Tensor:
    if weight.numel() == 0 or not torch.isfinite(weight).all():
        raise ValueError(f"weights must be finite, and some; got a tensor of shape {list(weight.shape)} that is not")
    return weight.detach().abs().amax()
