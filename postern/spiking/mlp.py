"""The feed-forward half of a block of a spiking transformer.

Paper: "Spiking Neural Networks Need High-Frequency Information", arXiv 2505.18608.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from postern.spiking.neurons import LIF
from postern.spiking.time_steps import ConvNorm


class SpikingMLP(nn.Module):
    """``x + BN(W LIF(BN(W LIF(x))))``, the same at each position.

    Args:
        dim: channels.
        hidden_dim: channels in between.

    Raises:
        ValueError: sizes below 1.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            LIF(), ConvNorm(dim, hidden_dim, 1, bias=True), LIF(), ConvNorm(hidden_dim, dim, 1, bias=True)
        )

    def forward(self, x: Float[Tensor, "time batch dim height width"]) -> Float[Tensor, "time batch dim height width"]:
        """Return the membrane signal."""
        membrane: Tensor = x + self.layers(x)
        return membrane
