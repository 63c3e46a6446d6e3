"""Copies of segments, generated: what comes next stands somewhere earlier, at a place that only the content tells.

The first half of a sequence is random; the second half consists of segments copied from random places of the first.
After a token or two of a segment, a model that attends to where it was copied from knows the rest.
"""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor


def segment_copies(
    count: int, length: int, *, num_tokens: int = 24, segment: int = 8, generator: torch.Generator | None = None
) -> Int[Tensor, "count length"]:
    """Draw sequences whose second half copies segments of the first.

    Args:
        count: how many.
        length: tokens of each; its half is a multiple of ``segment``.
        num_tokens: size of the vocabulary; tokens of the first half are uniform.
        segment: tokens of a copied segment; the places are uniform.
        generator: torch's global one if None.

    Raises:
        ValueError: sizes below 1, or halves that are no multiple of the segment.
    """
    if min(count, length, num_tokens, segment) < 1 or length % 2 or length // 2 % segment:
        raise ValueError(
            f"sizes are positive and half of the length is a multiple of the segment, got count={count}, "
            f"length={length}, num_tokens={num_tokens}, segment={segment}"
        )
    half = length // 2
    first = torch.randint(num_tokens, (count, half), generator=generator)
    starts = torch.randint(half - segment + 1, (count, half // segment, 1), generator=generator)
    places = (starts + torch.arange(segment)).flatten(1)
    return torch.cat([first, first.gather(1, places)], dim=1)
