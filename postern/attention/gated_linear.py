"""Gated linear attention: sums that fade with distance, a norm in the place of the denominator, and a gate.

Paper: "Scaling TransNormer to 175 Billion Parameters", arXiv 2307.14995.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from postern.attention.decay import DecayKind, decay_slopes
from postern.attention.lightning import LightningForm, lightning_attention
from postern.attention.lrpe import LRPE
from postern.attention.protocol import check_input, check_padding
from postern.attention.self_attention import check_heads
from postern.attention.simple_rms_norm import SimpleRMSNorm


@dataclass
class GatedLinearState:
    """What gated linear attention keeps of the tokens it has seen; its size does not depend on their number.

    Attributes:
        memory: ``sum_s exp(-slope (t - s)) k_s v_s^T``, ``[batch, heads, key_dim, value_dim]``, in float32 at least.
        length: number of tokens.
    """

    memory: Tensor | None = None
    length: int = 0

    def __len__(self) -> int:
        return self.length

    def reorder(self, rows: Int[Tensor, " batch"]) -> None:
        """Keep these sequences of the batch, in this order."""
        if self.memory is not None:
            self.memory = self.memory.index_select(0, rows)


class GatedLinearAttention(nn.Module):
    """``W_o (norm(concat_h(o_h)) * U)`` with ``o_t = sum over s <= t of exp(-slope (t - s)) (q_t . k_s) v_s``.

    ``Q = activation(X W_q)``, ``K = activation(X W_k)``, ``V = X W_v`` and ``U = X W_u``, without biases, in one
    product. The norm runs over all heads together, before the gate U, which has no activation. Products are not scaled
    by the size of the heads; the norm takes care of that. It follows the protocol of `postern.attention.Attention`,
    causal alone; see `lightning_attention` for the sums.

    Args:
        width: features of a token; a multiple of ``num_heads``.
        num_heads: number of heads.
        layer: its place in the model, counted from 0, on which the decay depends.
        num_layers: layers of the model.
        decay: see `decay_slopes`; None for heads that do not forget.
        has_lrpe: whether queries and keys are turned by their positions, see `LRPE`; by default in layer 0 alone, as
            the paper recommends.
        is_gated: whether there is a gate.
        activation: of queries and keys.
        norm: of the heads' concatenated outputs; by default `SimpleRMSNorm`.
        implementation: see `lightning_attention`.

    Raises:
        ValueError: sizes below 1, a width that is no multiple of the heads, or a layer or decay that is not known.
    """

    slopes: Tensor

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        layer: int = 0,
        num_layers: int = 1,
        decay: DecayKind | None = "alibi",
        has_lrpe: bool | None = None,
        is_gated: bool = True,
        activation: Callable[[Tensor], Tensor] = F.silu,
        norm: nn.Module | None = None,
        implementation: LightningForm | None = None,
    ) -> None:
        super().__init__()
        check_heads(width, num_heads)
        self.width = width
        self.num_heads = num_heads
        self.is_causal = True
        self.layer, self.num_layers, self.decay = layer, num_layers, decay
        self.is_gated = is_gated
        self.activation = activation
        self.implementation: LightningForm | None = implementation
        self.project = nn.Linear(width, (4 if is_gated else 3) * width, bias=False)
        has_lrpe = layer == 0 if has_lrpe is None else has_lrpe
        self.lrpe = LRPE(num_heads, width // num_heads) if has_lrpe else None
        self.norm = SimpleRMSNorm() if norm is None else norm
        self.output = nn.Linear(width, width, bias=False)
        self.register_buffer("slopes", torch.empty(num_heads), persistent=False)
        self.reset_slopes()

    def reset_slopes(self) -> None:
        """Compute the slopes anew, in float32, on the device where they are."""
        if self.decay is None:
            self.slopes = torch.zeros(self.num_heads, device=self.slopes.device)
        else:
            device = self.slopes.device
            self.slopes = decay_slopes(self.num_heads, self.layer, self.num_layers, self.decay, device=device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GatedLinearAttention:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.reset_slopes()  # a model in 16 bits has slopes in 32
        return self

    def new_cache(self) -> GatedLinearState:
        """Return an empty cache."""
        return GatedLinearState()

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        mask: Bool[Tensor, "batch keys"] | None = None,
        cache: GatedLinearState | None = None,
    ) -> Float[Tensor, "batch time width"]:
        """Attend; see `postern.attention.Attention` for the mask and the cache.

        Raises:
            ValueError: an input of another width, or a mask by query or head.
        """
        check_input(x, self.width)
        start, time = 0 if cache is None else len(cache), x.shape[1]
        check_padding(mask, x.shape[0], start + time)
        query, key, value, *gate = self.project(x).split(self.width, dim=-1)
        query, key, value = (
            y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for y in (self.activation(query), self.activation(key), value)
        )
        if mask is not None:
            key = key * mask[:, None, start:, None]
        if self.lrpe is not None:
            query, key = self.lrpe(query, start), self.lrpe(key, start)
        memory = None if cache is None else cache.memory
        heads, memory = lightning_attention(query, key, value, self.slopes, memory, implementation=self.implementation)
        if cache is not None:
            cache.memory, cache.length = memory, start + time
        merged: Any = self.norm(heads.transpose(1, 2).flatten(2))
        if gate:
            merged = merged * gate[0]
        output: Tensor = self.output(merged)
        return output

    def extra_repr(self) -> str:
        """Return what the printed module says of its settings."""
        place = f"layer={self.layer}, num_layers={self.num_layers}, decay={self.decay!r}"
        return f"width={self.width}, num_heads={self.num_heads}, {place}"
