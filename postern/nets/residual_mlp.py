"""A residual multilayer perceptron for tables: as deep as one likes, all blocks of one width."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """``x + W_2 gelu(W_1 layer_norm(x))``.

    Args:
        width: features of the input and the output.
        hidden: features between.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)
        )

    def forward(self, hidden: Float[Tensor, "batch width"]) -> Float[Tensor, "batch width"]:
        """Return the block's output."""
        output: Tensor = hidden + self.residual(hidden)
        return output


class ResidualMLP(nn.Module):
    """Linear stem, residual blocks, layer normalisation, linear head.

    Its parts are called ``stem``, ``blocks.0``, ``blocks.1``, ..., ``norm`` and ``head``; ``layers`` lists the blocks.

    Args:
        in_features: numbers in an input, after flattening.
        num_classes: number of logits.
        width: features between the blocks.
        depth: number of blocks.
        expansion: hidden features of a block for each of ``width``.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, in_features: int, num_classes: int, width: int = 32, depth: int = 6, expansion: int = 2) -> None:
        super().__init__()
        sizes = {
            "in_features": in_features,
            "num_classes": num_classes,
            "width": width,
            "depth": depth,
            "expansion": expansion,
        }
        if min(sizes.values()) < 1:
            raise ValueError(f"sizes are positive, got {sizes}")
        self.stem = nn.Linear(in_features, width)
        self.blocks = nn.ModuleList(ResidualBlock(width, expansion * width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    @property
    def layers(self) -> list[str]:
        """Names of the blocks, first to last."""
        return [f"blocks.{index}" for index in range(len(self.blocks))]

    def features(self, inputs: Float[Tensor, batch * shape]) -> Float[Tensor, "batch width"]:
        """Return what the head sees."""
        hidden = self.stem(inputs.flatten(1))
        for block in self.blocks:
            hidden = block(hidden)
        normalised: Tensor = self.norm(hidden)
        return normalised

    def forward(self, inputs: Float[Tensor, batch * shape]) -> Float[Tensor, "batch classes"]:
        """Return the logits."""
        logits: Tensor = self.head(self.features(inputs))
        return logits
