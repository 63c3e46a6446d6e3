"""Positions as rotations of queries and keys, so that their product depends on the distance alone.

Paper: "RoFormer: Enhanced Transformer with Rotary Position Embedding", arXiv 2104.09864; the layout is that of Llama,
where feature j is rotated together with feature j + dim / 2.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def rotary_angles(
    num_positions: int,
    dim: int,
    *,
    start: float = 0,
    step: float = 1,
    base: float = 10_000.0,
    frequencies: Float[Tensor, " half"] | None = None,
    device: object = None,
) -> Float[Tensor, "time half"]:
    """``position * base^(-2j / dim)`` for ``j = 0 .. dim/2 - 1``, in float32.

    Args:
        num_positions: how many positions.
        dim: features that are rotated; even.
        start: the first position.
        step: distance of one position to the next.
        base: the slowest rotation is about ``base`` times slower than the fastest.
        frequencies: what each pair of features rotates by from one position to the next, instead of those of the base.
        device: where to make them.

    Raises:
        ValueError: an odd number of features, a base that is not positive, or frequencies for another number of
            features.
    """
    if frequencies is not None and frequencies.shape != (dim // 2,):
        raise ValueError(f"{dim} features rotate in {dim // 2} pairs, got frequencies {list(frequencies.shape)}")
    if dim % 2 or dim < 2 or not base > 0:
        raise ValueError(f"rotation needs an even number of features and a positive base, got {dim} and {base}")
    positions = start + step * torch.arange(num_positions, device=device, dtype=torch.float32)  # type: ignore[call-overload]
    if frequencies is None:
        frequencies = base ** (-torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim)  # type: ignore[call-overload]
    angles: Tensor = positions[:, None] * frequencies
    return angles


def grid_angles(
    height: int, width: int, dim: int, *, base: float = 10_000.0, device: torch.device | None = None
) -> Float[Tensor, "positions half"]:
    """Angles for the pixels of an image, row by row: half of them turn with the row, half with the column.

    Row and column have the frequencies ``base^-e`` with ``e`` in even steps from 0 to 1, both included.

    Args:
        height: rows.
        width: columns.
        dim: features that are rotated; a multiple of 4.
        base: the slowest rotation is ``base`` times slower than the fastest.
        device: where to make them.

    Raises:
        ValueError: features that are no multiple of 4, or a base that is not positive.
    """
    if dim % 4 or dim < 4 or not base > 0:
        raise ValueError(
            f"rotation by two positions needs a multiple of 4 features and a positive base, got {dim}, {base}"
        )
    frequencies = base ** -torch.linspace(0, 1, dim // 4, device=device)
    rows = torch.arange(height, device=device)[:, None, None] * frequencies
    columns = torch.arange(width, device=device)[None, :, None] * frequencies
    shape = (height, width, dim // 4)
    angles: Tensor = torch.cat([rows.expand(shape), columns.expand(shape)], dim=-1).flatten(0, 1)
    return angles


def rotate(x: Float[Tensor, "*batch time dim"], angles: Float[Tensor, "time half"]) -> Float[Tensor, "*batch time dim"]:
    """Rotate feature j of each token together with feature j + dim/2, by its angle j.

    Args:
        x: queries or keys.
        angles: from `rotary_angles`.
    """
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
