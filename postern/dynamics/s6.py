"""S6, the selective state-space layer of Mamba: each channel keeps a few leaky sums, which the input opens and closes.

Paper: "Mamba: Linear-Time Sequence Modeling with Selective State Spaces", arXiv 2312.00752; the simplified
discretisation of its code, where the input's coefficient is ``step * key``. Here the scan is plain PyTorch.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from postern.attention.protocol import check_input, check_padding
from postern.dynamics.recurrent_state import RecurrentState
from postern.dynamics.scan import ScanMethod, diagonal_scan
from postern.dynamics.short_convolution import ShortConvolution
from postern.precision import without_autocast


def selective_scan(
    u: Float[Tensor, "batch time channels"],
    step: Float[Tensor, "batch time channels"],
    rate: Float[Tensor, "channels state_dim"],
    key: Float[Tensor, "batch time state_dim"],
    query: Float[Tensor, "batch time state_dim"],
    skip: Float[Tensor, " channels"] | None = None,
    state: Float[Tensor, "batch channels state_dim"] | None = None,
    *,
    method: ScanMethod | None = None,
) -> tuple[Float[Tensor, "batch time channels"], Float[Tensor, "batch channels state_dim"]]:
    """``h_t[c] = exp(-step_t[c] rate[c]) h_{t-1}[c] + step_t[c] key_t u_t[c]`` and ``y_t[c] = query_t . h_t[c]``.

    Args:
        u: inputs.
        step: ``Delta``, at least 0; a step of 0 leaves the channel's state as it is.
        rate: ``-A``, positive.
        key: ``B``, shared by the channels.
        query: ``C``, shared by the channels.
        skip: ``D``; ``skip * u`` is added to the output.
        state: ``h`` before the first token; zeros if None.
        method: see `postern.dynamics.diagonal_scan`.

    Returns:
        The output in the dtype of ``u``, and the state after the last token, in float32 at least.
    """
    dtype = torch.promote_types(u.dtype, torch.float32)
    with without_autocast(u.device):
        x, step, rate, key, query = (tensor.to(dtype) for tensor in (u, step, rate, key, query))
        decay = torch.exp(-step.unsqueeze(-1) * rate)
        inputs = (step * x).unsqueeze(-1) * key.unsqueeze(2)
        before = None if state is None else state.to(dtype).flatten(1)
        states = diagonal_scan(decay.flatten(2), inputs.flatten(2), before, method=method).reshape(inputs.shape)
        output = torch.einsum("btcn,btn->btc", states, query)
        if skip is not None:
            output = output + skip.to(dtype) * x
    return output.to(u.dtype), states[:, -1]


class S6Mixer(nn.Module):
    """``W_O (S6(silu(conv(W_I x))) * silu(W_Z x))``, the block of Mamba, or without convolution and gate S6 alone.

    It follows the protocol of `postern.attention.Attention`, forwards in time only. A masked token has a step of 0: it
    adds nothing and lets nothing fade.

    Args:
        width: features of a token.
        state_dim: sums a channel, the state expansion.
        inner_dim: channels; by default the width. Mamba takes twice the width.
        step_rank: rank of the steps' projection; by default a sixteenth of the width, rounded up.
        conv_width: tokens that the convolution sees; None for no convolution and no activation behind it.
        is_gated: whether the output is gated.
        bias: whether the projections ``W_I``, ``W_Z`` and ``W_O`` have one.
        is_causal: a recurrence is.

    Raises:
        ValueError: sizes below 1, or ``is_causal`` false.
    """

    def __init__(
        self,
        width: int,
        state_dim: int = 16,
        *,
        inner_dim: int | None = None,
        step_rank: int | None = None,
        conv_width: int | None = 4,
        is_gated: bool = True,
        bias: bool = False,
        is_causal: bool = True,
    ) -> None:
        super().__init__()
        inner_dim = width if inner_dim is None else inner_dim
        step_rank = math.ceil(width / 16) if step_rank is None else step_rank
        check_recurrence(is_causal, width=width, state_dim=state_dim, inner_dim=inner_dim, step_rank=step_rank)
        self.width = width
        self.state_dim = state_dim
        self.inner_dim = inner_dim
        self.step_rank = step_rank
        self.is_causal = True
        self.input = nn.Linear(width, inner_dim, bias=bias)
        self.gate = nn.Linear(width, inner_dim, bias=bias) if is_gated else None
        self.conv = None if conv_width is None else ShortConvolution(inner_dim, conv_width)
        self.project = nn.Linear(inner_dim, step_rank + 2 * state_dim, bias=False)
        self.step = nn.Linear(step_rank, inner_dim)
        self.log_rate = nn.Parameter(torch.arange(1.0, state_dim + 1).log().repeat(inner_dim, 1))
        self.skip = nn.Parameter(torch.ones(inner_dim))
        self.output = nn.Linear(inner_dim, width, bias=bias)
        nn.init.uniform_(self.step.weight, -(step_rank**-0.5), step_rank**-0.5)
        initialize_steps(self.step.bias)

    @property
    def state_size(self) -> int:
        """Numbers of the recurrence's state, for one sequence."""
        return self.inner_dim * self.state_dim

    def new_cache(self) -> RecurrentState:
        """Return an empty cache."""
        return RecurrentState()

    def coefficients(
        self, u: Float[Tensor, "batch time channels"]
    ) -> tuple[
        Float[Tensor, "batch time channels"],
        Float[Tensor, "channels state_dim"],
        Float[Tensor, "batch time state_dim"],
        Float[Tensor, "batch time state_dim"],
    ]:
        """Return steps, rates, keys and queries of inner tokens, for `selective_scan`."""
        low, key, query = self.project(u).split([self.step_rank, self.state_dim, self.state_dim], dim=-1)
        return F.softplus(self.step(low)), self.log_rate.exp(), key, query

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
        u = mask_tokens(self.input(x), shown)
        if self.conv is not None:
            u = mask_tokens(F.silu(self.conv(u, cache)), shown)
        step, rate, key, query = self.coefficients(u)
        heads, state = selective_scan(
            u, mask_tokens(step, shown), rate, key, query, self.skip, None if cache is None else cache.state
        )
        if cache is not None:
            cache.state = state
            cache.length += x.shape[1]
        if self.gate is not None:
            heads = heads * F.silu(self.gate(x))
        output: Tensor = self.output(heads)
        return output

    def extra_repr(self) -> str:
        """Return what the printed module says of its settings."""
        return f"width={self.width}, state_dim={self.state_dim}, inner_dim={self.inner_dim}"


