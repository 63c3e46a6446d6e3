"""Associative recall, generated: keys with their values, then keys again, each to be answered with its value.

In `multi_query_recall` keys and values are tokens of one sequence, so that a model must first join each value to the
key before it ("Zoology: Measuring and Improving Recall in Efficient Language Models", arXiv 2312.04927; the gaps as in
its code). In `paired_recall` a token holds a key and its value together, which leaves recall alone, a task for one
layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

IGNORED = -100
_ROWS_AT_ONCE = 1024


@dataclass(frozen=True)
class Recall:
    """Sequences of tokens, and what is asked at each.

    Attributes:
        inputs: tokens.
        target: the token that answers, or -100 where nothing is asked, as `torch.nn.functional.cross_entropy` ignores.
    """

    inputs: Int[Tensor, "count time"]
    target: Int[Tensor, "count time"]


@dataclass(frozen=True)
class PairedRecall:
    """Sequences of tokens that hold a key and a value, or a key that asks for its value.

    Attributes:
        keys: the keys, below ``num_keys``.
        values: 1 to ``num_values``, and 0 for the tokens that ask.
        target: the class that answers, ``value - 1``, or -100 where nothing is asked.
    """

    keys: Int[Tensor, "count time"]
    values: Int[Tensor, "count time"]
    target: Int[Tensor, "count time"]


def multi_query_recall(
    count: int,
    length: int,
    num_pairs: int,
    *,
    num_tokens: int = 8192,
    power: float = 0.01,
    has_random_filler: bool = False,
    generator: torch.Generator | None = None,
) -> Recall:
    """Return sequences ``k1 v1 k2 v2 ...`` in which each key occurs once more, to be answered with its value: MQAR.

    Keys are tokens 1 to ``num_tokens / 2 - 1``, values those above, both without repetition. Behind the pairs token 0
    fills the places between the queries. A query stands at an even distance ``2 g`` from the end of the pairs, with g
    drawn without repetition and with odds ``power (g + 1)^(power - 1)``: most stand early.

    Args:
        count: number of sequences.
        length: tokens of one, at least four times the pairs.
        num_pairs: pairs of one.
        num_tokens: size of the vocabulary.
        power: the smaller, the earlier the queries.
        has_random_filler: whether filling tokens are drawn from the whole vocabulary instead of being 0.
        generator: draws everything; torch's global one if None.

    Raises:
        ValueError: sizes below 1, a length that is too short, too few tokens for the pairs, or no positive power.
    """
    half = num_tokens // 2
    if min(count, num_pairs) < 1 or length < 4 * num_pairs:
        raise ValueError(
            f"sequences have at least four tokens a pair, got count={count}, length={length}, num_pairs={num_pairs}"
        )
    if half - 1 < num_pairs:
        raise ValueError(f"{num_tokens} tokens give {max(half - 1, 0)} keys, got num_pairs={num_pairs}")
    if not power > 0:
        raise ValueError(f"power must be positive, got {power}")
    keys = 1 + _distinct(count, half - 1, num_pairs, generator)
    values = half + _distinct(count, num_tokens - half, num_pairs, generator)
    space = (length - 2 * num_pairs) // 2
    odds = power * torch.arange(1, space + 1, dtype=torch.float64) ** (power - 1)
    places = torch.multinomial(odds.expand(count, -1), num_pairs, generator=generator)
    inputs = torch.zeros(count, length, dtype=torch.long)
    inputs[:, 0 : 2 * num_pairs : 2], inputs[:, 1 : 2 * num_pairs : 2] = keys, values
    places = 2 * num_pairs + 2 * places
    inputs.scatter_(1, places, keys)
    target = torch.full_like(inputs, IGNORED).scatter_(1, places, values)
    if has_random_filler:
        filler = torch.randint(num_tokens, inputs.shape, generator=generator)
        inputs = torch.where(inputs == 0, filler, inputs)
    return Recall(inputs, target)


def paired_recall(
    count: int,
    num_pairs: int = 16,
    *,
    num_keys: int = 64,
    num_values: int = 64,
    generator: torch.Generator | None = None,
) -> PairedRecall:
    """Return sequences of pairs, followed by all their keys in another order, each to be answered with its value.

    The keys of a sequence differ; its values are drawn one by one, and may repeat.

    Args:
        count: number of sequences.
        num_pairs: pairs of one; it has twice as many tokens.
        num_keys: how many keys there are.
        num_values: how many values there are.
        generator: draws everything; torch's global one if None.

    Raises:
        ValueError: sizes below 1, or fewer keys than pairs.
    """
    if min(count, num_pairs, num_values) < 1 or num_keys < num_pairs:
        raise ValueError(
            "sizes are positive and keys enough for the pairs, "
            f"got count={count}, num_pairs={num_pairs}, num_keys={num_keys}, num_values={num_values}"
        )
    keys = _distinct(count, num_keys, num_pairs, generator)
    values = torch.randint(num_values, keys.shape, generator=generator)
    order = torch.rand(keys.shape, generator=generator).argsort(1)
    asked, answers = keys.gather(1, order), values.gather(1, order)
    return PairedRecall(
        torch.cat([keys, asked], dim=1),
        torch.cat([values + 1, torch.zeros_like(values)], dim=1),
        torch.cat([torch.full_like(values, IGNORED), answers], dim=1),
    )


def _distinct(count: int, choices: int, drawn: int, generator: torch.Generator | None) -> Tensor:
    """Rows of different integers below ``choices``, uniform, in random order."""
    rows = [
        torch.rand(min(_ROWS_AT_ONCE, count - start), choices, generator=generator).topk(drawn, dim=1).indices
        for start in range(0, count, _ROWS_AT_ONCE)
    ]
    return torch.cat(rows)
