"""A multilayer perceptron with ReLU, for tables, flattened images and one-hot codes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from jaxtyping import Float
from torch import Tensor, nn


class MLP(nn.Module):
    """Linear layers with ReLU between them, and a linear head.

    Without biases it is positively homogeneous: scaling all parameters by ``c`` scales the logits by
    ``c ** (len(widths) + 1)``. Its parts are called ``stages.0``, ``stages.1``, ... and ``head``.

    Args:
        in_features: numbers in an input, after flattening.
        num_classes: number of logits.
        widths: widths of the hidden layers; none makes a linear model.
        bias: whether the layers have biases.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(
        self, in_features: int, num_classes: int, widths: Sequence[int] = (200, 200), bias: bool = True
    ) -> None:
        super().__init__()
        if min(in_features, num_classes, *widths) < 1:
            raise ValueError(
                "features, classes and widths are positive, "
                f"got in_features={in_features}, num_classes={num_classes}, widths={list(widths)}"
            )
        sizes = [in_features, *widths]
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Linear(before, after, bias=bias), nn.ReLU()) for before, after in pairwise(sizes)
        )
        self.head = nn.Linear(sizes[-1], num_classes, bias=bias)

    def features(self, inputs: Float[Tensor, batch * shape]) -> Float[Tensor, "batch width"]:
        """Return what the head sees: the last hidden layer."""
        hidden = inputs.flatten(1)
        for stage in self.stages:
            hidden = stage(hidden)
        return hidden

    def forward(self, inputs: Float[Tensor, batch * shape]) -> Float[Tensor, "batch classes"]:
        """Return the logits."""
        logits: Tensor = self.head(self.features(inputs))
        return logits
