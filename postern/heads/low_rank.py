"""The low-rank head: an output matrix of ``rank * (features + classes)`` numbers, the plain rival of codebooks."""

from __future__ import annotations

from typing import Self

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from postern.heads.protocol import check_hidden, check_target


class LowRankHead(nn.Module):
    """Logits ``z = U V h + b`` with the cross-entropy ``-log softmax(z)_y``.

    Args:
        in_features: width of the hidden vectors.
        num_classes: number of classes, at least 2.
        rank: rows of V, columns of U.
        bias: whether there is a ``b``.

    Raises:
        ValueError: sizes that make no classifier, or a rank below 1 or above both of them.
    """

    def __init__(self, in_features: int, num_classes: int, rank: int, bias: bool = True) -> None:
        super().__init__()
        if in_features < 1 or num_classes < 2 or not 1 <= rank <= min(in_features, num_classes):
            raise ValueError(
                "a low-rank head needs in_features >= 1, num_classes >= 2 and a rank between 1 and both, "
                f"got {in_features}, {num_classes} and {rank}"
            )
        self.in_features = in_features
        self.num_classes = num_classes
        self.rank = rank
        self.down = nn.Linear(in_features, rank, bias=False)
        self.up = nn.Linear(rank, num_classes, bias=bias)

    @classmethod
    def from_linear(cls, linear: nn.Linear, rank: int) -> Self:
        """Compress a trained output layer by its largest singular values; the bias is kept.

        Raises:
            ValueError: a rank below 1 or above the matrix's sides.
        """
        head = cls(linear.in_features, linear.out_features, rank, linear.bias is not None).to(linear.weight)
        with torch.no_grad():
            dtype = torch.promote_types(linear.weight.dtype, torch.float32)
            left, values, right = torch.linalg.svd(linear.weight.to(dtype), full_matrices=False)
            roots = values[:rank].sqrt()
            head.up.weight.copy_(left[:, :rank] * roots)
            head.down.weight.copy_(roots[:, None] * right[:rank])
            if linear.bias is not None:
                head.up.bias.copy_(linear.bias)
        return head

    def logits(self, hidden: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch num_classes"]:
        """Return ``U V h + b``.

        Raises:
            ValueError: hidden vectors of another width, or not floating point.
        """
        check_hidden(hidden, self.in_features)
        logits: Tensor = self.up(self.down(hidden))
        return logits

    def forward(self, hidden: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch num_classes"]:
        """Return the logits."""
        return self.logits(hidden)

    def loss(self, hidden: Float[Tensor, "*batch in_features"], target: Int[Tensor, "*batch"]) -> Float[Tensor, ""]:
        """Return the mean of ``-log softmax(z)_y``.

        Raises:
            ValueError: see `Head.loss`.
        """
        check_target(hidden, target)
        logits = self.logits(hidden).reshape(-1, self.num_classes)
        return nn.functional.cross_entropy(logits, target.reshape(-1).long())
