"""What a gate over blocks learns: the largest weight of each block of a trained model's attention map.

Paper: "SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs", arXiv 2410.13276.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from postern.attention.self_attention import attention_logits, repeat_heads
from postern.precision import without_autocast

Reduction = Literal["batchmean", "mean"]
_ELEMENTS_AT_ONCE = 1 << 24


@torch.no_grad()
def pooled_attention_target(
    query: Float[Tensor, "batch heads time head_dim"],
    key: Float[Tensor, "batch kv_heads time head_dim"],
    block: int,
    *,
    lengths: Int[Tensor, " batch"] | None = None,
    scale: float | None = None,
    elements_at_once: int = _ELEMENTS_AT_ONCE,
) -> Float[Tensor, "batch heads blocks blocks"]:
    """``G_ij = max over s in block i, t in block j of softmax(scale * Q K^T)_st``, each row divided by its sum.

    The attention is causal. A few rows of blocks are made at a time, so that the whole map is never in memory.

    Args:
        query: rotated as in the model.
        key: rotated as in the model.
        block: tokens of a block.
        lengths: tokens of each sequence, which stand first; rows of blocks without tokens are 0.
        scale: by default ``1 / sqrt(head_dim)``.
        elements_at_once: logits that are in memory at once, about; at least one row of blocks is.

    Returns:
        The target, in float32 at least, without a gradient.

    Raises:
        ValueError: a block below 1, or queries and keys of different lengths.
    """
    batch, heads, time, _ = query.shape
    if block < 1 or key.shape[2] != time or time < 1:
        raise ValueError(
            f"blocks of at least one token need as many queries as keys, got blocks of {block}, "
            f"{time} queries and {key.shape[2]} keys"
        )
    dtype = torch.promote_types(query.dtype, torch.float32)
    num_blocks = -(-time // block)
    rows_at_once = max(1, elements_at_once // (batch * heads * block * num_blocks * block))
    with without_autocast(query.device):
        rest = (0, 0, 0, num_blocks * block - time)
        q, k = F.pad(query.to(dtype), rest), F.pad(repeat_heads(key, heads).to(dtype), rest)
        position = torch.arange(num_blocks * block, device=query.device)
        ends = position.new_full((batch,), time) if lengths is None else lengths
        rows = []
        for start in range(0, num_blocks, rows_at_once):
            stop = min(start + rows_at_once, num_blocks)
            of_queries, end = position[start * block : stop * block], stop * block
            logits = attention_logits(q[:, :, start * block : end], k[:, :, :end], scale)
            logits = logits.masked_fill_(of_queries[:, None] < position[:end], -torch.inf)
            # r_ij, m_i and l_i of the fused kernel: the largest logit of a row in each block, in all, and the sum
            by_block = logits.view(*logits.shape[:3], stop, block).amax(4)
            largest = by_block.amax(3, keepdim=True)
            total = (logits - largest).exp_().sum(3, keepdim=True)
            weights = (by_block - largest).exp() / total
            is_token = of_queries < ends[:, None]
            weights = weights.masked_fill(~is_token[:, None, :, None], 0.0)
            pooled = weights.view(batch, heads, stop - start, block, stop).amax(3)
            rows.append(F.pad(pooled, (0, num_blocks - stop)))
        target = torch.cat(rows, dim=2)
        return target / target.sum(-1, keepdim=True).clamp_min(torch.finfo(dtype).tiny)


def gate_distillation_loss(
    scores: Float[Tensor, "batch heads rows blocks"],
    target: Float[Tensor, "batch heads rows blocks"],
    *,
    drop_first: float = 0.25,
    reduction: Reduction = "batchmean",
) -> Float[Tensor, ""]:
    """``KL(target || softmax(scores))``, without the first rows.

    Args:
        scores: of a gate.
        target: distributions over blocks; rows that are 0 (of padding) do not count.
        drop_first: share of the rows, rounded down, that is left out: they have few blocks and large gradients.
        reduction: "batchmean" sums over the blocks and means over the rest, in nats. "mean" is the mean over all
            elements, later blocks included, which the paper's code takes and then multiplies by 10.

    Raises:
        ValueError: different shapes, a share outside [0, 1), or another reduction.
    """
    if scores.shape != target.shape:
        raise ValueError(f"scores and target have one shape, got {list(scores.shape)} and {list(target.shape)}")
    if not 0 <= drop_first < 1:
        raise ValueError(f"drop_first is a share in [0, 1), got {drop_first}")
    if reduction not in ("batchmean", "mean"):
        raise ValueError(f"reduction is 'batchmean' or 'mean', got {reduction!r}")
    first = int(scores.shape[2] * drop_first)
    scores, target = scores[:, :, first:], target[:, :, first:]
    divergence = F.kl_div(F.log_softmax(scores, dim=-1), target.to(scores.dtype), reduction="none")
    if reduction == "mean":
        return divergence.mean()
    return divergence.sum() / target.any(-1).sum().clamp_min(1)
