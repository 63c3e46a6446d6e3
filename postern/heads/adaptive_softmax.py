"""The adaptive softmax as a head: frequent classes with full vectors, rare ones with narrower ones.

Paper: "Efficient softmax approximation for GPUs" (arXiv 1609.04309). The layer is torch's; this one sorts the classes
by frequency, which torch leaves to the caller.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor, nn

from postern.heads.protocol import check_hidden, check_target
from postern.heads.token_mapping import check_counts
from postern.precision import without_autocast


class AdaptiveSoftmaxHead(nn.Module):
    """`torch.nn.AdaptiveLogSoftmaxWithLoss` for classes in any order.

    Its loss looks at the targets to see which clusters it needs, so that it does not compile to a single graph.

    Args:
        in_features: width of the hidden vectors.
        counts: how often each class occurs in the training text; more frequent ones get wider vectors.
        cutoffs: where the classes, most frequent first, are cut, rising.
        div_value: each cluster's vectors are as many times narrower than those of the one before.

    Attributes:
        ranks: position of each class among them by frequency.

    Raises:
        ValueError: counts that are none, or cutoffs that torch does not take.
    """

    ranks: Tensor

    def __init__(
        self, in_features: int, counts: Num[Tensor, " classes"], cutoffs: Sequence[int], div_value: float = 4.0
    ) -> None:
        super().__init__()
        check_counts(counts)
        self.in_features = in_features
        self.num_classes = len(counts)
        self.softmax = nn.AdaptiveLogSoftmaxWithLoss(in_features, len(counts), list(cutoffs), div_value)
        order = torch.argsort(counts, descending=True, stable=True)
        self.register_buffer("ranks", torch.empty_like(order).scatter_(0, order, torch.arange(len(counts)).to(order)))

    def logits(self, hidden: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch classes"]:
        """Return the log-probabilities.

        Raises:
            ValueError: hidden vectors of another width, or not floating point.
        """
        check_hidden(hidden, self.in_features)
        by_rank = self.softmax.log_prob(hidden.reshape(-1, self.in_features))
        return by_rank.index_select(-1, self.ranks).reshape(*hidden.shape[:-1], self.num_classes)

    def forward(self, hidden: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch classes"]:
        """Return the log-probabilities."""
        return self.logits(hidden)

    def loss(self, hidden: Float[Tensor, "*batch in_features"], target: Int[Tensor, "*batch"]) -> Float[Tensor, ""]:
        """Return the mean of ``-log P(y|h)``.

        Raises:
            ValueError: see `Head.loss`.
        """
        check_hidden(hidden, self.in_features)
        check_target(hidden, target)
        # torch's loss fails where autocast gives its parts different types
        with without_autocast(hidden.device):
            flat = hidden.reshape(-1, self.in_features).to(self.softmax.head.weight.dtype)
            loss: Tensor = self.softmax(flat, self.ranks[target.reshape(-1).long()]).loss
        return loss
