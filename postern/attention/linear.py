"""Linear attention: features of queries and keys in the place of the exponential, so that sums over keys are shared.

Paper: "Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention", arXiv 2006.16236.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from postern.attention.lightning import lightning_attention
from postern.attention.protocol import check_input, check_padding
from postern.attention.rotary import rotary_angles, rotate
from postern.attention.self_attention import check_heads, repeat_heads
from postern.precision import without_autocast

FeatureMap = Callable[[Tensor], Tensor]


@dataclass
class LinearState:
    """What linear attention keeps of the tokens it has seen: sums, whose size does not depend on their number.

    Attributes:
        memory: ``sum_s k_s v_s^T``, ``[batch, heads, key_dim, value_dim]``.
        total: ``sum_s k_s``, ``[batch, heads, key_dim]``, where the weights are normalised by their sum.
        count: number of keys that may be attended to, ``[batch]``.
        length: number of tokens.
    """

    memory: Tensor | None = None
    total: Tensor | None = None
    count: Tensor | None = None
    length: int = 0

    def __len__(self) -> int:
        return self.length

    def reorder(self, rows: Int[Tensor, " batch"]) -> None:
        """Keep these sequences of the batch, in this order."""
        for name in ("memory", "total", "count"):
            kept = getattr(self, name)
            if kept is not None:
                setattr(self, name, kept.index_select(0, rows))


def elu_features(x: Tensor) -> Tensor:
    """``elu(x) + 1``, positive."""
    # F.elu's gradient has other strides in torch.compile's plan than in fact (torch 2.13)
    return torch.where(x > 0, x + 1, x.clamp_max(0).exp())


def linear_attention(
    query: Float[Tensor, "batch heads queries features"],
    key: Float[Tensor, "batch kv_heads keys features"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    mask: Bool[Tensor, "batch keys"] | None = None,
    *,
    is_causal: bool = False,
    angles: Float[Tensor, "keys half"] | None = None,
    state: LinearState | None = None,
    eps: float = 1e-6,
    is_averaged: bool = False,
) -> Float[Tensor, "batch heads queries value_dim"]:
    """``o_t = sum_s (q_t . k_s) v_s / (sum_s q_t . k_s + eps)``, over all tokens or those up to t.

    Args:
        query: features of the queries, at least 0.
        key: features of the keys, at least 0; several query heads in a row may share one head.
        value: values.
        mask: true where a key may be attended to. A query that may attend to nothing gets zeros.
        is_causal: whether a query sees its own token and earlier ones only.
        angles: rotate the features by these in the numerator, and not in the denominator, which stays positive. Of
            more features than twice the angles, each group of that many is rotated alike.
        state: of the tokens before, changed in place; only where the layer is causal.
        eps: keeps the denominator from 0.
        is_averaged: whether the sums are means over the keys that a query may attend to, so that eps weighs the same at
            any length.

    Returns:
        The output in the dtype of the values.

    Raises:
        ValueError: a mask by query or head, a state without the causal order, or angles that do not divide the
            features.
    """
    if angles is not None and query.shape[-1] % (2 * angles.shape[-1]):
        raise ValueError(f"{angles.shape[-1]} angles rotate groups of twice as many features, got {query.shape[-1]}")
    check_padding(mask, key.shape[0], key.shape[2])
    if state is not None and not is_causal:
        raise ValueError("a cache needs the causal order: without it later tokens change what earlier ones see")
    dtype = torch.promote_types(value.dtype, torch.float32)
    floor = eps * _counts(key, mask, state, is_causal=is_causal).to(dtype)[:, None, :, None] if is_averaged else eps
    if mask is not None:
        key = key * mask[:, None, :, None]
    key, value = repeat_heads(key, query.shape[1]), repeat_heads(value, query.shape[1])
    with without_autocast(query.device):
        q, k, v = query.to(dtype), key.to(dtype), value.to(dtype)
        rotated_q, rotated_k = (q, k) if angles is None else (_rotate_groups(q, angles), _rotate_groups(k, angles))
        if is_causal:
            memory = None if state is None else state.memory
            numerator, memory = lightning_attention(rotated_q, rotated_k, v, state=memory)
            totals = k.cumsum(2)
            if state is not None:
                if state.total is not None:
                    totals = totals + state.total[:, :, None]
                state.memory, state.total = memory, totals[:, :, -1]
                state.length += k.shape[2]
            denominator = (q * totals).sum(-1, keepdim=True)
        else:
            numerator = rotated_q @ (rotated_k.transpose(-1, -2) @ v)
            denominator = q @ k.sum(2)[..., None]
        output = numerator / (denominator + floor)
    return output.to(value.dtype)


def _rotate_groups(x: Tensor, angles: Tensor) -> Tensor:
    groups = x.reshape(*x.shape[:-1], -1, 2 * angles.shape[-1])
    return rotate(groups, angles[:, None]).flatten(-2)


def _counts(key: Tensor, mask: Tensor | None, state: LinearState | None, *, is_causal: bool) -> Tensor:
    """How many keys a query may attend to, at least 1; ``[batch, keys]`` in the causal order, else ``[batch, 1]``."""
    allowed = key.new_ones(key.shape[0], key.shape[2], dtype=torch.long) if mask is None else mask.long()
    if not is_causal:
        return allowed.sum(1, keepdim=True).clamp_min(1)
    counts = allowed.cumsum(1)
    if state is not None:
        if state.count is not None:
            counts = counts + state.count[:, None]
        state.count = counts[:, -1]
    return counts.clamp_min(1)


def linear_attention_weights(
    query: Float[Tensor, "*batch queries features"], key: Float[Tensor, "*batch keys features"]
) -> Float[Tensor, "*batch queries keys"]:
    """``q_t . k_s / sum_s q_t . k_s``: the weights that linear attention never makes; to look at.

    Args:
        query: features of the queries, at least 0, and not orthogonal to all keys.
        key: features of the keys, at least 0.
    """
    products = query @ key.transpose(-1, -2)
    return products / products.sum(-1, keepdim=True)


class LinearAttention(nn.Module):
    """Multi-head linear attention: ``W_O concat_h(sum_s (f(Q_h) f(K_h)^T) V_h / sum_s f(Q_h) f(K_h)^T)``.

    It follows the protocol of `postern.attention.Attention`. Its cost grows with the time, its cache does not grow.

    Args:
        width: features of a token; a multiple of ``num_heads``.
        num_heads: number of heads.
        query_features: positive features of the queries, ``[..., key_dim] -> [..., features]``.
        key_features: of the keys; by default those of the queries.
        key_dim: size of a query or key before its features, by head; by default that of a value.
        num_kv_heads: number of heads of keys and values, which query heads in a row share; by default all have theirs.
        is_causal: whether a token sees itself and earlier ones only.
        bias: whether the four projections have one.
        rotary_base: rotate the features by their positions in the numerator, with this base; None for no positions.
        eps: added to the denominator.

    Raises:
        ValueError: sizes below 1, a width that is no multiple of the heads, or heads that are no multiple of those of
            keys and values.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        query_features: FeatureMap = elu_features,
        key_features: FeatureMap | None = None,
        key_dim: int | None = None,
        num_kv_heads: int | None = None,
        is_causal: bool = False,
        bias: bool = True,
        rotary_base: float | None = None,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_heads(width, num_heads, num_kv_heads)
        head_dim = width // num_heads
        key_dim = head_dim if key_dim is None else key_dim
        if key_dim < 1:
            raise ValueError(f"key_dim must be at least 1, got {key_dim}")
        self.width = width
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.is_causal = is_causal
        self.rotary_base = rotary_base
        self.eps = eps
        self.query_features = query_features
        self.key_features = query_features if key_features is None else key_features
        self.query = nn.Linear(width, num_heads * key_dim, bias=bias)
        self.key = nn.Linear(width, num_kv_heads * key_dim, bias=bias)
        self.value = nn.Linear(width, num_kv_heads * head_dim, bias=bias)
        self.output = nn.Linear(width, width, bias=bias)

    def new_cache(self) -> LinearState:
        """Return an empty cache."""
        return LinearState()

    def project(
        self, x: Float[Tensor, "batch time width"]
    ) -> tuple[
        Float[Tensor, "batch heads time key_dim"],
        Float[Tensor, "batch kv_heads time key_dim"],
        Float[Tensor, "batch kv_heads time value_dim"],
    ]:
        """Return queries, keys and values of the tokens by head, before their features.

        Raises:
            ValueError: an input of another width.
        """
        check_input(x, self.width)
        query, key, value = (
            projection(x).unflatten(-1, (heads, -1)).transpose(1, 2)
            for projection, heads in (
                (self.query, self.num_heads),
                (self.key, self.num_kv_heads),
                (self.value, self.num_kv_heads),
            )
        )
        return query, key, value

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        mask: Bool[Tensor, "batch keys"] | None = None,
        cache: LinearState | None = None,
    ) -> Float[Tensor, "batch time width"]:
        """Attend; see `postern.attention.Attention` for the mask and the cache.

        Raises:
            ValueError: an input of another width, a mask by query or head, or a cache for a layer that is not causal.
        """
        query, key, value = self.project(x)
        query, key = self.query_features(query), self.key_features(key)
        start = 0 if cache is None else len(cache)
        check_padding(mask, x.shape[0], start + x.shape[1])
        angles = None
        if self.rotary_base is not None:
            angles = rotary_angles(x.shape[1], query.shape[-1], start=start, base=self.rotary_base, device=x.device)
        heads = linear_attention(
            query,
            key,
            value,
            None if mask is None else mask[:, start:],
            is_causal=self.is_causal,
            angles=angles,
            state=cache,
            eps=self.eps,
        )
        merged: Tensor = self.output(heads.transpose(1, 2).flatten(2))
        return merged

    def extra_repr(self) -> str:
        """Return what the printed module says of its settings."""
        return f"width={self.width}, num_heads={self.num_heads}, is_causal={self.is_causal}"
