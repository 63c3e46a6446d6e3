"""Texts as the experiments with small language models read them: in characters, or in byte-pair tokens."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Int
from torch import Tensor

from postern.data import Text, load
from postern.errors import MissingExtra


@dataclass(frozen=True)
class Corpus:
    """A text in tokens.

    Attributes:
        train: the part to learn from.
        validation: the part to judge by, or to choose by where there is a part to test on.
        num_tokens: distinct tokens.
        test: the part to test on, where one was asked for.
    """

    train: Int[Tensor, " train"]
    validation: Int[Tensor, " validation"]
    num_tokens: int
    test: Int[Tensor, " test"] | None = None


def read_corpus(name: str, characters: int | None = None, vocabulary: int = 0, *, has_test: bool = False) -> Corpus:
    """Read a text of `postern.data.load`.

    Args:
        name: of the data set.
        characters: read so many of each part at most.
        vocabulary: number of byte-pair tokens, learnt from the training part; 0 to take the distinct characters.
        has_test: whether to read the test part as well.

    Raises:
        DataUnavailable: the text is nowhere to be found.
        MissingExtra: byte-pair tokens without Transformers.
    """
    splits = ("train", "validation", "test") if has_test else ("train", "validation")
    texts = [cast(Text, load(name, split, characters)).text for split in splits]
    if vocabulary:
        encoded, num_tokens = _byte_pairs(texts, vocabulary)
    else:
        alphabet = {character: index for index, character in enumerate(sorted(set().union(*texts)))}
        encoded = [torch.tensor([alphabet[character] for character in text]) for text in texts]
        num_tokens = len(alphabet)
    return Corpus(encoded[0], encoded[1], num_tokens, encoded[2] if has_test else None)


def _byte_pairs(texts: list[str], vocabulary: int) -> tuple[list[Tensor], int]:
    """All texts in byte-pair tokens learnt from the first."""
    try:
        from tokenizers import ByteLevelBPETokenizer
    except ImportError:
        raise MissingExtra("transformers", "Learning byte-pair tokens") from None
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(pieces(texts[0]), vocabulary, show_progress=False)

    def encode(text: str) -> Tensor:
        return torch.cat([torch.tensor(tokenizer.encode(piece).ids, dtype=torch.long) for piece in pieces(text)])

    return [encode(text) for text in texts], tokenizer.get_vocab_size()


def pieces(text: str, size: int = 100_000) -> Iterator[str]:
    """Cut a text after the lines that end beyond each ``size`` characters."""
    start = 0
    while start < len(text):
        stop = text.find("\n", start + size) + 1 or len(text)
        yield text[start:stop]
        start = stop
