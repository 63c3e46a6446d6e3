"""Multi-head self-attention whose normaliser and gate can be exchanged: the baseline, and the frame of its variants.

Without either it is the attention of "Attention Is All You Need" (arXiv 1706.03762) on PyTorch's fused kernel. A
normaliser is any function of the softmax family, ``(logits, dim) -> probabilities``; a gate is any module
``(y, x) -> y`` that changes the heads' outputs, or what it is put behind, in the light of the layer's input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypedDict, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from postern.attention.protocol import check_input
from postern.attention.rotary import rotary_angles, rotate

Normaliser = Callable[[Tensor, int], Tensor]
GatePosition = Literal["heads", "value", "key", "query", "output"]


def attention_logits(
    query: Float[Tensor, "*batch queries head_dim"],
    key: Float[Tensor, "*batch keys head_dim"],
    scale: float | None = None,
) -> Float[Tensor, "*batch queries keys"]:
    """``scale * Q K^T``, with ``scale = 1 / sqrt(head_dim)`` by default."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return torch.matmul(query * scale, key.transpose(-1, -2))


def allowed_keys(
    num_queries: int,
    num_keys: int,
    mask: Bool[Tensor, "*mask"] | None = None,
    *,
    is_causal: bool = False,
    device: torch.device | None = None,
) -> Bool[Tensor, "#batch #heads #queries keys"] | None:
    """Combine a mask with the causal order; the last query stands at the last key.

    Args:
        num_queries: number of queries.
        num_keys: number of keys, with a cache more than there are queries.
        mask: true where a key may be attended to: ``[batch, keys]``, or broadcastable to
            ``[batch, heads, queries, keys]``.
        is_causal: whether a query sees its own position and earlier ones only.
        device: where to make the causal part.

    Returns:
        True where a query may attend to a key, or None where each may attend to all.

    Raises:
        ValueError: a mask that is not boolean or not of these shapes.
    """
    if mask is not None:
        if mask.dtype != torch.bool:
            raise ValueError(f"a mask is boolean, true where a key may be attended to; got {mask.dtype}")
        if mask.dim() == 2:
            mask = mask[:, None, None, :]
        if mask.dim() != 4 or mask.shape[-1] != num_keys or mask.shape[-2] not in (1, num_queries):
            raise ValueError(
                f"a mask has the shape [batch, {num_keys}] or [batch, heads, {num_queries}, {num_keys}] "
                f"(sizes of 1 are repeated), got {list(mask.shape)}"
            )
    if not is_causal or num_queries == 1:
        return mask
    order = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device).tril(num_keys - num_queries)
    return order[None, None] if mask is None else mask & order


def attention_weights(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    mask: Bool[Tensor, "*mask"] | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    normalise: Normaliser = torch.softmax,
) -> Float[Tensor, "batch heads queries keys"]:
    """``normalise(scale * Q K^T)`` over the allowed keys; 0 for the others.

    Args:
        query: queries.
        key: keys; several query heads in a row may share one head of keys.
        mask: see `allowed_keys`.
        is_causal: see `allowed_keys`.
        scale: by default ``1 / sqrt(head_dim)``.
        normalise: a function of the softmax family.

    Raises:
        ValueError: see `allowed_keys`.
    """
    logits = attention_logits(query, repeat_heads(key, query.shape[1]), scale)
    allowed = allowed_keys(query.shape[-2], key.shape[-2], mask, is_causal=is_causal, device=query.device)
    if allowed is None:
        return normalise(logits, -1)
    # finite, as a row of nothing but minus infinity would be NaN
    weights = normalise(logits.masked_fill(~allowed, torch.finfo(logits.dtype).min), -1)
    return weights if mask is None else weights.masked_fill(~allowed, 0.0)


