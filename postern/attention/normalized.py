"""Normalised attention: linear attention whose denominator is a learned function of the token instead of a sum.

The sum of the weights makes linear attention depend on positive features. Any positive number that the token itself
gives will do instead, and queries and keys keep their signs.

Paper: "Understanding the differences in Foundation Models: Attention, State Space Models, and Recurrent Neural
Networks", arXiv 2405.15731. Its code computes the matrix of products; here sums over the keys serve all queries. The
normaliser's weights start small, as its exponential can blow up early in training.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from postern.attention.lightning import lightning_attention
from postern.attention.linear import LinearState
from postern.attention.protocol import check_input, check_padding
from postern.attention.self_attention import check_heads, repeat_heads
from postern.precision import without_autocast

NormaliserKind = Literal["exp", "softplus", "sigmoid", "constant"]
_INITIAL_STD = 0.02


def normalized_attention(
    query: Float[Tensor, "batch heads queries key_dim"],
    key: Float[Tensor, "batch kv_heads keys key_dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    normaliser: Float[Tensor, "batch heads queries"],
    mask: Bool[Tensor, "batch keys"] | None = None,
    *,
    is_causal: bool = False,
    state: LinearState | None = None,
) -> Float[Tensor, "batch heads queries value_dim"]:
    """``o_t = sum_s (q_t . k_s) v_s / eta_t``, over all tokens or those up to t.

    Args:
        query: queries, of any sign.
        key: keys, of any sign; several query heads in a row may share one head.
        value: values.
        normaliser: ``eta``, positive.
        mask: true where a key may be attended to. A query that may attend to nothing gets zeros.
        is_causal: whether a query sees its own token and earlier ones only.
        state: of the tokens before, changed in place; only where the layer is causal.

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
    with without_autocast(query.device):
        q, k, v = query.to(dtype), key.to(dtype), value.to(dtype)
        if is_causal:
            output, memory = lightning_attention(q, k, v, state=None if state is None else state.memory)
            if state is not None:
                state.memory = memory
                state.length += k.shape[2]
        else:
            output = q @ repeat_heads(k.transpose(-1, -2) @ v, q.shape[1])
        output = output / normaliser.to(dtype).unsqueeze(-1)
    return output.to(value.dtype)


def normaliser_of(logits: Float[Tensor, "*shape"], kind: NormaliserKind) -> Float[Tensor, "*shape"]:
    """Return ``eta``: the exponential, softplus or sigmoid of the logits, or ones.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in get_args(NormaliserKind):
        raise ValueError(f"normaliser is one of {', '.join(get_args(NormaliserKind))}; got {kind!r}")
    if kind == "exp":
        return logits.exp()
    if kind == "softplus":
        # F.softplus's gradient has other strides in torch.compile's plan than in fact (torch 2.13)
        return torch.logaddexp(logits, torch.zeros_like(logits))
    return logits.sigmoid() if kind == "sigmoid" else torch.ones_like(logits)


class NormalizedAttention(nn.Module):
    """Multi-head attention ``W_O concat_h(sum_s (Q_h K_h^T) V_h / eta_h)`` with ``eta = exp(W_eta x + b)`` a head.

    It follows the protocol of `postern.attention.Attention`. Its cost grows with the time, its cache does not grow.
    Nothing sums to one: the outputs grow with the length of the sequence.

    Args:
        width: features of a token; a multiple of ``num_heads``.
        num_heads: number of heads.
        key_dim: features of a query or key a head, the state expansion; by default those of a value.
        normaliser: "exp", which the paper found best, "softplus", "sigmoid", or "constant" for a denominator of 1.
        is_causal: whether a token sees itself and earlier ones only.
        bias: whether the projections have one.

    Raises:
        ValueError: sizes below 1, a width that is no multiple of the heads, or an unknown normaliser.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        key_dim: int | None = None,
        normaliser: NormaliserKind = "exp",
        is_causal: bool = False,
        bias: bool = True,
    ) -> None:
        super().__init__()
        check_heads(width, num_heads)
        key_dim = width // num_heads if key_dim is None else key_dim
        if key_dim < 1:
            raise ValueError(f"key_dim must be at least 1, got {key_dim}")
        normaliser_of(torch.zeros(()), normaliser)  # checks it
        self.width = width
        self.num_heads = num_heads
        self.key_dim = key_dim
        self.normaliser = normaliser
        self.is_causal = is_causal
        self.query = nn.Linear(width, num_heads * key_dim, bias=bias)
        self.key = nn.Linear(width, num_heads * key_dim, bias=bias)
        self.value = nn.Linear(width, width, bias=bias)
        self.output = nn.Linear(width, width, bias=bias)
        self.normalise = None if normaliser == "constant" else nn.Linear(width, num_heads, bias=bias)
        if self.normalise is not None:
            nn.init.normal_(self.normalise.weight, std=_INITIAL_STD)
            if bias:
                nn.init.zeros_(self.normalise.bias)

    @property
    def state_size(self) -> int:
        """Numbers of the causal layer's state, for one sequence."""
        return self.width * self.key_dim

    def new_cache(self) -> LinearState:
        """Return an empty cache."""
        return LinearState()

    def project(
        self, x: Float[Tensor, "batch time width"]
    ) -> tuple[
        Float[Tensor, "batch heads time key_dim"],
        Float[Tensor, "batch heads time key_dim"],
        Float[Tensor, "batch heads time value_dim"],
        Float[Tensor, "batch heads time"],
    ]:
        """Return queries, keys, values and normalisers of the tokens by head."""
        query, key, value = (
            projection(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        logits = x.new_zeros(*x.shape[:2], self.num_heads) if self.normalise is None else self.normalise(x)
        with without_autocast(x.device):
            normaliser = normaliser_of(logits.to(torch.promote_types(logits.dtype, torch.float32)), self.normaliser)
        return query, key, value, normaliser.transpose(1, 2)

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
        start = 0 if cache is None else len(cache)
        check_padding(mask, x.shape[0], start + x.shape[1])
        query, key, value, normaliser = self.project(x)
        shown = None if mask is None else mask[:, start:]
        heads = normalized_attention(query, key, value, normaliser, shown, is_causal=self.is_causal, state=cache)
        merged: Tensor = self.output(heads.transpose(1, 2).flatten(2))
        return merged

    def extra_repr(self) -> str:
        """Return what the printed module says of its settings."""
        return (
            f"width={self.width}, num_heads={self.num_heads}, key_dim={self.key_dim}, "
            f"normaliser={self.normaliser!r}, is_causal={self.is_causal}"
        )
