"""A vocabulary of words, for small models of text that are trained from scratch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

_WORD = re.compile(r"[a-z]+|\d+")


class Vocabulary:
    """Numbers the words of some texts: 0 is padding, 1 any other word, then the words by falling frequency.

    Words are runs of letters or of digits, in lower case.

    Args:
        texts: to take the words from.
        min_count: how often a word must occur.

    Raises:
        ValueError: a count below 1.
    """

    def __init__(self, texts: Sequence[str], min_count: int = 2) -> None:
        if min_count < 1:
            raise ValueError(f"min_count must be at least 1, got {min_count}")
        counts = Counter(word for text in texts for word in _words(text))
        words = sorted((word for word, count in counts.items() if count >= min_count), key=lambda w: (-counts[w], w))
        self.words = ("<padding>", "<other>", *words)
        self._numbers = {word: number for number, word in enumerate(self.words)}

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, texts: Sequence[str], length: int) -> Int[Tensor, "texts length"]:
        """Number the words of texts.

        Args:
            texts: at least one.
            length: words that are kept of each; shorter ones are padded with 0, and one without words is one "other".

        Raises:
            ValueError: no texts, or a length below 1.
        """
        if not texts or length < 1:
            raise ValueError(f"encoding needs texts and a positive length, got {len(texts)} and {length}")
        tokens = torch.zeros(len(texts), length, dtype=torch.long)
        for row, text in enumerate(texts):
            numbers = [self._numbers.get(word, 1) for word in _words(text)[:length]] or [1]
            tokens[row, : len(numbers)] = torch.tensor(numbers)
        return tokens


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