def attend(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    mask: Bool[Tensor, "*mask"] | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    normalise: Normaliser | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "batch heads queries value_dim"]:
    """``normalise(scale * Q K^T) V``; with softmax, which is the default, on PyTorch's fused kernel.

    Args:
        query: queries.
        key: keys; several query heads in a row may share one head of keys and values.
        value: values.
        mask: true where a key may be attended to: ``[batch, keys]``, or broadcastable to
            ``[batch, heads, queries, keys]``. A query that may attend to nothing gets zeros.
        is_causal: whether a query sees its own position and earlier ones only; the last query stands at the last key.
        scale: by default ``1 / sqrt(head_dim)``.
        normalise: a function of the softmax family; None for softmax.
        dropout: share of the weights that are zeroed (the others grow to match).

    Raises:
        ValueError: see `allowed_keys`.
    """
    if normalise is not None:
        weights = attention_weights(query, key, mask, is_causal=is_causal, scale=scale, normalise=normalise)
        value = repeat_heads(value, query.shape[1])
        return torch.matmul(F.dropout(weights, dropout, training=dropout > 0), value)
    is_grouped = query.shape[1] != key.shape[1]
    if mask is None and is_causal and query.shape[-2] == key.shape[-2]:
        return F.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=True, scale=scale, enable_gqa=is_grouped
        )
    allowed = allowed_keys(query.shape[-2], key.shape[-2], mask, is_causal=is_causal, device=query.device)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=allowed, dropout_p=dropout, scale=scale, enable_gqa=is_grouped
    )


def repeat_heads(x: Float[Tensor, "batch kv_heads time dim"], num_heads: int) -> Float[Tensor, "batch heads time dim"]:
    """Give each query head a copy of the keys or values that it shares with its neighbours.

    Raises:
        ValueError: heads that are no multiple of those of ``x``.
    """
    if num_heads % x.shape[1]:
        raise ValueError(f"{num_heads} query heads cannot share {x.shape[1]} heads of keys and values evenly")
    groups = num_heads // x.shape[1]
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


