"""Multi-head self-attention whose normaliser and gate can be exchanged: the baseline, and the frame of its variants.

Without either it is the attention of "Attention Is All You Need" (arXiv 1706.03762) on PyTorch's fused kernel. A
normaliser is any function of the softmax family, ``(logits, dim) -> probabilities``; a gate is any module
``(x) -> factors`` for the heads' outputs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from postern.attention.protocol import check_input

Normaliser = Callable[[Tensor, int], Tensor]


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
    key: Float[Tensor, "batch heads keys head_dim"],
    mask: Bool[Tensor, "*mask"] | None = None,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    normalise: Normaliser = torch.softmax,
) -> Float[Tensor, "batch heads queries keys"]:
    """``normalise(scale * Q K^T)`` over the allowed keys; 0 for the others.

    Args:
        query: queries.
        key: keys.
        mask: see `allowed_keys`.
        is_causal: see `allowed_keys`.
        scale: by default ``1 / sqrt(head_dim)``.
        normalise: a function of the softmax family.

    Raises:
        ValueError: see `allowed_keys`.
    """
    logits = attention_logits(query, key, scale)
    allowed = allowed_keys(query.shape[-2], key.shape[-2], mask, is_causal=is_causal, device=query.device)
    if allowed is None:
        return normalise(logits, -1)
    # finite, as a row of nothing but minus infinity would be NaN
    weights = normalise(logits.masked_fill(~allowed, torch.finfo(logits.dtype).min), -1)
    return weights if mask is None else weights.masked_fill(~allowed, 0.0)


def attend(
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch heads keys head_dim"],
    value: Float[Tensor, "batch heads keys value_dim"],
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
        key: keys.
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
        return torch.matmul(F.dropout(weights, dropout, training=dropout > 0), value)
    if mask is None and is_causal and query.shape[-2] == key.shape[-2]:
        return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True, scale=scale)
    allowed = allowed_keys(query.shape[-2], key.shape[-2], mask, is_causal=is_causal, device=query.device)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=allowed, dropout_p=dropout, scale=scale)


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


class SelfAttention(nn.Module):
    """Multi-head self-attention: ``W_O concat_h(gate_h(x) * normalise(Q_h K_h^T / sqrt(head_dim)) V_h)``.

    It follows the protocol of `postern.attention.Attention`.

    Args:
        width: features of a token; a multiple of ``num_heads``.
        num_heads: number of heads.
        is_causal: whether a token sees itself and earlier ones only.
        bias: whether the four projections have one.
        dropout: share of the attention weights that are zeroed in training.
        normalise: a function of the softmax family, ``(logits, dim) -> probabilities``; None for softmax on the fused
            kernel.
        gate: a module ``(x) -> [batch, heads, time, 1 or head_dim]`` of factors for the heads' outputs.

    Raises:
        ValueError: sizes below 1, a width that is no multiple of the heads, or dropout outside [0, 1).
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        is_causal: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
        normalise: Normaliser | None = None,
        gate: nn.Module | None = None,
    ) -> None:
        super().__init__()
        check_heads(width, num_heads)
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout lies in [0, 1), got {dropout}")
        self.width = width
        self.num_heads = num_heads
        self.is_causal = is_causal
        self.dropout = dropout
        self.normalise = normalise
        self.query = nn.Linear(width, width, bias=bias)
        self.key = nn.Linear(width, width, bias=bias)
        self.value = nn.Linear(width, width, bias=bias)
        self.output = nn.Linear(width, width, bias=bias)
        self.gate = gate

    def new_cache(self) -> KeyValueCache:
        """Return an empty cache."""
        return KeyValueCache()

    def project(
        self, x: Float[Tensor, "batch time width"]
    ) -> tuple[
        Float[Tensor, "batch heads time head_dim"],
        Float[Tensor, "batch heads time head_dim"],
        Float[Tensor, "batch heads time head_dim"],
    ]:
        """Return queries, keys and values of the tokens, by head."""
        batch, time, _ = x.shape
        query, key, value = (
            projection(x).view(batch, time, self.num_heads, -1).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        return query, key, value

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
        query, key, value = self.project(x)
        if cache is not None:
            key, value = cache.append(key, value)
        heads = attend(
            query,
            key,
            value,
            mask,
            is_causal=self.is_causal,
            normalise=self.normalise,
            dropout=self.dropout if self.training else 0.0,
        )
        if self.gate is not None:
            heads = heads * self.gate(x)
        merged: Tensor = self.output(heads.transpose(1, 2).flatten(2))
        return merged

    def extra_repr(self) -> str:
        """Return what the printed module says of its settings."""
        return f"width={self.width}, num_heads={self.num_heads}, is_causal={self.is_causal}"


def check_heads(width: int, num_heads: int) -> None:
    """Check that tokens can be cut into heads.

    Raises:
        ValueError: sizes below 1, or a width that is no multiple of the heads.
    """
    if num_heads < 1 or width < 1 or width % num_heads:
        raise ValueError(f"width must be a positive multiple of num_heads, got {width} and {num_heads}")
