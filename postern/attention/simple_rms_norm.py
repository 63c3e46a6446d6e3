"""A normalisation without parameters: each vector divided by its root mean square.

Paper: "Scaling TransNormer to 175 Billion Parameters", arXiv 2307.14995.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from postern.precision import without_autocast


def simple_rms_norm(x: Float[Tensor, "*batch width"], eps: float = 1e-6) -> Float[Tensor, "*batch width"]:
    """``x / sqrt(mean(x^2) + eps)`` over the last dimension, computed in float32 at least, in the dtype of x.

    Args:
        x: vectors.
        eps: keeps a vector of zeros from being divided by 0.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    with without_autocast(x.device):
        return F.rms_norm(x.to(dtype), x.shape[-1:], eps=eps).to(x.dtype)


class SimpleRMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps)`` over the last dimension; see `simple_rms_norm`. It has no parameters.

    Args:
        eps: see `simple_rms_norm`.

    Raises:
        ValueError: eps below 0.
    """

    def __init__(self, eps: float = 1e-6) -> None:
        super().__init__()
        if not eps >= 0:
            raise ValueError(f"eps must be at least 0, got {eps}")
        self.eps = eps

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """Return the normalised vectors."""
        return simple_rms_norm(x, self.eps)

    def extra_repr(self) -> str:
        """Return what the printed module says of its settings."""
        return f"eps={self.eps:g}"
