"""Which labels each query has, in memory for the pairs alone, whatever the number of labels."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from postern.heads._positives import Targets, pairs_of


class LabelSets:
    """The labels of each query, sorted by query and label.

    Args:
        targets: pairs ``(rows, columns)``, or a sparse matrix of torch or SciPy; duplicates count once.
        num_queries: number of queries.
        num_labels: number of labels.

    Raises:
        ValueError: targets that are neither, or indices out of range.
    """

    def __init__(self, targets: Targets, num_queries: int, num_labels: int) -> None:
        pairs = pairs_of(targets, num_queries, num_labels)
        # One number a pair: sorted once, it answers both "which labels" and "is it one".
        self._keys = torch.unique(pairs.rows * num_labels + pairs.columns)
        self.num_labels = num_labels
        counts = torch.bincount(self._keys // num_labels, minlength=num_queries)
        self._starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __repr__(self) -> str:
        return f"LabelSets({len(self)} queries, {self.num_labels} labels, {len(self._keys)} pairs)"

    def to(self, device: torch.device | str) -> LabelSets:
        """Return the same sets on a device; what they are asked must be on it too."""
        rows, columns = self.pairs()
        return LabelSets((rows.to(device), columns.to(device)), len(self), self.num_labels)

    def counts(self) -> Int[Tensor, " queries"]:
        """Number of labels of each query."""
        return self._starts.diff()

    def frequencies(self) -> Int[Tensor, " labels"]:
        """Number of queries that have each label."""
        return torch.bincount(self._keys % self.num_labels, minlength=self.num_labels)

    def pairs(
        self, queries: Int[Tensor, " batch"] | None = None
    ) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]:
        """Return the pairs of some queries: positions in ``queries``, and labels; of all where it is None."""
        if queries is None:
            return self._keys // self.num_labels, self._keys % self.num_labels
        counts = self._starts[queries + 1] - self._starts[queries]
        rows = torch.arange(len(queries), device=queries.device).repeat_interleave(counts)
        first = counts.cumsum(0) - counts
        place = torch.arange(len(rows), device=queries.device) - first[rows] + self._starts[queries][rows]
        return rows, self._keys[place] % self.num_labels

    def contain(self, queries: Int[Tensor, "*any"], labels: Int[Tensor, "*any"]) -> Bool[Tensor, "*any"]:
        """Whether each query has the label; a negative label stands for none, which no query has."""
        keys = (queries * self.num_labels + labels).contiguous()
        if not len(self._keys):
            return torch.zeros_like(keys, dtype=torch.bool)
        place = torch.searchsorted(self._keys, keys).clamp_max(len(self._keys) - 1)
        is_there: Tensor = (self._keys[place] == keys) & (labels >= 0)
        return is_there

    def sample(
        self,
        queries: Int[Tensor, " batch"],
        count: int,
        generator: torch.Generator | None = None,
        relevance: Float[Tensor, " pairs"] | None = None,
    ) -> tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]]:
        """Return the pairs of up to ``count`` labels of each query, drawn without replacement.

        Args:
            queries: which.
            count: how many labels of each.
            generator: draws them; on the CPU.
            relevance: of the pairs of `pairs(queries)`, positive; labels are drawn in proportion. Equal by default.

        Raises:
            ValueError: a count below 1, or a relevance that is not positive or not one a pair.
        """
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        rows, labels = self.pairs(queries)
        # The largest of log(w) + Gumbel noise is drawn in proportion to w; so are the next ones of what is left.
        keys = -torch.empty(len(rows)).exponential_(generator=generator).log().to(rows.device)
        if relevance is not None:
            if relevance.shape != rows.shape or not bool((relevance > 0).all()):
                raise ValueError(f"relevance is positive, one a pair ({len(rows)}), got {list(relevance.shape)}")
            keys = keys + relevance.log()
        order = keys.argsort(descending=True)
        order = order[rows[order].argsort(stable=True)]
        sorted_rows = rows[order]
        first = torch.searchsorted(sorted_rows, sorted_rows)
        kept = order[torch.arange(len(rows), device=rows.device) - first < count]
        return rows[kept], labels[kept]
