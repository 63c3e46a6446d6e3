"""Linearised relative positions: products of queries and keys that depend on their distance, for linear attention.

Papers: "Linearized Relative Positional Encoding", arXiv 2307.09270; "Scaling TransNormer to 175 Billion Parameters",
arXiv 2307.14995. With a decay by head the latter calls it LRPE-d.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn


class LRPE(nn.Module):
    """``x_n -> [x_n cos(n theta), x_n sin(n theta)]``: each feature turns in a plane of its own.

    Queries and keys so turned have the product ``sum_j q_j k_j cos(theta_j (s - t))``. They have twice the features,
    and so has the state of linear attention. The angles are parameters, one a head and feature; they start at
    ``base^(-2 j / (num_heads head_dim))``, with j counting the features of all heads.

    Args:
        num_heads: number of heads.
        head_dim: features of a head.
        base: of the angles that it starts with.
        is_learnable: whether the angles are trained.

    Raises:
        ValueError: sizes below 1, or a base that is not positive.
    """

    def __init__(self, num_heads: int, head_dim: int, *, base: float = 10_000.0, is_learnable: bool = True) -> None:
        super().__init__()
        if num_heads < 1 or head_dim < 1 or not base > 0:
            raise ValueError(f"sizes and base are positive, got {num_heads}, {head_dim} and {base}")
        self.base = base
        self.angle = nn.Parameter(torch.empty(num_heads, head_dim), requires_grad=is_learnable)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the angles back to where they start."""
        with torch.no_grad():
            index = torch.arange(self.angle.numel(), device=self.angle.device, dtype=torch.float32)
            self.angle.copy_(self.base ** (-2 * index.view_as(self.angle) / index.numel()))

    def forward(
        self, x: Float[Tensor, "batch heads time head_dim"], start: int = 0
    ) -> Float[Tensor, "batch heads time features"]:
        """Turn queries or keys by their positions; the result has twice their features.

        Args:
            x: queries or keys.
            start: position of the first.

        Raises:
            ValueError: other heads.
        """
        if x.dim() != 4 or (x.shape[1], x.shape[3]) != self.angle.shape:
            heads, dim = self.angle.shape
            raise ValueError(f"needs queries or keys of shape [batch, {heads}, time, {dim}], got {list(x.shape)}")
        # in float32 at least: 16 bits know no position beyond some hundreds
        dtype = torch.promote_types(x.dtype, torch.float32)
        positions = torch.arange(start, start + x.shape[2], device=x.device, dtype=dtype)
        angles = positions[:, None] * self.angle.to(dtype)[:, None]
        return torch.cat([x * angles.cos().to(x.dtype), x * angles.sin().to(x.dtype)], dim=-1)

    def extra_repr(self) -> str:
        """Return what the printed module says of its settings."""
        return f"num_heads={self.angle.shape[0]}, head_dim={self.angle.shape[1]}"
