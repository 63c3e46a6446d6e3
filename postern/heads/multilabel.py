"""Losses for queries that have several of very many labels: decoupled softmax, and what it is measured against.

A softmax over several positives has each of them in the denominator of the others, so that an easy positive whose
probability exceeds its share ``1 / |P|`` is pushed down. Decoupled softmax leaves the other positives out.

Paper: "Dual-Encoders for Extreme Multi-Label Classification" (arXiv 2310.10636), section 3. Its code divides the
plain softmax by the batch alone where all positives are used; here every loss but the last is a mean over positives,
then over queries. A label whose score is -inf is neither positive nor negative; the code writes -100, which scores
that are not normalised fall below.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from postern.heads._positives import (
    Reduction,
    Targets,
    at_least_float32,
    check_reduction,
    mean_over_positives,
    positives_in,
    reduce,
)


def decoupled_softmax_loss(
    scores: Float[Tensor, "queries labels"],
    targets: Targets,
    *,
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Float[Tensor, "*reduced"]:
    r"""Return ``-1/|P_i| sum_{j in P_i} log( e^{s_ij} / (e^{s_ij} + sum_{l not in P_i} e^{s_il}) )``.

    With ``D_i`` the logsumexp over the negatives, each term is ``softplus(D_i - s_ij)``; its gradient on a positive,
    ``-sigmoid(D_i - s_ij) / |P_i|``, is never positive. Computed in float32 at least.

    Args:
        scores: one score a label, already divided by the temperature. -inf leaves a label out.
        targets: a matrix of the same shape, positive where above 0; or the pairs ``(rows, columns)``, each once; or a
            sparse matrix of torch or SciPy. Pairs never become a matrix.
        weights: of the positives' terms: a matrix for a matrix, one number a pair for pairs, in their order.
        reduction: "mean" over the queries that have positives, "sum", or "none"; queries without positives give 0.

    Raises:
        ValueError: scores that are no matrix, targets or weights that do not fit, an unknown reduction.
    """
    check_reduction(reduction)
    positives, scores = positives_in(scores, targets), at_least_float32(scores)
    negatives = positives.removed_from(scores).logsumexp(1)
    totals = positives.sum(lambda score, negative: F.softplus(negative - score), scores, negatives, weights)
    counts = positives.counts()
    return reduce(mean_over_positives(totals, counts), counts, reduction)


def multilabel_softmax_loss(
    scores: Float[Tensor, "queries labels"],
    targets: Targets,
    *,
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Float[Tensor, "*reduced"]:
    r"""Return ``-1/|P_i| sum_{j in P_i} log( e^{s_ij} / sum_l e^{s_il} )``, the softmax with coupled positives.

    Its gradient on a positive, ``softmax_ij - 1/|P_i|``, is zero where every positive has its share, and positive
    beyond. Known as InfoNCE or the supervised contrastive loss where the labels are those of the batch.

    Args:
        scores: one score a label, already divided by the temperature. -inf leaves a label out.
        targets: see `decoupled_softmax_loss`.
        weights: see `decoupled_softmax_loss`.
        reduction: "mean" over the queries that have positives, "sum", or "none".

    Raises:
        ValueError: see `decoupled_softmax_loss`.
    """
    check_reduction(reduction)
    positives, scores = positives_in(scores, targets), at_least_float32(scores)
    totals = positives.sum(lambda score, all_: all_ - score, scores, scores.logsumexp(1), weights)
    counts = positives.counts()
    return reduce(mean_over_positives(totals, counts), counts, reduction)


def ova_bce_loss(
    scores: Float[Tensor, "queries labels"], targets: Targets, *, reduction: Reduction = "mean"
) -> Float[Tensor, "*reduced"]:
    """Return ``1/L (sum_l softplus(s_il) - sum_{j in P_i} s_ij)``: a two-class problem for each label.

    Args:
        scores: one score a label. -inf leaves a label out.
        targets: see `decoupled_softmax_loss`.
        reduction: "mean" over all queries, since those without positives have negatives to learn from; "sum", "none".

    Raises:
        ValueError: see `decoupled_softmax_loss`.
    """
    check_reduction(reduction)
    positives, scores = positives_in(scores, targets), at_least_float32(scores)
    of_query = scores.new_zeros(len(scores))
    totals = F.softplus(scores).sum(1) - positives.sum(lambda score, _: score, scores, of_query, None)
    losses = totals / scores.shape[1]
    if reduction == "none":
        return losses
    return losses.mean() if reduction == "mean" else losses.sum()


class DecoupledSoftmaxLoss(nn.Module):
    """`decoupled_softmax_loss` as a module.

    Args:
        reduction: "mean", "sum" or "none".

    Raises:
        ValueError: an unknown reduction.
    """

    def __init__(self, reduction: Reduction = "mean") -> None:
        super().__init__()
        check_reduction(reduction)
        self.reduction: Reduction = reduction

    def forward(
        self, scores: Float[Tensor, "queries labels"], targets: Targets, weights: Tensor | None = None
    ) -> Float[Tensor, "*reduced"]:
        """Return the loss; see `decoupled_softmax_loss`."""
        return decoupled_softmax_loss(scores, targets, weights=weights, reduction=self.reduction)


class MultiLabelSoftmaxLoss(nn.Module):
    """`multilabel_softmax_loss` as a module.

    Args:
        reduction: "mean", "sum" or "none".

    Raises:
        ValueError: an unknown reduction.
    """

    def __init__(self, reduction: Reduction = "mean") -> None:
        super().__init__()
        check_reduction(reduction)
        self.reduction: Reduction = reduction

    def forward(
        self, scores: Float[Tensor, "queries labels"], targets: Targets, weights: Tensor | None = None
    ) -> Float[Tensor, "*reduced"]:
        """Return the loss; see `multilabel_softmax_loss`."""
        return multilabel_softmax_loss(scores, targets, weights=weights, reduction=self.reduction)


class OneVersusAllLoss(nn.Module):
    """`ova_bce_loss` as a module.

    Args:
        reduction: "mean", "sum" or "none".

    Raises:
        ValueError: an unknown reduction.
    """

    def __init__(self, reduction: Reduction = "mean") -> None:
        super().__init__()
        check_reduction(reduction)
        self.reduction: Reduction = reduction

    def forward(self, scores: Float[Tensor, "queries labels"], targets: Targets) -> Float[Tensor, "*reduced"]:
        """Return the loss; see `ova_bce_loss`."""
        return ova_bce_loss(scores, targets, reduction=self.reduction)
