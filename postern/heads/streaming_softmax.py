"""Decoupled softmax over all labels, without the matrix of all scores.

For a million labels and 3000 queries the scores alone take 12 GB, and their gradient as much again. The loss needs two
things of them: the scores of the positives, and each query's logsumexp over the negatives, whose gradient is a softmax
that can be recomputed. So blocks of labels are scored one at a time, forward and again backward: memory for
``queries x block`` scores in place of ``queries x labels``.

Paper: "Dual-Encoders for Extreme Multi-Label Classification" (arXiv 2310.10636), which shards the scores over GPUs
instead. Positives are masked within their block; subtracting them from a logsumexp that has them would cancel.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from postern.heads._positives import (
    Reduction,
    Targets,
    at_least_float32,
    check_reduction,
    mean_over_positives,
    pairs_of,
    reduce,
)
from postern.precision import without_autocast


def streaming_decoupled_softmax_loss(
    queries: Float[Tensor, "queries dim"],
    labels: Float[Tensor, "labels dim"],
    targets: Targets,
    *,
    excluded: Targets | None = None,
    tau: float = 1.0,
    weights: Float[Tensor, " pairs"] | None = None,
    reduction: Reduction = "mean",
    block: int = 8192,
) -> Float[Tensor, "*reduced"]:
    """Return `decoupled_softmax_loss` of the scores ``queries @ labels.T / tau``, which are never all there at once.

    Computed in float32 at least, also under autocast. Differentiable once.

    Args:
        queries: embeddings of the queries.
        labels: embeddings of all labels that are negatives or positives.
        targets: pairs ``(rows, columns)``, each once, or a sparse matrix of torch or SciPy.
        excluded: pairs that are neither positive nor negative.
        tau: temperature.
        weights: of the pairs' terms.
        reduction: "mean" over the queries that have positives, "sum", or "none".
        block: labels whose scores are there at once.

    Raises:
        ValueError: embeddings that do not fit each other, targets that are no pairs or do not fit, a tau or block that
            is not positive, an unknown reduction.
    """
    return _loss(queries, labels, targets, excluded, tau, weights, reduction, block, is_decoupled=True)


def streaming_multilabel_softmax_loss(
    queries: Float[Tensor, "queries dim"],
    labels: Float[Tensor, "labels dim"],
    targets: Targets,
    *,
    excluded: Targets | None = None,
    tau: float = 1.0,
    weights: Float[Tensor, " pairs"] | None = None,
    reduction: Reduction = "mean",
    block: int = 8192,
) -> Float[Tensor, "*reduced"]:
    """Return `multilabel_softmax_loss` of the scores ``queries @ labels.T / tau``, without their matrix.

    Args:
        queries: embeddings of the queries.
        labels: embeddings of all labels.
        targets: see `streaming_decoupled_softmax_loss`.
        excluded: see `streaming_decoupled_softmax_loss`.
        tau: temperature.
        weights: of the pairs' terms.
        reduction: "mean" over the queries that have positives, "sum", or "none".
        block: labels whose scores are there at once.

    Raises:
        ValueError: see `streaming_decoupled_softmax_loss`.
    """
    return _loss(queries, labels, targets, excluded, tau, weights, reduction, block, is_decoupled=False)


def _loss(
    queries: Tensor,
    labels: Tensor,
    targets: Targets,
    excluded: Targets | None,
    tau: float,
    weights: Tensor | None,
    reduction: Reduction,
    block: int,
    *,
    is_decoupled: bool,
) -> Tensor:
    check_reduction(reduction)
    if queries.dim() != 2 or labels.dim() != 2 or queries.shape[1] != labels.shape[1] or not len(labels):
        raise ValueError(
            f"embeddings are [queries, dim] and [labels, dim] with at least one label, "
            f"got {list(queries.shape)} and {list(labels.shape)}"
        )
    if not 0 < tau < float("inf") or block < 1:
        raise ValueError(f"tau and block must be positive, got {tau} and {block}")
    pairs = pairs_of(targets, len(queries), len(labels))
    masked = [pairs] if is_decoupled else []
    if excluded is not None:
        masked.append(pairs_of(excluded, len(queries), len(labels)))
    no_pairs = pairs.rows[:0]
    masked_rows = torch.cat([no_pairs, *(part.rows for part in masked)])
    masked_columns = torch.cat([no_pairs, *(part.columns for part in masked)])
    queries, labels = at_least_float32(queries), at_least_float32(labels)
    with without_autocast(queries.device):
        scores, of_query = _Streamed.apply(  # type: ignore[no-untyped-call]
            queries, labels, pairs.rows, pairs.columns, masked_rows, masked_columns, 1 / tau, block
        )
    gaps = of_query[pairs.rows] - scores
    terms = F.softplus(gaps) if is_decoupled else gaps
    counts = pairs.counts()
    return reduce(mean_over_positives(pairs.sum_of_pairs(terms, weights), counts), counts, reduction)


class _Streamed(torch.autograd.Function):
    """The scores of some pairs, and each query's logsumexp over the labels that are not masked (-inf without any).

    Both at once, since two functions would make two gradients of the size of all labels' embeddings.
    """

    @staticmethod
    def forward(
        ctx: Any,
        queries: Float[Tensor, "queries dim"],
        labels: Float[Tensor, "labels dim"],
        rows: Int[Tensor, " pairs"],
        columns: Int[Tensor, " pairs"],
        masked_rows: Int[Tensor, " masked"],
        masked_columns: Int[Tensor, " masked"],
        scale: float,
        block: int,
    ) -> tuple[Float[Tensor, " pairs"], Float[Tensor, " queries"]]:
        of_query = queries.new_full((len(queries),), -torch.inf)
        for start in range(0, len(labels), block):
            scores = _scores(queries, labels[start : start + block], masked_rows, masked_columns - start, scale)
            of_query = torch.logaddexp(of_query, scores.logsumexp(1))
        ctx.save_for_backward(queries, labels, rows, columns, masked_rows, masked_columns, of_query)
        ctx.scale, ctx.block = scale, block
        return (queries[rows] * labels[columns]).sum(1) * scale, of_query

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, of_scores: Float[Tensor, " pairs"], of_query: Float[Tensor, " queries"]
    ) -> tuple[Tensor | None, ...]:
        queries, labels, rows, columns, masked_rows, masked_columns, result = ctx.saved_tensors
        of_queries, of_labels = torch.zeros_like(queries), torch.empty_like(labels)
        # No negatives, no gradient: exp(-inf - 0) is 0.
        result = torch.where(result.isfinite(), result, 0.0)
        of_query, of_scores = (of_query * ctx.scale)[:, None], (of_scores * ctx.scale)[:, None]
        for start in range(0, len(labels), ctx.block):
            part = slice(start, start + ctx.block)
            scores = _scores(queries, labels[part], masked_rows, masked_columns - start, ctx.scale)
            of_block = scores.sub_(result[:, None]).exp_().mul_(of_query)
            of_queries += of_block @ labels[part]
            of_labels[part] = of_block.T @ queries
        of_queries.index_add_(0, rows, of_scores * labels[columns])
        of_labels.index_add_(0, columns, of_scores * queries[rows])
        return of_queries, of_labels, None, None, None, None, None, None


def _scores(queries: Tensor, labels: Tensor, rows: Tensor, columns: Tensor, scale: float) -> Tensor:
    """Scores of a block of labels, -inf for the pairs that fall into it."""
    scores = (queries @ labels.T).mul_(scale)
    is_here = (columns >= 0) & (columns < len(labels))
    # Pairs of other blocks add 0 somewhere, so that no size depends on the data.
    masks = torch.where(is_here, -torch.inf, 0.0).to(scores.dtype)
    return scores.index_put_((rows, columns.clamp(0, len(labels) - 1)), masks, accumulate=True)
