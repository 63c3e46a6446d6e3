"""Choosing blocks of the attention map to keep: rules over scores, and scores that need no training.

Paper: "SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs", arXiv 2410.13276. The scores are those that
it is compared with: the pooled map itself, the first and the latest blocks ("Efficient Streaming Language Models with
Attention Sinks", arXiv 2309.17453), products of mean-pooled queries and keys ("MInference 1.0", arXiv 2407.02490),
and bounds by the channels' extremes ("Quest", arXiv 2406.10774).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from postern.attention.attn_gate import causal_blocks, mask_later_blocks, pool_blocks
from postern.attention.block_target import pooled_attention_target
from postern.attention.self_attention import repeat_heads


def select_blocks(
    scores: Float[Tensor, "batch heads blocks blocks"],
    *,
    threshold: float | None = None,
    density: float | None = None,
    top_k: int | None = None,
    dense_last: int = 2,
    keeps_diagonal: bool = True,
    num_blocks: Int[Tensor, " batch"] | None = None,
) -> Bool[Tensor, "batch heads blocks blocks"]:
    """Choose the blocks of each row that are kept, none of them later than the row.

    ============  ====================================================================================
    rule          blocks kept of a row
    ============  ====================================================================================
    threshold     those where ``softmax(scores) > threshold``
    density       the ``k = max(1, int((1 - sqrt(1 - density)) num_blocks))`` with the highest scores
    top_k         the k with the highest scores
    ============  ====================================================================================

    ``density`` is about the share of the causal triangle that is kept: its square root, as rows above the k-th have
    fewer than k blocks. The diagonal counts among the k.

    Args:
        scores: of a gate or another scorer; those of later blocks do not matter.
        threshold: in [0, 1); typical for the paper's gates are 5e-4 to 5e-3.
        density: in (0, 1].
        top_k: at least 1.
        dense_last: the last rows that keep all their blocks: they lead to the first generated token.
        keeps_diagonal: whether each row keeps its own block whatever its score.
        num_blocks: blocks of each sequence, which stand first, where there is padding.

    Raises:
        ValueError: not exactly one of the three rules, or one outside its range.
    """
    check_rule(threshold, density, top_k, dense_last)
    n = scores.shape[-1]
    index = torch.arange(n, device=scores.device)
    counts = index.new_full((1,), n) if num_blocks is None else num_blocks
    is_own = (index[:, None] == index) if keeps_diagonal else None
    if threshold is not None:
        kept = mask_later_blocks(scores).softmax(-1) > threshold
        if is_own is not None:
            kept = kept | is_own
    else:
        if density is not None:
            share = 1 - math.sqrt(1 - density)
            most, k = max(1, int(share * n)), (share * counts.double()).long().clamp_min(1)
        else:
            assert top_k is not None
            most, k = min(top_k, n), counts.new_full(counts.shape, top_k)
        ranked = mask_later_blocks(scores)
        if is_own is not None:
            ranked = ranked.masked_fill(is_own, torch.inf)
        best = ranked.topk(most, dim=-1).indices
        is_among = index[:most] < k[:, None]
        kept = torch.zeros_like(ranked, dtype=torch.bool)
        kept = kept.scatter(-1, best, is_among[:, None, None].expand(best.shape))
    is_last = index >= counts[:, None] - dense_last
    return (kept | is_last[:, None, :, None]) & causal_blocks(n, scores.device)


def check_rule(
    threshold: float | None = None, density: float | None = None, top_k: int | None = None, dense_last: int = 0
) -> None:
    """Check the rule of `select_blocks`.

    Raises:
        ValueError: not exactly one of the three, or one outside its range.
    """
    given = {
        name: value
        for name, value in (("threshold", threshold), ("density", density), ("top_k", top_k))
        if value is not None
    }
    if len(given) != 1:
        raise ValueError(f"blocks are chosen by one of threshold, density and top_k, got {given or 'none'}")
    if threshold is not None and not 0 <= threshold < 1:
        raise ValueError(f"threshold is a probability in [0, 1), got {threshold}")
    if density is not None and not 0 < density <= 1:
        raise ValueError(f"density is a share in (0, 1], got {density}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is at least 1, got {top_k}")
    if dense_last < 0:
        raise ValueError(f"dense_last is a number of rows, at least 0; got {dense_last}")


def block_density(blocks: Bool[Tensor, "*batch blocks blocks"]) -> float:
    """The share of the causal triangle of blocks that is kept, by number of blocks."""
    n = blocks.shape[-1]
    causal = blocks & causal_blocks(n, blocks.device)
    return causal.double().mean().item() * n * n / (n * (n + 1) / 2)


# Scores without training ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScorerInput:
    """What a scorer may look at.

    Attributes:
        query: queries, rotated as in the model.
        key: keys, rotated as in the model.
        plain_query: queries before the rotation.
        plain_key: keys before the rotation.
        block: tokens of a block.
        lengths: tokens of each sequence, which stand first; None where there is no padding.
        scale: of the logits.
    """

    query: Float[Tensor, "batch heads time head_dim"]
    key: Float[Tensor, "batch kv_heads time head_dim"]
    plain_query: Float[Tensor, "batch heads time head_dim"]
    plain_key: Float[Tensor, "batch kv_heads time head_dim"]
    block: int
    lengths: Int[Tensor, " batch"] | None = None
    scale: float | None = None

    @property
    def num_blocks(self) -> int:
        """Blocks of the longest sequence."""
        return -(-self.query.shape[2] // self.block)


BlockScorer = Callable[[ScorerInput], Tensor]


def oracle_scores(x: ScorerInput) -> Float[Tensor, "batch heads blocks blocks"]:
    """Logarithms of the pooled attention map itself, which costs more than attention."""
    target = pooled_attention_target(x.query, x.key, x.block, lengths=x.lengths, scale=x.scale)
    return target.clamp_min(torch.finfo(target.dtype).tiny).log()


def streaming_scores(x: ScorerInput) -> Float[Tensor, "batch heads blocks blocks"]:
    """The first block before all, then the latest."""
    n = x.num_blocks
    order = torch.arange(n, device=x.query.device, dtype=torch.float32)
    order[0] = n
    return order.expand(x.query.shape[0], x.query.shape[1], n, n)


def mean_pooled_scores(x: ScorerInput, *, is_rotated: bool = False) -> Float[Tensor, "batch heads blocks blocks"]:
    """``pool(Q) pool(K)^T * scale`` of means over blocks.

    Args:
        x: queries and keys.
        is_rotated: whether they are taken as rotated, as MInference does for its pattern of blocks.
    """
    query, key = (x.query, x.key) if is_rotated else (x.plain_query, x.plain_key)
    q, k = pool_blocks(query, x.block, lengths=x.lengths), pool_blocks(key, x.block, lengths=x.lengths)
    return (q * _scale(x)) @ repeat_heads(k, q.shape[1]).transpose(-1, -2)


def minference_block_scores(x: ScorerInput) -> Float[Tensor, "batch heads blocks blocks"]:
    """MInference's estimate for its pattern of blocks: `mean_pooled_scores` of what is rotated."""
    return mean_pooled_scores(x, is_rotated=True)


