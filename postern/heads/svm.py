"""The support vector machine as an output layer: linear scores, trained by a one-vs-rest squared hinge.

Paper: "An Architecture Combining Convolutional Neural Network (CNN) and Support Vector Machine (SVM) for Image
Classification" (arXiv 1712.03541), after "Deep Learning using Linear Support Vector Machines" (arXiv 1306.0239). The
paper states sums, its code computes means; both are here. The code predicts by the signs of the scores; that rule is
here for comparison only.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from postern.heads._linear import LinearHead
from postern.heads.protocol import check_target

Reduction = Literal["mean", "sum"]
Rule = Literal["argmax", "sign_argmax"]


def one_vs_rest_hinge(
    scores: Float[Tensor, "batch classes"],
    target: Int[Tensor, " batch"] | Int[Tensor, "batch classes"] | Bool[Tensor, "batch classes"],
    *,
    power: int = 2,
    margin: float = 1.0,
    reduction: Reduction = "mean",
) -> Float[Tensor, ""]:
    """Return the hinge losses ``max(0, margin - t f)^power``, reduced over batch and classes.

    Each class is a two-class problem of its own: ``t = +1`` for the samples that have it and ``-1`` for the rest. The
    gradient of the squared hinge, ``-2 t max(0, margin - t f)``, is continuous and zero beyond the margin.

    Args:
        scores: one score f a class.
        target: class indices, or an indicator matrix of 0 and 1 where a sample may have several classes.
        power: 2 for the L2-SVM of the paper, 1 for the L1-SVM.
        margin: the score beyond which a sample costs nothing.
        reduction: "mean" over batch and classes, as the paper's code, or "sum", as its equation.

    Raises:
        ValueError: scores that are no matrix, targets that do not fit, or an unknown power or reduction.
        RuntimeError: a class index below 0 or beyond the last class.
    """
    _check(power, margin, reduction)
    if scores.dim() != 2 or scores.numel() == 0:
        raise ValueError(f"scores must be [batch, classes] and not empty, got the shape {tuple(scores.shape)}")
    losses = (margin - _signs(scores, target) * scores).clamp_min(0)
    if power == 2:
        losses = losses.square()
    return losses.mean() if reduction == "mean" else losses.sum()


def svm_predict(scores: Float[Tensor, "*batch classes"], rule: Rule = "argmax") -> Int[Tensor, "*batch"]:
    """Return the predicted class of each row of scores.

    Args:
        scores: one score a class.
        rule: "argmax", the class with the highest score. "sign_argmax" reproduces the evaluation of the paper's code:
            the first class whose score is positive, and class 0 if none is. It throws the sizes of the scores away.

    Raises:
        ValueError: an unknown rule, or scores without classes.
    """
    if scores.dim() == 0 or scores.shape[-1] == 0:
        raise ValueError(f"scores need at least one class, got the shape {tuple(scores.shape)}")
    if rule == "argmax":
        return scores.argmax(-1)
    if rule != "sign_argmax":
        raise ValueError(f"rule must be argmax or sign_argmax, got {rule!r}")
    signs = scores.sign()
    classes = torch.arange(scores.shape[-1], device=scores.device)
    best = signs == signs.amax(-1, keepdim=True)
    return torch.where(best, classes, scores.shape[-1]).amin(-1)


class L2SVMLoss(nn.Module):
    """`one_vs_rest_hinge` times a penalty, as a module in place of `torch.nn.CrossEntropyLoss`.

    Args:
        penalty: the SVM's C, the weight of the hinge against the regulariser.
        power: 2 for the squared hinge, 1 for the plain one.
        reduction: "mean" or "sum".
        margin: the score beyond which a sample costs nothing.

    Raises:
        ValueError: a penalty or margin that is not positive, an unknown power or reduction.
    """

    def __init__(
        self, penalty: float = 1.0, power: int = 2, reduction: Reduction = "mean", margin: float = 1.0
    ) -> None:
        super().__init__()
        _check(power, margin, reduction, penalty)
        self.penalty = penalty
        self.power = power
        self.reduction: Reduction = reduction
        self.margin = margin

    def forward(
        self,
        scores: Float[Tensor, "batch classes"],
        target: Int[Tensor, " batch"] | Int[Tensor, "batch classes"] | Bool[Tensor, "batch classes"],
    ) -> Float[Tensor, ""]:
        """Return ``penalty * hinge``; see `one_vs_rest_hinge`."""
        hinge = one_vs_rest_hinge(scores, target, power=self.power, margin=self.margin, reduction=self.reduction)
        return self.penalty * hinge


class SVMHead(LinearHead):
    """Linear scores ``f = W h + b`` with the objective of a linear SVM, one class against the rest.

    With ``reduction="sum"``, the paper's equation: ``1/2 ||W||^2 + C sum_i sum_c max(0, 1 - t_ic f_ic)^2``.
    With ``"mean"``, its code: ``mean(W^2) + C mean_ic max(0, 1 - t_ic f_ic)^2``, where the regulariser weighs next to
    nothing. The bias is not regularised.

    Args:
        in_features: width of the hidden vectors.
        num_classes: number of classes, at least 2.
        bias: whether there is a ``b``.
        penalty: the SVM's C.
        power: 2 for the squared hinge, 1 for the plain one.
        reduction: "mean" or "sum".
        margin: the score beyond which a sample costs nothing.

    Raises:
        ValueError: sizes that make no classifier, or see `L2SVMLoss`.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        bias: bool = True,
        penalty: float = 1.0,
        power: int = 2,
        reduction: Reduction = "mean",
        margin: float = 1.0,
    ) -> None:
        super().__init__(in_features, num_classes, bias)
        self.hinge = L2SVMLoss(penalty, power, reduction, margin)

    def regularizer(self) -> Float[Tensor, ""]:
        """Return ``mean(W^2)`` or ``1/2 ||W||^2``, as the reduction says."""
        squares = self.linear.weight.square()
        return squares.mean() if self.hinge.reduction == "mean" else squares.sum() / 2

    def loss(self, hidden: Float[Tensor, "*batch in_features"], target: Int[Tensor, "*batch"]) -> Float[Tensor, ""]:
        """Return the regularised hinge loss.

        Raises:
            ValueError: see `Head.loss`.
        """
        check_target(hidden, target)
        scores = self.logits(hidden).reshape(-1, self.num_classes)
        hinge: Tensor = self.hinge(scores, target.reshape(-1))
        return self.regularizer() + hinge


def _signs(scores: Tensor, target: Tensor) -> Tensor:
    """Targets as -1 and +1, without touching the caller's tensor."""
    if target.is_floating_point() or target.is_complex():
        raise ValueError(f"targets must be class indices or 0 and 1, of an integer type, got {target.dtype}")
    if target.shape == scores.shape[:1]:
        return (-torch.ones_like(scores)).scatter(1, target[:, None].long(), 1.0)
    if target.shape != scores.shape:
        raise ValueError(
            f"scores of shape {tuple(scores.shape)} need targets of shape {tuple(scores.shape[:1])} or "
            f"{tuple(scores.shape)}, got {tuple(target.shape)}"
        )
    return (target == 1).to(scores.dtype) * 2 - 1


def _check(power: int, margin: float, reduction: str, penalty: float = 1.0) -> None:
    if power not in (1, 2):
        raise ValueError(f"power must be 1 or 2, got {power}")
    if not margin > 0 or not penalty > 0:
        raise ValueError(f"margin and penalty must be positive, got {margin} and {penalty}")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be mean or sum, got {reduction!r}")
