"""qLSTM: a gated recurrence whose gates do not see its state, so that it can be scanned; with the forget gate of S6.

Papers: "Understanding the differences in Foundation Models: Attention, State Space Models, and Recurrent Neural
Networks", arXiv 2405.15731, which gives it the reversed sigmoid; the recurrence is the quasi-LSTM of "Quasi-Recurrent
Neural Networks", arXiv 1611.01576.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from postern.dynamics.recurrent_state import RecurrentState
from postern.dynamics.s6 import check_recurrence, mask_tokens, shown_tokens
from postern.dynamics.scan import diagonal_scan
from postern.dynamics.short_convolution import ShortConvolution
from postern.precision import without_autocast


def reversed_sigmoid(logits: Float[Tensor, "*shape"], exponent: Tensor | float = 1.0) -> Float[Tensor, "*shape"]:
    """``sigmoid(-x)^alpha = exp(-alpha softplus(x))``: what a state of S6 is multiplied by at step ``softplus(x)``.

    Args:
        logits: ``x``.
        exponent: ``alpha``, at least 0; S6's rate.
    """
    return torch.exp(exponent * F.logsigmoid(-logits))  # F.softplus drops what is below 1e-9 of its result


class QLSTM(nn.Module):
    """``h_t = f_t * h_{t-1} + i_t * z_t`` with output ``W_O (o_t * h_t * gelu(W_G x_t))``, where ``z = conv(W_Z x)``.

    The gates ``f, i, o`` are functions of ``z_t`` alone, ``sigmoid(W z_t + b)``; the forget gate is
    ``sigmoid(-(W_f z_t + b))^alpha`` with one learned ``alpha >= 0`` where it is reversed.

    It follows the protocol of `postern.attention.Attention`, forwards in time only. A masked token adds nothing and
    lets nothing fade.

    Args:
        width: features of a token.
        inner_dim: size of the state; by default twice the width.
        conv_width: tokens that the convolution sees; None for no convolution.
        has_reversed_gate: whether the forget gate is S6's instead of a sigmoid.
        is_causal: a recurrence is.

    Raises:
        ValueError: sizes below 1, or ``is_causal`` false.
    """

    def __init__(
        self,
        width: int,
        inner_dim: int | None = None,
        *,
        conv_width: int | None = 4,
        has_reversed_gate: bool = True,
        is_causal: bool = True,
    ) -> None:
        super().__init__()
        inner_dim = 2 * width if inner_dim is None else inner_dim
        check_recurrence(is_causal, width=width, inner_dim=inner_dim)
        self.width = width
        self.inner_dim = inner_dim
        self.is_causal = True
        self.input = nn.Linear(width, inner_dim, bias=False)
        self.gate = nn.Linear(width, inner_dim, bias=False)
        self.conv = None if conv_width is None else ShortConvolution(inner_dim, conv_width)
        self.gates = nn.Linear(inner_dim, 3 * inner_dim)
        self.output = nn.Linear(inner_dim, width, bias=False)
        self.exponent = nn.Parameter(torch.ones(())) if has_reversed_gate else None
        for layer in (self.input, self.gate, self.gates, self.output):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)

    @property
    def state_size(self) -> int:
        """Numbers of the recurrence's state, for one sequence."""
        return self.inner_dim

    def new_cache(self) -> RecurrentState:
        """Return an empty cache."""
        return RecurrentState()

    def gates_of(
        self, z: Float[Tensor, "batch time inner"]
    ) -> tuple[Float[Tensor, "batch time inner"], Float[Tensor, "batch time inner"], Float[Tensor, "batch time inner"]]:
        """Return the forget, input and output gates of inner tokens, all in [0, 1]."""
        forget, enter, leave = self.gates(z).chunk(3, dim=-1)
        if self.exponent is None:
            return forget.sigmoid(), enter.sigmoid(), leave.sigmoid()
        return reversed_sigmoid(forget, self.exponent.relu()), enter.sigmoid(), leave.sigmoid()

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
        z = mask_tokens(self.input(x), shown)
        if self.conv is not None:
            z = self.conv(z, cache)
        forget, enter, leave = self.gates_of(z)
        added = mask_tokens(enter * z, shown)
        if shown is not None:
            forget = torch.where(shown > 0, forget, 1.0)
        dtype = torch.promote_types(added.dtype, torch.float32)
        with without_autocast(x.device):
            before = None if cache is None else cache.state
            states = diagonal_scan(forget.to(dtype), added.to(dtype), before)
        if cache is not None:
            cache.state = states[:, -1]
            cache.length += x.shape[1]
        output: Tensor = self.output(leave * states.to(leave.dtype) * F.gelu(self.gate(x)))
        return output

    def extra_repr(self) -> str:
        """Return what the printed module says of its settings."""
        kind = "reversed" if self.exponent is not None else "sigmoid"
        return f"width={self.width}, inner_dim={self.inner_dim}, forget_gate={kind!r}"
