"""Normalisation as the first layer of a network, so that attacks and detectors work on pixels in [0, 1]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn


class Normalize(nn.Module):
    """``(x - mean) / std``, channel by channel.

    Args:
        mean: one number a channel, in the unit of the pixels.
        std: one positive number a channel.

    Raises:
        ValueError: another number of means than of deviations, or a deviation that is not positive.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or not len(mean):
            raise ValueError(f"mean and std have one number a channel, got {len(mean)} and {len(std)}")
        if min(std) <= 0:
            raise ValueError(f"standard deviations are positive, got {list(std)}")
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1))

    def forward(
        self, pixels: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch channels height width"]:
        """Return the normalised pixels."""
        return (pixels - self.mean) / self.std