def quest_scores(x: ScorerInput, *, is_rotated: bool = True) -> Float[Tensor, "batch heads blocks blocks"]:
    """Quest's bound, ``sum over d of max(q_d max(K_d), q_d min(K_d))``, of the query in the block with the largest.

    Quest is made for one query at a time; this is its extension to blocks of queries.

    Args:
        x: queries and keys.
        is_rotated: whether they are taken as rotated, as Quest does.
    """
    query, key = (x.query, x.key) if is_rotated else (x.plain_query, x.plain_key)
    high, low = pool_blocks(key, x.block, ("max", "min"), x.lengths).chunk(2, dim=-1)
    # max(q h, q l) is q h where q > 0, else q l
    bound = query.clamp_min(0) @ repeat_heads(high, query.shape[1]).transpose(-1, -2)
    bound = bound + query.clamp_max(0) @ repeat_heads(low, query.shape[1]).transpose(-1, -2)
    return pool_blocks(bound * _scale(x), x.block, ("max",), x.lengths)


def random_scores(x: ScorerInput) -> Float[Tensor, "batch heads blocks blocks"]:
    """Uniform numbers, from torch's global generator."""
    n = x.num_blocks
    return torch.rand(x.query.shape[0], x.query.shape[1], n, n, device=x.query.device)


def _scale(x: ScorerInput) -> float:
    return x.query.shape[-1] ** -0.5 if x.scale is None else x.scale


BLOCK_SCORERS: Mapping[str, BlockScorer] = MappingProxyType(
    {
        "oracle": oracle_scores,
        "streaming": streaming_scores,
        "avgpool_qk": mean_pooled_scores,
        "quest": quest_scores,
        "minference_block": minference_block_scores,
        "random": random_scores,
    }
)
