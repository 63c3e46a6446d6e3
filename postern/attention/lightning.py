"""Causal attention without softmax: sums over earlier tokens that fade with distance, in time linear in the length.

Paper: "Scaling TransNormer to 175 Billion Parameters", arXiv 2307.14995; the block form is that of "Lightning
Attention-2", arXiv 2401.04658.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from postern.attention.self_attention import repeat_heads
from postern.precision import without_autocast


def lightning_attention(
    query: Float[Tensor, "batch heads time key_dim"],
    key: Float[Tensor, "batch kv_heads time key_dim"],
    value: Float[Tensor, "batch kv_heads time value_dim"],
    slopes: Float[Tensor, " heads"] | None = None,
    state: Float[Tensor, "batch heads key_dim value_dim"] | None = None,
    *,
    block: int = 64,
) -> tuple[Float[Tensor, "batch heads time value_dim"], Float[Tensor, "batch heads key_dim value_dim"]]:
    """``o_t = sum over s <= t of exp(-slope (t - s)) (q_t . k_s) v_s``, in blocks.

    Inside a block it multiplies the matrix of products; what comes from earlier blocks is one matrix a head, the state
    ``S_t = exp(-slope) S_{t-1} + k_t v_t^T``. No power of ``exp(slope)`` occurs that could overflow.

    Args:
        query: queries.
        key: keys; several query heads in a row may share one head of keys and values.
        value: values.
        slopes: how fast each head forgets, at least 0; None for heads that do not.
        state: of the tokens before, from an earlier call.
        block: tokens of a block, at least 1.

    Returns:
        The output in the dtype of the values, and the state after the last token, in float32 at least.

    Raises:
        ValueError: a block below 1, or heads that do not fit.
    """
    if block < 1:
        raise ValueError(f"a block has at least one token, got {block}")
    dtype = torch.promote_types(value.dtype, torch.float32)
    heads, time = query.shape[1], query.shape[2]
    key, value = repeat_heads(key, heads), repeat_heads(value, heads)
    with without_autocast(query.device):
        q, k, v = query.to(dtype), key.to(dtype), value.to(dtype)
        decay = q.new_zeros(heads) if slopes is None else slopes.to(q)
        if state is None:
            state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
        whole = time - time % block
        pieces = []
        for start, stop, size in ((0, whole, block), (whole, time, time - whole)):
            if start < stop:
                output, state = _blocks(
                    _cut(q[:, :, start:stop], size),
                    _cut(k[:, :, start:stop], size),
                    _cut(v[:, :, start:stop], size),
                    decay,
                    state,
                )
                pieces.append(output.flatten(2, 3))
        output = torch.cat(pieces, dim=2) if len(pieces) > 1 else pieces[0]
    return output.to(value.dtype), state


def _cut(x: Tensor, block: int) -> Tensor:
    return x.reshape(*x.shape[:2], -1, block, x.shape[3])


def _blocks(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks ``[batch, heads, blocks, block, dim]`` of equal length, and the state before the first."""
    block = q.shape[3]
    steps = torch.arange(block, device=q.device, dtype=q.dtype)
    slope = slopes[:, None]
    distance = steps[:, None] - steps
    within = torch.where(distance >= 0, torch.exp(-slope[..., None] * distance.clamp_min(0)), 0.0)
    from_before = torch.exp(-slope * (steps + 1))[:, None, :, None]
    to_end = torch.exp(-slope * (block - 1 - steps))[:, None, :, None]
    over_block = torch.exp(-slope * block)[..., None]
    added = (k * to_end).transpose(-1, -2) @ v
    before = []
    for addition in added.unbind(2):
        before.append(state)
        state = over_block * state + addition
    inside = (q @ k.transpose(-1, -2) * within[:, None]) @ v
    return inside + (q * from_before) @ torch.stack(before, dim=2), state
