"""What heads share whose logits are linear in the hidden vectors."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from postern.heads.protocol import check_hidden


class LinearHead(nn.Module):
    """Linear logits ``z = W h + b``, without a loss.

    Args:
        in_features: width of the hidden vectors.
        num_classes: number of classes, at least 2.
        bias: whether there is a ``b``.

    Raises:
        ValueError: sizes that make no classifier.
    """

    def __init__(self, in_features: int, num_classes: int, bias: bool = True) -> None:
        super().__init__()
        if in_features < 1 or num_classes < 2:
            raise ValueError(f"a head needs in_features >= 1 and num_classes >= 2, got {in_features} and {num_classes}")
        self.in_features = in_features
        self.num_classes = num_classes
        self.linear = nn.Linear(in_features, num_classes, bias=bias)

    def logits(self, hidden: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch num_classes"]:
        """Return ``W h + b``.

        Raises:
            ValueError: hidden vectors of another width, or not floating point.
        """
        check_hidden(hidden, self.in_features)
        logits: Tensor = self.linear(hidden)
        return logits

    def forward(self, hidden: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch num_classes"]:
        """Return the logits."""
        return self.logits(hidden)
