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
        total: ``sum_s k_s``, ``[batch, heads, key_dim]``.
        length: number of tokens.
    """

    memory: Tensor | None = None
    total: Tensor | None = None
    length: int = 0

    def __len__(self) -> int:
        return self.length

    def reorder(self, rows: Int[Tensor, " batch"]) -> None:
        """Keep these sequences of the batch, in this order."""
        if self.memory is not None and self.total is not None:
            self.memory, self.total = self.memory.index_select(0, rows), self.total.index_select(0, rows)


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
) -> Float[Tensor, "batch heads queries value_dim"]:
    """``o_t = sum_s (q_t . k_s) v_s / (sum_s q_t . k_s + eps)``, over all tokens or those up to t.

    Args:
        query: features of the queries, at least 0.
        key: features of the keys, at least 0; several query heads in a row may share one head.
        value: values.
        mask: true where a key may be attended to. A query that may attend to nothing gets zeros.
        is_causal: whether a query sees its own token and earlier ones only.
        angles: rotate the features by these in the numerator, and not in the denominator, which stays positive.
        state: of the tokens before, changed in place; only where the layer is causal.
        eps: keeps the denominator from 0.

    Returns:
        The output in the dtype of the values.

    Raises:
        ValueError: a mask by query or head, or a state without the causal order.
    """
    check_padding(mask, key.shape[0], key.shape[2])
    if state is not None and not is_causal:
        raise ValueError("a cache needs the causal order: without it later tokens change what earlier ones see")
    dtype = torch.promote_types(value.dtype, torch.float32)
    if mask is not None:
        key = key * mask[:, None, :, None]
    key, value = repeat_heads(key, query.shape[1]), repeat_heads(value, query.shape[1])
    with without_autocast(query.device):
        q, k, v = query.to(dtype), key.to(dtype), value.to(dtype)
        rotated_q, rotated_k = (q, k) if angles is None else (rotate(q, angles), rotate(k, angles))
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
        output = numerator / (denominator + eps)
    return output.to(value.dtype)


class LinearAttention(nn.Module):
    """Multi-head linear attention: ``W_O concat_h(sum_s (f(Q_h) f(K_h)^T) V_h / sum_s f(Q_h) f(K_h)^T)``.

    It follows the protocol of `postern.attention.Attention`. Its cost grows with the time, its cache does not grow.

    Args:
        width: features of a token; a multiple of ``num_heads``.
        num_heads: number of heads.
        query_features: positive features of the queries, ``[..., head_dim] -> [..., features]``.
        key_features: of the keys; by default those of the queries.
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
        self.width = width
        self.num_heads = num_heads
        self.is_causal = is_causal
        self.rotary_base = rotary_base
        self.eps = eps
        self.query_features = query_features
        self.key_features = query_features if key_features is None else key_features
        self.query = nn.Linear(width, width, bias=bias)
        self.key = nn.Linear(width, num_kv_heads * head_dim, bias=bias)
        self.value = nn.Linear(width, num_kv_heads * head_dim, bias=bias)
        self.output = nn.Linear(width, width, bias=bias)

    def new_cache(self) -> LinearState:
        """Return an empty cache."""
        return LinearState()

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
        check_input(x, self.width)
        start, time = 0 if cache is None else len(cache), x.shape[1]
        check_padding(mask, x.shape[0], start + time)
        query, key, value = (
            projection(x).unflatten(-1, (-1, self.width // self.num_heads))
            for projection in (self.query, self.key, self.value)
        )
        query, key, value = (y.transpose(1, 2) for y in (self.query_features(query), self.key_features(key), value))
        angles = None
        if self.rotary_base is not None:
            angles = rotary_angles(time, query.shape[-1], start=start, base=self.rotary_base, device=x.device)
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
