"""Linear and softmax attention in the frame of NaLaFormer: positions of texts or images, a normalisation and a gate.

What surrounds an attention makes a difference of its own. Here the same surroundings go around any features and around
softmax, as in the paper's networks, which mix both.

Paper: "NaLaFormer: Norm-Aware Linear Attention for Transformer Models", arXiv 2506.21137, after its code; LePE is from
"CSWin Transformer", arXiv 2107.00652. The paper's softmax layers are the same.
"""

from __future__ import annotations

import math
from typing import Any, Literal, TypedDict, Unpack

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from postern.attention.linear import FeatureMap, LinearAttention, elu_features, linear_attention
from postern.attention.protocol import check_padding
from postern.attention.rotary import grid_angles, rotary_angles, rotate
from postern.attention.self_attention import KeyValueCache, attend, repeat_heads

Rotary = Literal["1d", "2d"]
Grid = tuple[int, int]


class FrameOptions(TypedDict, total=False):
    """Options of `FramedLinearAttention` that its variants pass on."""

    num_kv_heads: int | None
    is_causal: bool
    bias: bool
    rotary: Rotary | None
    rotary_base: float
    has_lepe: bool
    is_gated: bool
    eps: float


class FramedLinearAttention(LinearAttention):
    """``W_o (norm(concat_h(O_h) + lepe(V)) * silu(X W_g))``, where ``O_h`` is linear attention of any features.

    The norm is a layer normalisation of all heads together. It follows the protocol of `postern.attention.Attention`.

    Args:
        width: features of a token; a multiple of ``num_heads``.
        num_heads: number of heads.
        query_features: features of the queries, at least 0, ``[..., head_dim] -> [..., features]``, in groups of
            ``head_dim`` where they are rotated.
        key_features: of the keys; by default those of the queries.
        num_kv_heads: see `LinearAttention`.
        is_causal: whether a token sees itself and earlier ones only.
        bias: whether the projections have one.
        rotary: rotate each group of ``head_dim`` features, in the numerator alone: "1d" by the position in a text,
            counted from the first token of the cache; "2d" by row and column in an image.
        rotary_base: see `rotary_angles` and `grid_angles`.
        has_lepe: add a depth-wise 5x5 convolution of the values, taken as an image.
        is_gated: whether there is a gate.
        eps: compared with the mean over the keys in the denominator.

    Raises:
        ValueError: see `LinearAttention`; also "2d" or LePE for a causal layer, or heads of a size that cannot be
            rotated.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        query_features: FeatureMap = elu_features,
        key_features: FeatureMap | None = None,
        num_kv_heads: int | None = None,
        is_causal: bool = False,
        bias: bool = True,
        rotary: Rotary | None = None,
        rotary_base: float = 10_000.0,
        has_lepe: bool = False,
        is_gated: bool = True,
        eps: float = 1e-6,
    ) -> None:
        super().__init__(
            width,
            num_heads,
            query_features=query_features,
            key_features=key_features,
            num_kv_heads=num_kv_heads,
            is_causal=is_causal,
            bias=bias,
            rotary_base=None if rotary is None else rotary_base,
            eps=eps,
        )
        if rotary not in ("1d", "2d", None):
            raise ValueError(f"rotary is '1d', '2d' or None, got {rotary!r}")
        if is_causal and (rotary == "2d" or has_lepe):
            raise ValueError(
                f"rows, columns and LePE belong to images, which are not causal; got rotary={rotary!r}, "
                f"has_lepe={has_lepe}, is_causal={is_causal}"
            )
        self.rotary = rotary
        self.angles(0, 0, (0, 0), None)  # checks the size of the heads and the base
        self.norm = nn.LayerNorm(width)
        self.lepe = nn.Conv2d(width, width, 5, padding=2, groups=width) if has_lepe else None
        self.gate = nn.Linear(width, width, bias=bias) if is_gated else None

    def angles(
        self, time: int, start: int, grid: Grid, device: torch.device | None
    ) -> Float[Tensor, "time half"] | None:
        """Return the angles of a group of features at each token, or None for layers that know no positions.

        Args:
            time: number of tokens.
            start: position of the first.
            grid: height and width of the image, for "2d".
            device: where to make them.
        """
        head_dim = self.width // self.num_heads
        if self.rotary_base is None:
            return None
        if self.rotary == "2d":
            return grid_angles(*grid, head_dim, base=self.rotary_base, device=device)
        return rotary_angles(time, head_dim, start=start, base=self.rotary_base, device=device)

    def attend(
        self,
        query: Float[Tensor, "batch heads time head_dim"],
        key: Float[Tensor, "batch kv_heads time head_dim"],
        value: Float[Tensor, "batch kv_heads time head_dim"],
        mask: Bool[Tensor, "batch keys"] | None,
        cache: Any,
        angles: Float[Tensor, "time half"] | None,
    ) -> Float[Tensor, "batch heads time head_dim"]:
        """Return the heads' outputs; the mask is for all keys, those of the cache included."""
        return linear_attention(
            self.query_features(query),
            self.key_features(key),
            value,
            None if mask is None else mask[:, -key.shape[2] :],
            is_causal=self.is_causal,
            angles=angles,
            state=cache,
            eps=self.eps,
            is_averaged=True,
        )

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        mask: Bool[Tensor, "batch keys"] | None = None,
        cache: Any = None,
        *,
        grid: Grid | None = None,
    ) -> Float[Tensor, "batch time width"]:
        """Attend; see `postern.attention.Attention` for the mask and the cache.

        Args:
            x: tokens; those of an image row by row.
            mask: true where a token may be attended to.
            cache: from `new_cache`, for causal layers.
            grid: height and width of the image, for "2d" and LePE; by default it is square.

        Raises:
            ValueError: an input of another width, a mask by query or head, a cache for a layer that is not causal, or
                tokens that are not as many as the image has.
        """
        query, key, value = self.project(x)
        start, time = 0 if cache is None else len(cache), x.shape[1]
        check_padding(mask, x.shape[0], start + time)
        if self.rotary == "2d" or self.lepe is not None:
            grid = _check_grid(grid, time)
        angles = self.angles(time, start, grid or (1, time), x.device)
        merged = self.attend(query, key, value, mask, cache, angles).transpose(1, 2).flatten(2)
        if self.lepe is not None and grid is not None:
            values = repeat_heads(value, self.num_heads)
            if mask is not None:
                values = values * mask[:, None, :, None]
            image = values.transpose(-1, -2).reshape(x.shape[0], self.width, *grid)
            merged = merged + self.lepe(image).flatten(2).transpose(1, 2)
        merged = self.norm(merged)
        if self.gate is not None:
            merged = merged * F.silu(self.gate(x))
        output: Tensor = self.output(merged)
        return output

    def extra_repr(self) -> str:
        """Return what the printed module says of its settings."""
        return f"{super().extra_repr()}, rotary={self.rotary!r}"


