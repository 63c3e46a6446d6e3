"""The softmax head: a linear layer and cross-entropy, the baseline of every other head."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor, nn

from postern.heads._linear import LinearHead
from postern.heads.protocol import check_target


class SoftmaxHead(LinearHead):
    """Linear logits ``z = W h + b`` with the cross-entropy ``-log softmax(z)_y``.

    Args:
        in_features: width of the hidden vectors.
        num_classes: number of classes, at least 2.
        bias: whether there is a ``b``.

    Raises:
        ValueError: sizes that make no classifier.
    """

    def loss(self, hidden: Float[Tensor, "*batch in_features"], target: Int[Tensor, "*batch"]) -> Float[Tensor, ""]:
        """Return the mean of ``-log softmax(z)_y``.

        Raises:
            ValueError: see `Head.loss`.
        """
        check_target(hidden, target)
        logits = self.logits(hidden).reshape(-1, self.num_classes)
        return nn.functional.cross_entropy(logits, target.reshape(-1).long())
