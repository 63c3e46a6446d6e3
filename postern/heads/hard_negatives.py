"""Batches with a pool of labels in place of all labels: in-batch negatives, and hard ones.

Paper: "Dual-Encoders for Extreme Multi-Label Classification" (arXiv 2310.10636): the pool is the union of the queries'
positives and of a few negatives of each, drawn from the query's best-scored labels, which are looked up anew every
five epochs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from postern.heads.dual_encoder import top_labels
from postern.heads.label_sets import LabelSets


@dataclass(frozen=True, eq=False)
class LabelPool:
    """The labels of a batch, and which of them are positives.

    Attributes:
        labels: indices of the labels, ascending.
        targets: pairs of a query of the batch and a position in ``labels``. All positives that are in the pool are
            here, also those that another query brought in, so that no positive passes for a negative.
        excluded: pairs in the pool that are neither right nor wrong, in the same form.
    """

    labels: Int[Tensor, " pool"]
    targets: tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]
    excluded: tuple[Int[Tensor, " others"], Int[Tensor, " others"]]


class HardNegativeSampler:
    """Draws the pool of labels of a batch.

    Until `refresh` has been called, negatives are drawn uniformly from all labels.

    Args:
        positives: the labels of every training query.
        per_query: negatives of each query; 0 for in-batch negatives, which are the others' positives. The paper takes
            1 to 5.
        shortlist: how many of a query's best labels negatives are drawn from, its positives among them not counted out.
        excluded: labels of every training query that are neither right nor wrong, and so no negatives.

    Raises:
        ValueError: a negative number of negatives, or a shortlist shorter than that.
    """

    def __init__(
        self, positives: LabelSets, per_query: int = 1, shortlist: int = 100, excluded: LabelSets | None = None
    ) -> None:
        if per_query < 0 or shortlist < max(1, per_query):
            raise ValueError(
                f"per_query must not be negative, nor the shortlist shorter, got {per_query} and {shortlist}"
            )
        self.positives = positives
        self.excluded = excluded
        self.per_query = per_query
        self.shortlist = shortlist
        self._hard: Tensor | None = None

    @torch.no_grad()
    def refresh(
        self, queries: Float[Tensor, "queries dim"], labels: Float[Tensor, "labels dim"], *, block: int = 65_536
    ) -> None:
        """Look up every query's shortlist, its positives removed.

        Args:
            queries: embeddings of all training queries.
            labels: embeddings of all labels.
            block: labels that are scored at once.

        Raises:
            ValueError: not one embedding a query or label.
        """
        if (len(queries), len(labels)) != (len(self.positives), self.positives.num_labels):
            raise ValueError(
                f"there are {len(self.positives)} queries and {self.positives.num_labels} labels, "
                f"got {len(queries)} and {len(labels)} embeddings"
            )
        found = []
        for start in range(0, len(queries), 4096):
            _, best = top_labels(queries[start : start + 4096], labels, self.shortlist, block=block)
            best = best.cpu()
            found.append(self._negatives_among(torch.arange(start, start + len(best)), best))
        self._hard = torch.cat(found)

    def sample(
        self, queries: Int[Tensor, " batch"], generator: torch.Generator | None = None
    ) -> Int[Tensor, "batch per_query"]:
        """Draw negatives of each query without replacement; -1 where it has too few.

        Args:
            queries: indices of training queries.
            generator: draws them; on the CPU.
        """
        shape = (len(queries), self.per_query)
        if self._hard is None:
            drawn = torch.randint(self.positives.num_labels, shape, generator=generator)
            return self._negatives_among(queries, drawn)
        candidates = self._hard[queries]
        keys = torch.rand(candidates.shape, generator=generator).masked_fill(candidates < 0, -1.0)
        return candidates.gather(1, keys.topk(min(self.per_query, keys.shape[1]), dim=1).indices)

    def batch(
        self, queries: Int[Tensor, " batch"], generator: torch.Generator | None = None, num_positives: int | None = None
    ) -> LabelPool:
        """Return the pool of a batch: positives and negatives of its queries.

        Args:
            queries: indices of training queries, on the CPU.
            generator: draws; on the CPU.
            num_positives: how many positives each query brings in, drawn at random; None for all.

        Raises:
            ValueError: a number of positives below 1.
        """
        positives = self.positives
        brought = (
            positives.pairs(queries) if num_positives is None else positives.sample(queries, num_positives, generator)
        )
        negatives = self.sample(queries, generator).flatten()
        pool = torch.unique(torch.cat([brought[1], negatives[negatives >= 0]]))
        nothing = queries.new_empty(0), queries.new_empty(0)
        excluded = nothing if self.excluded is None else _in_pool(self.excluded.pairs(queries), pool)
        return LabelPool(pool, _in_pool(positives.pairs(queries), pool), excluded)

    def _negatives_among(self, queries: Tensor, labels: Int[Tensor, "batch n"]) -> Int[Tensor, "batch n"]:
        """The labels with -1 in place of those that are no negatives of the query."""
        of_query = queries[:, None].expand_as(labels)
        is_other = self.positives.contain(of_query, labels)
        if self.excluded is not None:
            is_other |= self.excluded.contain(of_query, labels)
        return labels.masked_fill(is_other, -1)


def _in_pool(pairs: tuple[Tensor, Tensor], pool: Int[Tensor, " pool"]) -> tuple[Tensor, Tensor]:
    """The pairs whose label is in the pool, with its position there."""
    rows, labels = pairs
    place = torch.searchsorted(pool, labels)
    is_in = (place < len(pool)) & (torch.cat([pool, pool.new_full((1,), -1)])[place] == labels)
    return rows[is_in], place[is_in]