def check_recurrence(is_causal: bool, **sizes: int) -> None:
    """Check the settings of a recurrent layer.

    Raises:
        ValueError: sizes below 1, or a layer that would not be causal.
    """
    if min(sizes.values()) < 1:
        raise ValueError(f"sizes are positive, got {', '.join(f'{name}={size}' for name, size in sizes.items())}")
    if not is_causal:
        raise ValueError("a recurrence runs forwards in time alone, got is_causal=False")


def shown_tokens(
    x: Tensor, width: int, mask: Tensor | None, cache: RecurrentState | None
) -> Float[Tensor, "batch time 1"] | None:
    """Check a recurrent layer's input and mask; return 1 for tokens that are there and 0 for masked ones, or None.

    Raises:
        ValueError: an input of another width, or a mask by query or head.
    """
    check_input(x, width)
    start = 0 if cache is None else len(cache)
    check_padding(mask, x.shape[0], start + x.shape[1])
    return None if mask is None else mask[:, start:, None].to(x.dtype)


def mask_tokens(x: Float[Tensor, "batch time *rest"], shown: Tensor | None) -> Float[Tensor, "batch time *rest"]:
    """Set masked tokens to zero."""
    return x if shown is None else x * shown.to(x.dtype)


@torch.no_grad()
def initialize_steps(bias: Tensor, least: float = 1e-3, most: float = 0.1) -> None:
    """Draw biases so that ``softplus(bias)`` is log-uniform between ``least`` and ``most``, as in Mamba's code."""
    steps = torch.empty_like(bias).uniform_(math.log(least), math.log(most)).exp()
    bias.copy_(steps + torch.log(-torch.expm1(-steps)))
