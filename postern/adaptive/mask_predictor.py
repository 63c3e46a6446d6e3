"""A head that predicts from the input of a layer which of its filters will be among the most active.

Paper: Fire Together Wire Together (FTWT, arXiv 2110.08232).
"""

from __future__ import annotations

from typing import Literal, get_args

from jaxtyping import Float
from torch import Tensor, nn

PixelPool = Literal["max", "avg"]


class MaskPredictor(nn.Module):
    """``W softmax_c(pool(I)) + b``: the log-odds that each filter is to be kept.

    The softmax runs over the channels of the pooled input. With a single input channel it is the constant 1, so the
    first layer of a network for grey images cannot choose.

    Args:
        in_channels: of the layer's input.
        out_channels: number of its filters.
        pool: over the pixels: "max", as the paper says, or "avg", as its code does.
        has_softmax: whether to take the softmax.

    Raises:
        ValueError: sizes below 1, or an unknown pooling.
    """

    def __init__(self, in_channels: int, out_channels: int, pool: PixelPool = "max", has_softmax: bool = True) -> None:
        super().__init__()
        if min(in_channels, out_channels) < 1:
            raise ValueError(f"channels are positive, got {in_channels} and {out_channels}")
        if pool not in get_args(PixelPool):
            raise ValueError(f"pool is one of {get_args(PixelPool)}, got {pool!r}")
        self.pool, self.has_softmax = pool, has_softmax
        self.linear = nn.Linear(in_channels, out_channels)

    @property
    def macs(self) -> int:
        """Multiply-adds for one sample."""
        return self.linear.in_features * self.linear.out_features

    def forward(self, inputs: Float[Tensor, "batch in height width"]) -> Float[Tensor, "batch out"]:
        """Return the log-odds.

        Args:
            inputs: of the layer.
        """
        pooled = inputs.amax((2, 3)) if self.pool == "max" else inputs.mean((2, 3))
        log_odds: Tensor = self.linear(pooled.softmax(1) if self.has_softmax else pooled)
        return log_odds
