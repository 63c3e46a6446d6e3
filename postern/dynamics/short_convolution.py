"""A causal convolution a channel over the last few tokens, which recurrent layers put before their recurrence."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from postern.dynamics.recurrent_state import RecurrentState


class ShortConvolution(nn.Module):
    """``y_t[c] = bias[c] + sum_{j < kernel} weight[c, kernel - 1 - j] x_{t-j}[c]``, with zeros before the first token.

    Args:
        channels: features of a token.
        kernel: how many tokens, at least 1.

    Raises:
        ValueError: sizes below 1.
    """

    def __init__(self, channels: int, kernel: int = 4) -> None:
        super().__init__()
        if channels < 1 or kernel < 1:
            raise ValueError(f"channels and kernel are at least 1, got {channels} and {kernel}")
        self.kernel = kernel
        self.weight = nn.Parameter(torch.empty(channels, kernel))
        self.bias = nn.Parameter(torch.empty(channels))
        bound = kernel**-0.5  # as torch.nn.Conv1d does
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(
        self, x: Float[Tensor, "batch time channels"], cache: RecurrentState | None = None
    ) -> Float[Tensor, "batch time channels"]:
        """Convolve; ``cache.recent`` holds the tokens before and is changed in place."""
        channels_first = x.transpose(1, 2)
        before = None if cache is None else cache.recent
        if before is None:
            before = channels_first.new_zeros(*channels_first.shape[:2], self.kernel - 1)
        extended = torch.cat([before.to(x.dtype), channels_first], dim=2)
        if cache is not None:
            cache.recent = extended[:, :, extended.shape[2] - (self.kernel - 1) :]
        convolved = F.conv1d(extended, self.weight.unsqueeze(1), self.bias, groups=self.weight.shape[0])
        return convolved.transpose(1, 2)

    def extra_repr(self) -> str:
        """Return what the printed module says of its settings."""
        return f"channels={self.weight.shape[0]}, kernel={self.kernel}"
