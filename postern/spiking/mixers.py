"""What mixes positions in a block of a spiking transformer without attention: pooling, or a convolution.

The pools act on the membrane signal itself, and nothing is added or subtracted: unlike PoolFormer's ``pool(x) - x``.

Paper: "Spiking Neural Networks Need High-Frequency Information", arXiv 2505.18608.
"""

from __future__ import annotations

from typing import Literal, get_args

from jaxtyping import Float
from torch import Tensor, nn

from postern.spiking.neurons import LIF
from postern.spiking.time_steps import ConvNorm, at_each_step

Pool = Literal["avg", "max"]


class DWCMixer(nn.Module):
    """``x + BN(DWConv(LIF(x)))``: one kernel a channel, a cheap high-pass that is learned.

    Args:
        dim: channels.
        kernel_size: odd.

    Raises:
        ValueError: sizes below 1 or an even kernel.
    """

    def __init__(self, dim: int, kernel_size: int = 3) -> None:
        super().__init__()
        self.neuron = LIF()
        self.projection = ConvNorm(dim, dim, kernel_size, groups=dim, bias=True)

    def forward(self, x: Float[Tensor, "time batch dim height width"]) -> Float[Tensor, "time batch dim height width"]:
        """Return the mixed membrane signal."""
        mixed: Tensor = x + self.projection(self.neuron(x))
        return mixed


class PoolMixer(nn.Module):
    """The mean or the maximum of the 3x3 positions around each; those outside the image do not count.

    Args:
        pool: "avg" or "max".

    Raises:
        ValueError: another pool.
    """

    def __init__(self, pool: Pool) -> None:
        super().__init__()
        if pool not in get_args(Pool):
            raise ValueError(f"a pool is one of {', '.join(get_args(Pool))}, got {pool!r}")
        is_max = pool == "max"
        self.pool = nn.MaxPool2d(3, 1, 1) if is_max else nn.AvgPool2d(3, 1, 1, count_include_pad=False)

    def forward(self, x: Float[Tensor, "time batch dim height width"]) -> Float[Tensor, "time batch dim height width"]:
        """Return the pooled membrane signal."""
        return at_each_step(self.pool, x)
