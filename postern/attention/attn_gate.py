"""A small learnt attention over blocks of tokens that foretells where the attention of a trained model goes.

Paper: "SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs", arXiv 2410.13276.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from postern.attention.rotary import rotary_angles, rotate
from postern.attention.self_attention import check_heads, repeat_heads

Pooling = Literal["avg", "max", "min"]
POOLINGS: tuple[Pooling, ...] = ("avg", "max", "min")


def pool_blocks(
    x: Float[Tensor, "batch heads time dim"],
    block: int,
    poolings: Sequence[Pooling] = ("avg",),
    lengths: Int[Tensor, " batch"] | None = None,
) -> Float[Tensor, "batch heads blocks pooled"]:
    """Pool each block of tokens; the results of several poolings stand side by side.

    A ragged last block is pooled over its own tokens; blocks without tokens are 0.

    Args:
        x: queries or keys.
        block: tokens of a block.
        poolings: "avg", "max" or "min", one or several.
        lengths: tokens of each sequence, which stand first; None where all are as long as ``x``.

    Raises:
        ValueError: no tokens, a block below 1, or no or unknown poolings.
    """
    check_poolings(poolings)
    batch, heads, time, _ = x.shape
    if block < 1 or time < 1:
        raise ValueError(f"blocks have at least one token, got blocks of {block} and {time} tokens")
    if lengths is None:
        whole = time - time % block
        results = []
        for start, stop, size in ((0, whole, block), (whole, time, time - whole)):
            if start < stop:
                blocks = x[:, :, start:stop].reshape(batch, heads, -1, size, x.shape[3])
                results.append(torch.cat([_pooled(blocks, pooling) for pooling in poolings], dim=-1))
        return torch.cat(results, dim=2)
    rest = -time % block
    is_token = torch.arange(time + rest, device=x.device) < lengths[:, None]
    is_token = is_token.view(batch, 1, -1, block, 1)
    blocks = F.pad(x, (0, 0, 0, rest)).view(batch, heads, -1, block, x.shape[3])
    is_empty = ~is_token.any(3)
    results = []
    for pooling in poolings:
        if pooling == "avg":
            result = (blocks * is_token).sum(3) / is_token.sum(3).clamp_min(1)
        else:
            limit = torch.finfo(x.dtype).min if pooling == "max" else torch.finfo(x.dtype).max
            result = _pooled(blocks.masked_fill(~is_token, limit), pooling)
        results.append(result.masked_fill(is_empty, 0.0))
    return torch.cat(results, dim=-1)


def check_poolings(poolings: Sequence[Pooling]) -> None:
    """Check a choice of poolings.

    Raises:
        ValueError: none, an unknown one, or one twice.
    """
    if not poolings or len(set(poolings)) != len(poolings) or not set(poolings) <= set(POOLINGS):
        raise ValueError(f"poolings are one or several of {', '.join(POOLINGS)}, each once; got {tuple(poolings)!r}")


def _pooled(blocks: Tensor, pooling: Pooling) -> Tensor:
    if pooling == "avg":
        return blocks.mean(3)
    return blocks.amax(3) if pooling == "max" else blocks.amin(3)


def causal_blocks(num_blocks: int, device: torch.device | None = None) -> Tensor:
    """True where a block of queries may see a block of keys: ``[num_blocks, num_blocks]``, lower triangular."""
    return torch.ones(num_blocks, num_blocks, dtype=torch.bool, device=device).tril()


def mask_later_blocks(scores: Float[Tensor, "batch heads blocks blocks"]) -> Float[Tensor, "batch heads blocks blocks"]:
    """Put the scores of later blocks so low that softmax gives 0; finite, as minus infinity times 0 would be NaN."""
    return scores.masked_fill(~causal_blocks(scores.shape[-1], scores.device), torch.finfo(scores.dtype).min / 2)


class KeyCompressor(nn.Module):
    """One vector for each block of keys and head: ``rope(W_k pool(K))``, rotated by the block's first position.

    Args:
        head_dim: features of a key.
        num_heads: how many heads have weights; a multiple of ``num_kv_heads``.
        num_kv_heads: heads of keys.
        block: tokens of a block.
        gate_dim: features of the result.
        poolings: one or several of "avg", "max" and "min".
        rotary_base: base of the rotations; None for none.
        frequencies: the rotations themselves, ``[gate_dim / 2]``, instead of those of the base.

    Raises:
        ValueError: sizes below 1, heads that are no multiple of those of keys, unknown poolings, an odd ``gate_dim``
            with rotations, or frequencies of another size.
    """

    frequencies: Tensor | None

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        num_kv_heads: int,
        *,
        block: int,
        gate_dim: int,
        poolings: Sequence[Pooling],
        rotary_base: float | None,
        frequencies: Float[Tensor, " half"] | None,
    ) -> None:
        super().__init__()
        if min(head_dim, gate_dim, block) < 1:
            raise ValueError(f"sizes are positive, got head_dim={head_dim}, gate_dim={gate_dim}, block={block}")
        check_heads(num_heads * head_dim, num_heads, num_kv_heads)
        check_poolings(poolings)
        if rotary_base is not None or frequencies is not None:
            rotary_angles(0, gate_dim, base=rotary_base or 1.0, frequencies=frequencies)  # checks them
        self.block = block
        self.poolings = tuple(poolings)
        self.rotary_base = rotary_base
        self.weight = nn.Parameter(torch.empty(num_heads, len(poolings) * head_dim, gate_dim))
        self.register_buffer("frequencies", frequencies, persistent=False)
        draw_by_head(self.weight)

    def rotate(self, x: Float[Tensor, "batch heads time gate_dim"], start: int = 0, step: int = 1) -> Tensor:
        """Rotate vectors that stand at positions ``start``, ``start + step``, and so on, as the keys are rotated."""
        if self.rotary_base is None and self.frequencies is None:
            return x
        angles = rotary_angles(
            x.shape[2],
            x.shape[3],
            start=start,
            step=step,
            base=self.rotary_base or 1.0,
            frequencies=self.frequencies,
            device=x.device,
        )
        return rotate(x, angles)

    def forward(
        self,
        key: Float[Tensor, "batch kv_heads time head_dim"],
        lengths: Int[Tensor, " batch"] | None = None,
        start: int = 0,
    ) -> Float[Tensor, "batch heads blocks gate_dim"]:
        """Compress keys.

        Args:
            key: before rotation.
            lengths: tokens of each sequence, which stand first; None where there is no padding.
            start: position of the first key.
        """
        pooled = repeat_heads(pool_blocks(key, self.block, self.poolings, lengths), len(self.weight))
        return self.rotate(pooled @ self.weight, start, self.block)


def draw_by_head(weight: Float[Tensor, "heads inputs outputs"]) -> None:
    """Draw each head's weights uniformly, as Glorot does."""
    bound = (6 / (weight.shape[1] + weight.shape[2])) ** 0.5
    nn.init.uniform_(weight, -bound, bound)