class KeyValueCache:
    """Keys and values of the tokens that a layer has seen, ``[batch, heads, time, head_dim]`` each."""

    def __init__(self) -> None:
        self.key: Tensor | None = None
        self.value: Tensor | None = None

    def __len__(self) -> int:
        return 0 if self.key is None else self.key.shape[-2]

    def append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Add the keys and values of new tokens; return those of all tokens so far.

        Raises:
            ValueError: tokens of another batch, or of other heads.
        """
        if self.key is not None and self.value is not None:
            if self.key.shape[:-2] != key.shape[:-2]:
                raise ValueError(
                    f"the cache holds keys of [batch, heads] {list(self.key.shape[:-2])}, "
                    f"got new ones of {list(key.shape[:-2])}"
                )
            key, value = torch.cat([self.key, key], dim=-2), torch.cat([self.value, value], dim=-2)
        self.key, self.value = key, value
        return key, value

    def reorder(self, rows: Int[Tensor, " batch"]) -> None:
        """Keep these sequences of the batch, in this order."""
        if self.key is not None and self.value is not None:
            self.key, self.value = self.key.index_select(0, rows), self.value.index_select(0, rows)


class HeadOptions(TypedDict, total=False):
    """Options of `SelfAttention` that its variants pass on."""

    num_kv_heads: int | None
    head_dim: int | None
    is_causal: bool
    bias: bool
    dropout: float
    rotary_base: float | None
    has_qk_norm: bool


class SelfAttention(nn.Module):
    """Multi-head self-attention: ``W_O concat_h(gate_h(normalise(Q_h K_h^T / sqrt(head_dim)) V_h, x))``.

    It follows the protocol of `postern.attention.Attention`.

    Args:
        width: features of a token; a multiple of ``num_heads`` unless ``head_dim`` is given.
        num_heads: number of heads.
        normalise: a function of the softmax family, ``(logits, dim) -> probabilities``; None for softmax on the fused
            kernel.
        gate: a module ``(y, x) -> y``, of what is gated, ``[batch, heads, time, head_dim]``, and the layer's input.
        gate_position: what is gated: the "heads" after attention, or the "value", "key" or "query" just after their
            projection; or the layer's "output", which is one head of ``width`` features.
        num_kv_heads: number of heads of keys and values, which ``num_heads / num_kv_heads`` query heads in a row share;
            by default every query head has its own.
        head_dim: features of a head; by default ``width / num_heads``.
        is_causal: whether a token sees itself and earlier ones only.
        bias: whether the four projections have one.
        dropout: share of the attention weights that are zeroed in training.
        rotary_base: rotate queries and keys by their positions, counted from the first token of the cache, with this
            base (Llama's is 10,000); None for layers that know no positions.
        has_qk_norm: whether queries and keys are divided by their root mean square and scaled by learned factors,
            before the rotation.

    Raises:
        ValueError: sizes below 1, a width that is no multiple of the heads, heads that are no multiple of those of keys
            and values, an odd size of the heads where they are rotated, an unknown position, or dropout outside [0, 1).
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        normalise: Normaliser | None = None,
        gate: nn.Module | None = None,
        gate_position: GatePosition = "heads",
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        is_causal: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
        rotary_base: float | None = None,
        has_qk_norm: bool = False,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        head_dim = check_heads(width, num_heads, num_kv_heads, head_dim)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout lies in [0, 1), got {dropout}")
        check_position(gate_position)
        if rotary_base is not None:
            rotary_angles(0, head_dim, base=rotary_base)  # checks both
        self.width = width
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.is_causal = is_causal
        self.dropout = dropout
        self.normalise = normalise
        self.rotary_base = rotary_base
        self.query = nn.Linear(width, num_heads * head_dim, bias=bias)
        self.key = nn.Linear(width, num_kv_heads * head_dim, bias=bias)
        self.value = nn.Linear(width, num_kv_heads * head_dim, bias=bias)
        self.output = nn.Linear(num_heads * head_dim, width, bias=bias)
        self.query_norm = nn.RMSNorm(head_dim) if has_qk_norm else None
        self.key_norm = nn.RMSNorm(head_dim) if has_qk_norm else None
        self.gate = gate
        self.gate_position = gate_position

    def new_cache(self) -> KeyValueCache:
        """Return an empty cache."""
        return KeyValueCache()

    def heads(
        self, x: Float[Tensor, "batch time width"]
    ) -> tuple[
        Float[Tensor, "batch heads time head_dim"],
        Float[Tensor, "batch kv_heads time head_dim"],
        Float[Tensor, "batch kv_heads time head_dim"],
    ]:
        """Return queries, keys and values by head: gated and normalised where the layer does that, not rotated."""
        query, key, value = (
            self._gated(position, projection(x).reshape(*x.shape[:2], -1, self.head_dim).transpose(1, 2), x)
            for position, projection in (("query", self.query), ("key", self.key), ("value", self.value))
        )
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        return query, key, value

    def place(
        self,
        query: Float[Tensor, "batch heads time head_dim"],
        key: Float[Tensor, "batch kv_heads time head_dim"],
        start: int = 0,
    ) -> tuple[Float[Tensor, "batch heads time head_dim"], Float[Tensor, "batch kv_heads time head_dim"]]:
        """Rotate queries and keys by their positions, where the layer does that.

        Args:
            query: from `heads`.
            key: from `heads`.
            start: position of the first token.
        """
        if self.rotary_base is None:
            return query, key
        angles = rotary_angles(query.shape[2], query.shape[3], start=start, base=self.rotary_base, device=query.device)
        return rotate(query, angles), rotate(key, angles)

    def project(
        self, x: Float[Tensor, "batch time width"], start: int = 0
    ) -> tuple[
        Float[Tensor, "batch heads time head_dim"],
        Float[Tensor, "batch kv_heads time head_dim"],
        Float[Tensor, "batch kv_heads time head_dim"],
    ]:
        """Return queries, keys and values of the tokens by head: gated, normalised and rotated where the layer does so.

        Args:
            x: tokens.
            start: position of the first.
        """
        query, key, value = self.heads(x)
        return (*self.place(query, key, start), value)

    def weights(
        self, x: Float[Tensor, "batch time width"], mask: Bool[Tensor, "*mask"] | None = None
    ) -> Float[Tensor, "batch heads time time"]:
        """Return the attention weights, before dropout; to look at, as `forward` does not keep them.

        Raises:
            ValueError: see `postern.attention.Attention`.
        """
        check_input(x, self.width)
        query, key, _ = self.project(x)
        normalise = torch.softmax if self.normalise is None else self.normalise
        return attention_weights(query, key, mask, is_causal=self.is_causal, normalise=normalise)

    def attend(
        self,
        query: Float[Tensor, "batch heads queries head_dim"],
        key: Float[Tensor, "batch kv_heads keys head_dim"],
        value: Float[Tensor, "batch kv_heads keys head_dim"],
        mask: Bool[Tensor, "*mask"] | None,
    ) -> Float[Tensor, "batch heads queries head_dim"]:
        """Return the heads' outputs, before the gate; what variants replace."""
        return attend(
            query,
            key,
            value,
            mask,
            is_causal=self.is_causal,
            normalise=self.normalise,
            dropout=self.dropout if self.training else 0.0,
        )

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        mask: Bool[Tensor, "*mask"] | None = None,
        cache: KeyValueCache | None = None,
    ) -> Float[Tensor, "batch time width"]:
        """Attend; see `postern.attention.Attention` for the mask and the cache.

        Raises:
            ValueError: an input of another width, or a mask of another shape or dtype.
        """
        check_input(x, self.width)
        query, key, value = self.project(x, 0 if cache is None else len(cache))
        if cache is not None:
            key, value = cache.append(key, value)
        heads = self.attend(query, key, value, mask)
        merged = self.output(self._gated("heads", heads, x).transpose(1, 2).flatten(2))
        return self._gated("output", merged.unsqueeze(1), x).squeeze(1)

    def _gated(self, position: str, y: Tensor, x: Tensor) -> Tensor:
        if self.gate is None or position != self.gate_position:
            return y
        gated: Tensor = self.gate(y, x)
        return gated

    def extra_repr(self) -> str:
        """Return what the printed module says of its settings."""
        kv_heads = "" if self.num_kv_heads == self.num_heads else f", num_kv_heads={self.num_kv_heads}"
        rotary = "" if self.rotary_base is None else f", rotary_base={self.rotary_base:g}"
        position = "" if self.gate is None else f", gate_position={self.gate_position!r}"
        return f"width={self.width}, num_heads={self.num_heads}{kv_heads}, is_causal={self.is_causal}{rotary}{position}"


def check_heads(width: int, num_heads: int, num_kv_heads: int = 1, head_dim: int | None = None) -> int:
    """Check that tokens can be cut into heads, and that these can share keys and values; return the size of a head.

    Raises:
        ValueError: sizes below 1, a width that is no multiple of the heads where that makes their size, or heads that
            are no multiple of those of keys and values.
    """
    if num_heads < 1 or width < 1 or (head_dim is None and width % num_heads):
        raise ValueError(f"width must be a positive multiple of num_heads, got {width} and {num_heads}")
    if head_dim is not None and head_dim < 1:
        raise ValueError(f"head_dim must be at least 1, got {head_dim}")
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"num_heads must be a positive multiple of num_kv_heads, got {num_heads} and {num_kv_heads}")
    return width // num_heads if head_dim is None else head_dim


def check_position(position: str) -> None:
    """Check the place of a gate.

    Raises:
        ValueError: an unknown one.
    """
    if position not in get_args(GatePosition):
        raise ValueError(f"a gate's position is one of {', '.join(get_args(GatePosition))}; got {position!r}")