class FramedSoftmaxAttention(FramedLinearAttention):
    """Softmax attention in the frame of `FramedLinearAttention`; queries and keys themselves are rotated.

    Args:
        width: features of a token; a multiple of ``num_heads``.
        num_heads: number of heads.
        options: see `FramedLinearAttention`; ``eps`` has no effect.

    Raises:
        ValueError: see `FramedLinearAttention`.
    """

    def __init__(self, width: int, num_heads: int, **options: Unpack[FrameOptions]) -> None:
        super().__init__(width, num_heads, **options)

    def new_cache(self) -> KeyValueCache:  # type: ignore[override]
        """Return an empty cache."""
        return KeyValueCache()

    def attend(
        self,
        query: Float[Tensor, "batch heads time head_dim"],
        key: Float[Tensor, "batch kv_heads time head_dim"],
        value: Float[Tensor, "batch kv_heads time head_dim"],
        mask: Bool[Tensor, "batch keys"] | None,
        cache: Any,
        angles: Float[Tensor, "time half"] | None,
    ) -> Float[Tensor, "batch heads time head_dim"]:
        """Return the heads' outputs."""
        if angles is not None:
            query, key = rotate(query, angles), rotate(key, angles)
        if cache is not None:
            key, value = cache.append(key, value)
        return attend(query, key, value, mask, is_causal=self.is_causal)


def _check_grid(grid: Grid | None, time: int) -> Grid:
    if grid is None:
        grid = (math.isqrt(time), math.isqrt(time))
    if grid[0] * grid[1] != time:
        raise ValueError(f"an image of {grid[0]} x {grid[1]} has as many tokens, got {time}; give its grid")
    return grid
