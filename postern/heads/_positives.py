"""What losses over a matrix of scores share: which entries are positive, given as a matrix or as pairs.

A query has a handful of the labels, which may be a million. Pairs of indices never become a matrix here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Reduction = Literal["mean", "sum", "none"]
# A matrix [queries, labels]; or (rows, columns) of the positives; or a sparse matrix of torch or SciPy.
Targets = Any


class Positives(Protocol):
    """The positive entries of a matrix of scores."""

    def counts(self) -> Int[Tensor, " queries"]:
        """How many each query has."""
        ...

    def removed_from(self, scores: Float[Tensor, "queries labels"]) -> Float[Tensor, "queries labels"]:
        """The scores with the lowest number in place of the positives; a row of -inf would have no gradient."""
        ...

    def sum(
        self,
        term: Callable[[Tensor, Tensor], Tensor],
        scores: Float[Tensor, "queries labels"],
        of_query: Float[Tensor, " queries"],
        weights: Tensor | None,
    ) -> Float[Tensor, " queries"]:
        """Each query's sum of ``weight * term(score, of_query)`` over its positives."""
        ...


class _Matrix:
    def __init__(self, mask: Bool[Tensor, "queries labels"]) -> None:
        self.mask = mask

    def counts(self) -> Int[Tensor, " queries"]:
        return self.mask.sum(1)

    def removed_from(self, scores: Float[Tensor, "queries labels"]) -> Float[Tensor, "queries labels"]:
        return scores.masked_fill(self.mask, torch.finfo(scores.dtype).min)

    def sum(
        self,
        term: Callable[[Tensor, Tensor], Tensor],
        scores: Float[Tensor, "queries labels"],
        of_query: Float[Tensor, " queries"],
        weights: Tensor | None,
    ) -> Float[Tensor, " queries"]:
        if weights is not None and weights.shape != scores.shape:
            raise ValueError(f"weights are one a target, {list(scores.shape)}, got {list(weights.shape)}")
        terms = term(scores, of_query[:, None])
        return torch.where(self.mask, terms if weights is None else weights * terms, 0.0).sum(1)


class _Pairs:
    def __init__(self, rows: Int[Tensor, " pairs"], columns: Int[Tensor, " pairs"], num_queries: int) -> None:
        self.rows, self.columns, self.num_queries = rows, columns, num_queries

    def counts(self) -> Int[Tensor, " queries"]:
        ones = torch.ones_like(self.rows)
        return ones.new_zeros(self.num_queries).index_add(0, self.rows, ones)

    def removed_from(self, scores: Float[Tensor, "queries labels"]) -> Float[Tensor, "queries labels"]:
        return scores.index_put((self.rows, self.columns), scores.new_tensor(torch.finfo(scores.dtype).min))

    def sum(
        self,
        term: Callable[[Tensor, Tensor], Tensor],
        scores: Float[Tensor, "queries labels"],
        of_query: Float[Tensor, " queries"],
        weights: Tensor | None,
    ) -> Float[Tensor, " queries"]:
        return self.sum_of_pairs(term(scores[self.rows, self.columns], of_query[self.rows]), weights)

    def sum_of_pairs(self, terms: Float[Tensor, " pairs"], weights: Tensor | None) -> Float[Tensor, " queries"]:
        """Each query's sum of the terms, one a pair."""
        if weights is not None and weights.shape != terms.shape:
            raise ValueError(f"weights are one a target, {list(terms.shape)}, got {list(weights.shape)}")
        weighted = terms if weights is None else weights * terms
        return weighted.new_zeros(self.num_queries).index_add(0, self.rows, weighted)


