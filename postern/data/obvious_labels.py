"""Synthetic texts with several labels, one of which is obvious and the others are guesses.

It isolates what the softmax over several positives does to an easy one, after the synthetic experiment of
"Dual-Encoders for Extreme Multi-Label Classification" (arXiv 2310.10636).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

_LABEL_WORDS, _QUERY_WORDS = 8, 10  # of a topic
_DRAWN_FOR_LABEL, _DRAWN_FOR_QUERY = 2, 5


@dataclass(frozen=True, eq=False)
class ObviousQueries:
    """Queries, and the labels of each.

    Attributes:
        tokens: words of the queries; 0 is padding and never occurs.
        rows: the queries of the pairs, ascending.
        columns: the labels of the pairs.
        obvious: the label that each query names.
    """

    tokens: Int[Tensor, "queries words"]
    rows: Int[Tensor, " pairs"]
    columns: Int[Tensor, " pairs"]
    obvious: Int[Tensor, " queries"]


class ObviousLabels:
    """Labels in topics, and queries that name one label and hint at a topic.

    A label's text is a word of its own and two words drawn from eight of its topic. A query's text is the own word of
    one label, which is obvious from it, and five words drawn from ten others of the label's topic; its positives are
    that label and up to ``num_guesses`` more of the topic, drawn at random, which nothing in the text tells.

    Args:
        generator: draws the topics and the labels.
        num_labels: number of labels.
        num_topics: number of topics; a label's is drawn uniformly.
        num_guesses: labels of a query besides the obvious one, as far as its topic has them.

    Raises:
        ValueError: a number below 1.
    """

    def __init__(
        self, generator: torch.Generator, num_labels: int = 500, num_topics: int = 50, num_guesses: int = 4
    ) -> None:
        if min(num_labels, num_topics, num_guesses) < 1:
            raise ValueError(
                f"numbers of labels, topics and guesses are positive, got {num_labels}, {num_topics}, {num_guesses}"
            )
        self.num_labels = num_labels
        self.num_topics = num_topics
        self.num_guesses = num_guesses
        self.topics = torch.randint(num_topics, (num_labels,), generator=generator)
        drawn = torch.randint(_LABEL_WORDS, (num_labels, _DRAWN_FOR_LABEL), generator=generator)
        first = 1 + num_labels
        own = 1 + torch.arange(num_labels)
        self.tokens = torch.cat([own[:, None], first + self.topics[:, None] * _LABEL_WORDS + drawn], dim=1)
        self._first_query_word = first + num_topics * _LABEL_WORDS
        self.num_tokens = self._first_query_word + num_topics * _QUERY_WORDS

    def queries(self, count: int, generator: torch.Generator) -> ObviousQueries:
        """Draw queries.

        Args:
            count: how many.
            generator: draws them.

        Raises:
            ValueError: a count below 1.
        """
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        obvious = torch.randint(self.num_labels, (count,), generator=generator)
        topics = self.topics[obvious]
        drawn = torch.randint(_QUERY_WORDS, (count, _DRAWN_FOR_QUERY), generator=generator)
        words = self._first_query_word + topics[:, None] * _QUERY_WORDS + drawn
        # Of the other labels of the topic, those with the highest random keys.
        keys = torch.rand(count, self.num_labels, generator=generator)
        keys[self.topics != topics[:, None]] = -1
        keys.scatter_(1, obvious[:, None], 2)
        best = keys.topk(min(1 + self.num_guesses, self.num_labels), dim=1)
        is_label = best.values >= 0
        rows = torch.arange(count)[:, None].expand_as(is_label)[is_label]
        return ObviousQueries(torch.cat([1 + obvious[:, None], words], dim=1), rows, best.indices[is_label], obvious)
