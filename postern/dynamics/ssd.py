"""SSD, the state-space layer of Mamba-2: one decay a head and token, so that it is masked linear attention.

Paper: "Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality",
arXiv 2405.21060. The layer leaves out the normalisation that Mamba-2 puts behind the gate; without it, and without the
convolution, it is linear in its input once its coefficients are known.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from postern.attention.self_attention import check_heads
from postern.dynamics.recurrent_state import RecurrentState
from postern.dynamics.s6 import check_recurrence, initialize_steps, mask_tokens, shown_tokens
from postern.dynamics.short_convolution import ShortConvolution
from postern.precision import without_autocast


def decaying_attention(
    query: Float[Tensor, "batch shared_heads time key_dim"],
    key: Float[Tensor, "batch shared_heads time key_dim"],
    value: Float[Tensor, "batch heads time value_dim"],
    log_decay: Float[Tensor, "batch heads time"],
    state: Float[Tensor, "batch heads key_dim value_dim"] | None = None,
    *,
    block: int = 64,
) -> tuple[Float[Tensor, "batch heads time value_dim"], Float[Tensor, "batch heads key_dim value_dim"]]:
    """``o_t = sum over s <= t of exp(sum over s < r <= t of log_decay_r) (q_t . k_s) v_s``, in blocks.

    It is `postern.attention.lightning_attention` with decays that differ by token: inside a block it multiplies the
    matrix of products, and what comes from earlier blocks is one matrix a head, the state
    ``S_t = exp(log_decay_t) S_{t-1} + k_t v_t^T``.

    Args:
        query: queries; one head of them may serve all heads.
        key: keys; likewise.
        value: values.
        log_decay: at most 0.
        state: of the tokens before, from an earlier call.
        block: tokens of a block, at least 1.

    Returns:
        The output in the dtype of the values, and the state after the last token, in float32 at least.

    Raises:
        ValueError: a block below 1, or no tokens.
    """
    batch, heads, time, value_dim = value.shape
    if block < 1 or time < 1:
        raise ValueError(f"a block and a sequence have at least one token, got {block} and {time}")
    block = min(block, time)
    dtype = torch.promote_types(value.dtype, torch.float32)
    with without_autocast(value.device):
        # tokens that fill up the last block neither add nor fade
        q, k, v = (_blocks(tensor.to(dtype), block) for tensor in (query, key, value))
        passed = _blocks(log_decay.to(dtype).unsqueeze(-1), block).squeeze(-1).cumsum(-1)
        if state is None:
            state = q.new_zeros(batch, heads, key.shape[-1], value_dim)
        later = torch.ones(block, block, dtype=torch.bool, device=value.device).triu(1)
        within = (passed.unsqueeze(-1) - passed.unsqueeze(-2)).masked_fill(later, -torch.inf).exp()
        to_end = torch.exp(passed[..., -1:] - passed).unsqueeze(-1)
        added = k.transpose(-1, -2) @ (v * to_end)
        over_block = torch.exp(passed[..., -1])[..., None, None]
        before = []
        for fading, addition in zip(over_block.unbind(2), added.unbind(2), strict=True):
            before.append(state)
            state = fading * state + addition
        output = (q @ k.transpose(-1, -2) * within) @ v
        output = output + passed.exp().unsqueeze(-1) * (q @ torch.stack(before, dim=2))
        output = output.flatten(2, 3)[:, :, :time]
    return output.to(value.dtype), state


def _blocks(x: Tensor, block: int) -> Tensor:
    """``[batch, heads, blocks, block, dim]``, filled up with zeros."""
    return F.pad(x, (0, 0, 0, -x.shape[2] % block)).reshape(*x.shape[:2], -1, block, x.shape[3])


class SSDMixer(nn.Module):
    """``W_O (SSD(silu(conv(W_I x))) * silu(W_Z x))``, the block of Mamba-2, or without convolution and gate SSD alone.

    With steps ``Delta = softplus(W_Delta x + b)`` and a rate ``a`` a head, and keys and queries that all heads share,
    head h computes ``S_t = exp(-Delta_t a) S_{t-1} + Delta_t key_t u_t^T`` and ``y_t = query_t^T S_t + skip u_t``.

    It follows the protocol of `postern.attention.Attention`, forwards in time only. A masked token has a step of 0: it
    adds nothing and lets nothing fade.

    Args:
        width: features of a token.
        num_heads: number of heads.
        state_dim: features of keys and queries, the state expansion.
        inner_dim: channels of all heads; by default the width. Mamba-2 takes twice the width.
        conv_width: tokens that the convolution sees; None for no convolution and no activation behind it.
        is_gated: whether the output is gated.
        bias: whether the projections have one.
        is_causal: a recurrence is.

    Raises:
        ValueError: sizes below 1, channels that are no multiple of the heads, or ``is_causal`` false.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        state_dim: int = 64,
        *,
        inner_dim: int | None = None,
        conv_width: int | None = 4,
        is_gated: bool = True,
        bias: bool = False,
        is_causal: bool = True,
    ) -> None:
        super().__init__()
        inner_dim = width if inner_dim is None else inner_dim
        check_recurrence(is_causal, width=width, state_dim=state_dim)
        check_heads(inner_dim, num_heads)
        self.width = width
        self.num_heads = num_heads
        self.state_dim = state_dim
        self.inner_dim = inner_dim
        self.is_causal = True
        self.input = nn.Linear(width, inner_dim + 2 * state_dim, bias=bias)
        self.gate = nn.Linear(width, inner_dim, bias=bias) if is_gated else None
        self.conv = None if conv_width is None else ShortConvolution(inner_dim + 2 * state_dim, conv_width)
        self.step = nn.Linear(width, num_heads)
        self.log_rate = nn.Parameter(torch.empty(num_heads).uniform_(1, 16).log())
        self.skip = nn.Parameter(torch.ones(num_heads))
        self.output = nn.Linear(inner_dim, width, bias=bias)
        initialize_steps(self.step.bias)

    @property
    def state_size(self) -> int:
        """Numbers of the recurrence's state, for one sequence."""
        return self.inner_dim * self.state_dim

    def new_cache(self) -> RecurrentState:
        """Return an empty cache."""
        return RecurrentState()

    def steps(self, x: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time heads"]:
        """Return ``Delta`` of tokens."""
        logits = self.step(x)
        # F.softplus's gradient has other strides in torch.compile's plan than in fact (torch 2.13)
        return torch.logaddexp(logits, torch.zeros_like(logits))

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        mask: Bool[Tensor, "batch keys"] | None = None,
        cache: RecurrentState | None = None,
    ) -> Float[Tensor, "batch time width"]:
        """Mix the tokens; see `postern.attention.Attention` for the mask and the cache.

        Raises:
            ValueError: an input of another width, or a mask by query or head.
        """
        shown = shown_tokens(x, self.width, mask, cache)
        inner = mask_tokens(self.input(x), shown)
        if self.conv is not None:
            inner = mask_tokens(F.silu(self.conv(inner, cache)), shown)
        u, key, query = torch.split(inner, [self.inner_dim, self.state_dim, self.state_dim], dim=-1)
        u = u.reshape(*u.shape[:2], self.num_heads, -1).transpose(1, 2)
        step = mask_tokens(self.steps(x), shown).transpose(1, 2)
        heads, state = decaying_attention(
            query.unsqueeze(1),
            key.unsqueeze(1),
            u * step.unsqueeze(-1),
            -step * self.log_rate.exp().unsqueeze(-1),
            None if cache is None else cache.state,
        )
        if cache is not None:
            cache.state = state
            cache.length += x.shape[1]
        heads = (heads + self.skip[:, None, None] * u).transpose(1, 2).flatten(2)
        if self.gate is not None:
            heads = heads * F.silu(self.gate(x))
        output: Tensor = self.output(heads)
        return output

    def extra_repr(self) -> str:
        """Return what the printed module says of its settings."""
        return f"width={self.width}, num_heads={self.num_heads}, state_dim={self.state_dim}"
