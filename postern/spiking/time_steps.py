"""Layers without a memory, applied at every time step: the steps join the batch."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn


def at_each_step(layer: Callable[[Tensor], Tensor], x: Float[Tensor, "time batch ..."]) -> Tensor:
    """Apply ``layer`` to [time * batch, ...] and take time and batch apart again."""
    out = layer(x.flatten(0, 1))
    return out.view(*x.shape[:2], *out.shape[1:])


class ConvNorm(nn.Module):
    """Convolution and batch normalisation at every time step, then a 3x3 maximum with stride 2 if asked for.

    The statistics of the normalisation are those of all steps together. The maximum comes after it: of real numbers,
    where that of spikes would be a logical or.

    Args:
        in_channels: channels of the input.
        out_channels: of the output.
        kernel_size: odd; the padding keeps the resolution.
        stride: of the convolution.
        groups: of the convolution.
        bias: whether the convolution has one.
        has_max_pool: whether the maximum follows, which halves the resolution.

    Raises:
        ValueError: a size below 1, an even kernel, or groups that do not divide the channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        *,
        groups: int = 1,
        bias: bool = False,
        has_max_pool: bool = False,
    ) -> None:
        super().__init__()
        if min(in_channels, out_channels, kernel_size, stride, groups) < 1 or kernel_size % 2 == 0:
            raise ValueError(
                f"sizes are positive and kernels odd, got in_channels={in_channels}, out_channels={out_channels}, "
                f"kernel_size={kernel_size}, stride={stride}, groups={groups}"
            )
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, kernel_size // 2, groups=groups, bias=bias
        )
        self.norm = nn.BatchNorm2d(out_channels)
        self.pool: nn.Module = nn.MaxPool2d(3, 2, 1) if has_max_pool else nn.Identity()

    def forward(self, x: Float[Tensor, "time batch in height width"]) -> Float[Tensor, "time batch out rows columns"]:
        """Return the membrane signal."""
        return at_each_step(self._one_step, x)

    def _one_step(self, x: Tensor) -> Tensor:
        pooled: Tensor = self.pool(self.norm(self.conv(x)))
        return pooled
