"""The spherical family: losses that see a row of scores only through its sum, its square sum and the target's score.

Such a loss, and its gradient with respect to the output layer, can be computed at a cost that does not depend on the
number of classes: `postern.heads.FactoredLinear` does that. Here are the losses themselves, over rows of scores as any
loss, and over those three numbers.

Papers: "An Exploration of Softmax Alternatives Belonging to the Spherical Loss Family" (arXiv 1511.05042) for the
Taylor and the spherical softmax, "Efficient Exact Gradient Update for training Deep Networks with Very Large Sparse
Targets" (arXiv 1412.7091) for the family. Its latest member, the Z-loss, has a file of its own.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from postern.heads._linear import LinearHead
from postern.heads.protocol import check_hidden, check_target

Reduction = Literal["mean", "sum", "none"]
_REDUCTIONS = ("mean", "sum", "none")


class SphericalLoss(nn.Module):
    """A loss of scores ``o`` and a class ``c`` that is a function of ``sum_i o_i``, ``sum_i o_i^2`` and ``o_c`` alone.

    A subclass defines the function in `from_statistics`. As a module it takes rows of scores, in place of
    `torch.nn.CrossEntropyLoss`; it computes in float32 at least.

    Args:
        reduction: "mean" over the examples, "sum", or "none".

    Attributes:
        is_shift_invariant: whether adding a constant to all scores changes nothing. Rows are then centred first, so
            that no digits are lost in ``sum o^2`` where the mean is large.

    Raises:
        ValueError: an unknown reduction.
    """

    is_shift_invariant: bool = False

    def __init__(self, reduction: Reduction = "mean") -> None:
        super().__init__()
        if reduction not in _REDUCTIONS:
            raise ValueError(f"reduction must be one of {', '.join(_REDUCTIONS)}, got {reduction!r}")
        self.reduction: Reduction = reduction

    def from_statistics(
        self,
        total: Float[Tensor, "*batch"],
        square_total: Float[Tensor, "*batch"],
        target_score: Float[Tensor, "*batch"],
        num_classes: int,
    ) -> Float[Tensor, "*batch"]:
        """Return one loss an example, differentiable in all three statistics.

        Args:
            total: ``s``, the sum of an example's scores.
            square_total: ``q``, the sum of their squares.
            target_score: ``o_c``, the score of the true class.
            num_classes: ``D``, how many scores there are.
        """
        raise NotImplementedError

    def logits(self, scores: Float[Tensor, "*batch classes"]) -> Float[Tensor, "*batch classes"]:
        """Return what ranks the classes: the scores, unless the loss takes another class than the highest for best."""
        return scores

    def losses(self, scores: Float[Tensor, "*batch classes"], target: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """Return one loss an example, whatever the reduction.

        Raises:
            ValueError: see `forward`.
        """
        _check_scores(scores)
        check_target(scores, target)
        scores = _at_least_float32(scores)
        if self.is_shift_invariant:
            scores = scores - scores.mean(-1, keepdim=True)
        target_score = scores.gather(-1, target.long()[..., None])[..., 0]
        return self.from_statistics(scores.sum(-1), scores.square().sum(-1), target_score, scores.shape[-1])

    def forward(
        self, scores: Float[Tensor, "*batch classes"], target: Int[Tensor, "*batch"]
    ) -> Float[Tensor, "*reduced"]:
        """Return the loss.

        Args:
            scores: one score a class.
            target: indices of the true classes.

        Raises:
            ValueError: targets of another shape than the batch, or not integer; scores that are not floating point, or
                of fewer than two classes.
        """
        losses = self.losses(scores, target)
        if self.reduction == "none":
            return losses
        return losses.mean() if self.reduction == "mean" else losses.sum()


def log_taylor_softmax(scores: Float[Tensor, "*shape"], dim: int = -1) -> Float[Tensor, "*shape"]:
    """Return ``log( t(o_i) / sum_j t(o_j) )`` with ``t(o) = 1 + o + o^2 / 2``, the start of the exponential's series.

    ``t`` is at least 1/2, so all probabilities are positive. It is symmetric about -1: a score far below that is as
    probable as one far above.

    Args:
        scores: numbers of any shape; less than float32 is computed with in float32.
        dim: the dimension whose probabilities sum to one.

    Raises:
        ValueError: scores that are not floating point.
    """
    if not scores.is_floating_point():
        raise ValueError(f"scores must be floating point, got {scores.dtype}")
    terms = _taylor(_at_least_float32(scores))
    return (terms.log() - terms.sum(dim, keepdim=True).log()).to(scores.dtype)


class TaylorSoftmaxLoss(SphericalLoss):
    """Negative `log_taylor_softmax` of the true class: ``log(D + s + q / 2) - log(1 + o_c + o_c^2 / 2)``.

    Args:
        reduction: "mean" over the examples, "sum", or "none".

    Raises:
        ValueError: an unknown reduction.
    """

    def from_statistics(
        self,
        total: Float[Tensor, "*batch"],
        square_total: Float[Tensor, "*batch"],
        target_score: Float[Tensor, "*batch"],
        num_classes: int,
    ) -> Float[Tensor, "*batch"]:
        """Return one loss an example; see `SphericalLoss.from_statistics`."""
        return torch.log(num_classes + total + square_total / 2) - torch.log(_taylor(target_score))

    def logits(self, scores: Float[Tensor, "*batch classes"]) -> Float[Tensor, "*batch classes"]:
        """Return ``log(1 + o + o^2 / 2)``, whose softmax are the probabilities."""
        return torch.log(_taylor(scores))


class SphericalSoftmaxLoss(SphericalLoss):
    """Negative logarithm of the spherical softmax of the true class: ``log(q + D eps) - log(o_c^2 + eps)``.

    The probabilities ``(o_i^2 + eps) / (q + D eps)`` do not see the signs of the scores.

    Args:
        epsilon: added to each square, to be tuned. Without it a score of zero would cost infinitely much.
        reduction: "mean" over the examples, "sum", or "none".

    Raises:
        ValueError: an epsilon that is not positive, or an unknown reduction.
    """

    def __init__(self, epsilon: float = 1e-2, reduction: Reduction = "mean") -> None:
        super().__init__(reduction)
        if not epsilon > 0:
            raise ValueError(f"epsilon must be positive, got {epsilon}")
        self.epsilon = epsilon

    def from_statistics(
        self,
        total: Float[Tensor, "*batch"],
        square_total: Float[Tensor, "*batch"],
        target_score: Float[Tensor, "*batch"],
        num_classes: int,
    ) -> Float[Tensor, "*batch"]:
        """Return one loss an example; see `SphericalLoss.from_statistics`."""
        return torch.log(square_total + num_classes * self.epsilon) - torch.log(target_score.square() + self.epsilon)

    def logits(self, scores: Float[Tensor, "*batch classes"]) -> Float[Tensor, "*batch classes"]:
        """Return ``log(o^2 + eps)``, whose softmax are the probabilities."""
        return torch.log(scores.square() + self.epsilon)


class SquaredErrorLoss(SphericalLoss):
    """Squared distance of the scores to the one-hot target: ``||o - e_c||^2 = q - 2 o_c + 1``.

    The sum over the classes, not their mean as in `torch.nn.MSELoss`.

    Args:
        reduction: "mean" over the examples, "sum", or "none".

    Raises:
        ValueError: an unknown reduction.
    """

    def from_statistics(
        self,
        total: Float[Tensor, "*batch"],
        square_total: Float[Tensor, "*batch"],
        target_score: Float[Tensor, "*batch"],
        num_classes: int,
    ) -> Float[Tensor, "*batch"]:
        """Return one loss an example; see `SphericalLoss.from_statistics`."""
        return square_total - 2 * target_score + 1


class SphericalHead(LinearHead):
    """Linear scores ``W h + b`` with a loss of the spherical family, every score computed.

    For many classes, `postern.heads.FactoredSphericalHead` trains the same layer without computing them.

    Args:
        in_features: width of the hidden vectors.
        num_classes: number of classes, at least 2.
        criterion: the loss; its mean is taken, whatever its reduction.
        bias: whether there is a ``b``.

    Raises:
        ValueError: sizes that make no classifier.
    """

    def __init__(self, in_features: int, num_classes: int, criterion: SphericalLoss, bias: bool = True) -> None:
        super().__init__(in_features, num_classes, bias)
        self.criterion = criterion

    def logits(self, hidden: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch num_classes"]:
        """Return the scores, as the loss ranks them; see `SphericalLoss.logits`.

        Raises:
            ValueError: hidden vectors of another width, or not floating point.
        """
        return self.criterion.logits(super().logits(hidden))

    def loss(self, hidden: Float[Tensor, "*batch in_features"], target: Int[Tensor, "*batch"]) -> Float[Tensor, ""]:
        """Return the mean loss.

        Raises:
            ValueError: see `Head.loss`.
        """
        check_hidden(hidden, self.in_features)
        check_target(hidden, target)
        return self.criterion.losses(self.linear(hidden), target).mean()


class TaylorSoftmaxHead(SphericalHead):
    """Linear scores with `TaylorSoftmaxLoss`; the softmax of the logits is the Taylor softmax of the scores.

    Args:
        in_features: width of the hidden vectors.
        num_classes: number of classes, at least 2.
        bias: whether the linear layer has one.

    Raises:
        ValueError: sizes that make no classifier.
    """

    def __init__(self, in_features: int, num_classes: int, bias: bool = True) -> None:
        super().__init__(in_features, num_classes, TaylorSoftmaxLoss(), bias)


class SphericalSoftmaxHead(SphericalHead):
    """Linear scores with `SphericalSoftmaxLoss`; the softmax of the logits is the spherical softmax of the scores.

    Args:
        in_features: width of the hidden vectors.
        num_classes: number of classes, at least 2.
        bias: whether the linear layer has one.
        epsilon: added to each squared score.

    Raises:
        ValueError: sizes that make no classifier, or an epsilon that is not positive.
    """

    def __init__(self, in_features: int, num_classes: int, bias: bool = True, epsilon: float = 1e-2) -> None:
        super().__init__(in_features, num_classes, SphericalSoftmaxLoss(epsilon), bias)


def _taylor(scores: Tensor) -> Tensor:
    """``1 + o + o^2 / 2``, written so that it cannot fall below its minimum of 1/2."""
    return ((scores + 1).square() + 1) / 2


def _at_least_float32(scores: Tensor) -> Tensor:
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def _check_scores(scores: Tensor) -> None:
    if scores.dim() == 0 or scores.shape[-1] < 2:
        raise ValueError(f"scores need at least two classes in the last dimension, got the shape {tuple(scores.shape)}")
    if not scores.is_floating_point():
        raise ValueError(f"scores must be floating point, got {scores.dtype}")