class AttnGate(nn.Module):
    """Scores of all pairs of blocks: ``rope(W_q pool(Q)) rope(W_k pool(K))^T / sqrt(gate_dim)``.

    ``softmax(scores)`` is trained to be the block-pooled attention map of a model. Queries and keys go in **before**
    their rotation; the gate rotates what it made of them by the position of each block's first token.

    The paper's rule for the weights: with one pooling of the queries and ``gate_dim = head_dim`` there is no ``W_q``,
    which would be redundant, and each query head has its own ``W_k``; else each head of queries has a ``W_q`` and each
    head of keys a ``W_k``.

    Args:
        head_dim: features of a head.
        num_heads: heads of queries.
        num_kv_heads: heads of keys, which query heads in a row share; by default as many.
        block: tokens of a block.
        gate_dim: features of the gate, even; by default ``head_dim``.
        query_pooling: one or several of "avg", "max" and "min".
        key_pooling: one or several of "avg", "max" and "min".
        rotary_base: base of the model's rotations; None for a gate that knows no positions.
        frequencies: rotations of the gate's pairs of features by token instead, ``[gate_dim / 2]``, for models that
            scale theirs.
        has_query_weight: whether there is a ``W_q``; by default the paper's rule.

    Raises:
        ValueError: sizes below 1, heads that are no multiple of those of keys, unknown poolings, an odd ``gate_dim``
            with rotations, frequencies of another size, or no ``W_q`` where queries need one.
    """

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        block: int = 64,
        gate_dim: int | None = None,
        query_pooling: Sequence[Pooling] = ("avg",),
        key_pooling: Sequence[Pooling] = ("max", "min", "avg"),
        rotary_base: float | None = 10_000.0,
        frequencies: Float[Tensor, " half"] | None = None,
        has_query_weight: bool | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        gate_dim = head_dim if gate_dim is None else gate_dim
        check_poolings(query_pooling)
        is_redundant = len(query_pooling) == 1 and gate_dim == head_dim
        has_query_weight = not is_redundant if has_query_weight is None else has_query_weight
        if not has_query_weight and not is_redundant:
            raise ValueError(
                "without weights for the queries there is one query_pooling, and gate_dim is head_dim; got "
                f"{tuple(query_pooling)!r}, {gate_dim} and {head_dim}"
            )
        check_heads(num_heads * head_dim, num_heads, num_kv_heads)
        self.head_dim = head_dim
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.block = block
        self.gate_dim = gate_dim
        self.query_pooling = tuple(query_pooling)
        self.keys = KeyCompressor(
            head_dim,
            num_kv_heads if has_query_weight else num_heads,
            num_kv_heads,
            block=block,
            gate_dim=gate_dim,
            poolings=key_pooling,
            rotary_base=rotary_base,
            frequencies=frequencies,
        )
        self.query_weight = None
        if has_query_weight:
            self.query_weight = nn.Parameter(torch.empty(num_heads, len(query_pooling) * head_dim, gate_dim))
            draw_by_head(self.query_weight)

    def forward(
        self,
        query: Float[Tensor, "batch heads time head_dim"],
        key: Float[Tensor, "batch kv_heads time head_dim"],
        lengths: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch heads blocks blocks"]:
        """Return the scores, in float32 at least; those of later blocks are so low that softmax gives 0.

        Args:
            query: before rotation.
            key: before rotation.
            lengths: tokens of each sequence, which stand first; None where there is no padding.

        Raises:
            ValueError: queries or keys of other shapes.
        """
        batch, time = query.shape[0], query.shape[2]
        for x, heads in ((query, self.num_heads), (key, self.num_kv_heads)):
            if x.shape != (batch, heads, time, self.head_dim):
                raise ValueError(
                    f"the gate needs queries of {self.num_heads} and keys of {self.num_kv_heads} heads, [batch, heads, "
                    f"time, {self.head_dim}], got {list(query.shape)} and {list(key.shape)}"
                )
        q = pool_blocks(query, self.block, self.query_pooling, lengths)
        if self.query_weight is not None:
            q = q @ self.query_weight
        q = self.keys.rotate(q, step=self.block)
        k = repeat_heads(self.keys(key, lengths), self.num_heads)
        scores = (q * self.gate_dim**-0.5) @ k.transpose(-1, -2)
        return mask_later_blocks(scores.to(torch.promote_types(scores.dtype, torch.float32)))

    def extra_repr(self) -> str:
        """Return what the printed module says of its settings."""
        return f"num_heads={self.num_heads}, num_kv_heads={self.num_kv_heads}, block={self.block}"