def positives_in(scores: Float[Tensor, "queries labels"], targets: Targets) -> Positives:
    """Read targets that go with scores.

    Args:
        scores: a matrix.
        targets: a matrix of the same shape, positive where above 0; or pairs, see `pairs_of`.

    Raises:
        ValueError: scores that are no matrix of floats, or targets that do not fit.
    """
    if scores.dim() != 2 or scores.shape[1] == 0 or not scores.is_floating_point():
        raise ValueError(f"scores are floats [queries, labels], got {scores.dtype} {list(scores.shape)}")
    if isinstance(targets, Tensor) and targets.layout == torch.strided:
        if targets.shape != scores.shape:
            raise ValueError(
                f"scores {list(scores.shape)} need targets of that shape, or pairs (rows, columns), "
                f"got {list(targets.shape)}"
            )
        return _Matrix(targets > 0)
    return pairs_of(targets, scores.shape[0], scores.shape[1])


def pairs_of(targets: Targets, num_queries: int, num_labels: int) -> _Pairs:
    """Read targets as pairs of a query and a label.

    Args:
        targets: (rows, columns), each pair once; or a sparse matrix of torch or SciPy, positive where above 0.
        num_queries: rows that there are.
        num_labels: columns that there are.

    Raises:
        ValueError: something else, indices that are no integers or not there, or a matrix of another shape.
    """
    if isinstance(targets, tuple | list) and len(targets) == 2 and all(isinstance(part, Tensor) for part in targets):
        rows, columns = targets
    else:
        rows, columns = _pairs_of_sparse(targets, num_queries, num_labels)
    if rows.dim() != 1 or rows.shape != columns.shape or rows.is_floating_point() or columns.is_floating_point():
        raise ValueError(
            "pairs are two rows of integers of one length, "
            f"got {rows.dtype} {list(rows.shape)} and {columns.dtype} {list(columns.shape)}"
        )
    if rows.numel() and rows.device.type != "meta" and not torch.compiler.is_compiling():
        for name, indices, size in (("rows", rows, num_queries), ("columns", columns, num_labels)):
            low, high = (int(bound) for bound in indices.aminmax())
            if low < 0 or high >= size:
                raise ValueError(f"{name} of the pairs lie in 0..{size - 1}, got {low}..{high}")
    return _Pairs(rows.long(), columns.long(), num_queries)


def _pairs_of_sparse(targets: Any, num_queries: int, num_labels: int) -> tuple[Tensor, Tensor]:
    if not isinstance(targets, Tensor) and hasattr(targets, "tocoo"):
        matrix = targets.tocoo()
        shape, values = tuple(matrix.shape), torch.from_numpy(matrix.data)
        indices = torch.stack([torch.from_numpy(part.astype("int64")) for part in (matrix.row, matrix.col)])
    elif isinstance(targets, Tensor) and targets.layout != torch.strided:
        coordinates = targets.to_sparse(layout=torch.sparse_coo).coalesce()
        shape, values, indices = tuple(targets.shape), coordinates.values(), coordinates.indices()
    else:
        what = f"a tensor {list(targets.shape)}" if isinstance(targets, Tensor) else repr(targets)
        raise ValueError(f"targets are pairs (rows, columns) of tensors or a sparse matrix, got {what}")
    if shape != (num_queries, num_labels):
        raise ValueError(f"sparse targets must have the shape {[num_queries, num_labels]}, got {list(shape)}")
    rows, columns = indices[:, values > 0]
    return rows, columns


def mean_over_positives(
    totals: Float[Tensor, " queries"], counts: Int[Tensor, " queries"]
) -> Float[Tensor, " queries"]:
    """Divide each query's sum by its number of positives; 0 where there are none."""
    return totals / counts.clamp_min(1)


def reduce(
    losses: Float[Tensor, " queries"], counts: Int[Tensor, " queries"], reduction: Reduction
) -> Float[Tensor, "*reduced"]:
    """Reduce one loss a query; queries without positives have the loss 0 and do not count in the mean."""
    if reduction == "none":
        return losses
    total = losses.sum()
    return total if reduction == "sum" else total / (counts > 0).sum().clamp_min(1)


def check_reduction(reduction: str) -> None:
    """Raise ValueError unless ``reduction`` is one of the three."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be mean, sum or none, got {reduction!r}")


def at_least_float32(x: Tensor) -> Tensor:
    """The tensor in float32, or as it is where that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
