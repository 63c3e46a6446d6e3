"""Simple gated linear units: a feed-forward block whose only non-linearity is the product of its two halves.

Papers: "Scaling TransNormer to 175 Billion Parameters", arXiv 2307.14995; with an activation "GLU Variants Improve
Transformer", arXiv 2002.05202.
"""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn


class SGLU(nn.Module):
    """``W_o ((W_v x) * activation(W_u x))``; SGLU has no activation, SwiGLU has `torch.nn.functional.silu`.

    ``W_v`` and ``W_u`` are the halves of one matrix.

    Args:
        width: features of a token.
        hidden_dim: features of the product; by default twice the width.
        activation: of the second factor; None for the identity.
        bias: whether the projections have one.

    Raises:
        ValueError: sizes below 1.
    """

    def __init__(
        self,
        width: int,
        hidden_dim: int | None = None,
        *,
        activation: Callable[[Tensor], Tensor] | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        hidden_dim = 2 * width if hidden_dim is None else hidden_dim
        if width < 1 or hidden_dim < 1:
            raise ValueError(f"sizes are positive, got width={width}, hidden_dim={hidden_dim}")
        self.activation = activation
        self.expand = nn.Linear(width, 2 * hidden_dim, bias=bias)
        self.contract = nn.Linear(hidden_dim, width, bias=bias)

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """Return the block's output."""
        value, gate = self.expand(x).chunk(2, dim=-1)
        if self.activation is not None:
            gate = self.activation(gate)
        output: Tensor = self.contract(value * gate)
        return output
