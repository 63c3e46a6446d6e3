"""A gate for each head that decides token by token how much of the head's output is used.

A head that should add nothing to a token is switched off by a sigmoid, and need not look for tokens with small values.
The gate costs a few numbers a head, depends on the token alone, and leaves the attention itself to the fused kernel.

Paper: "Quantizable Transformers: Removing Outliers by Helping Attention Heads Do Nothing", arXiv 2306.12929. The
paper's code loops over one small linear layer a head; here one contraction serves all heads. Its gates that do not look
at the token (one parameter a head) or look at all tokens at once are left out.
"""

from __future__ import annotations

import math
from typing import Literal, Unpack

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from postern.attention.protocol import check_input
from postern.attention.self_attention import HeadOptions, SelfAttention, check_heads

GateKind = Literal["linear", "mlp", "all"]


def linear_gate_logits(
    x: Float[Tensor, "batch time width"],
    weight: Float[Tensor, "heads head_dim"],
    bias: Float[Tensor, " heads"],
) -> Float[Tensor, "batch heads time"]:
    """``w_h . x_t[h] + b_h``, where ``x_t[h]`` is the h-th slice of token t.

    Args:
        x: tokens, of width heads times head_dim.
        weight: one row a head.
        bias: one number a head.
    """
    return torch.einsum("bthd,hd->bht", x.reshape(*x.shape[:2], *weight.shape), weight) + bias[:, None]


def mlp_gate_logits(
    x: Float[Tensor, "batch time width"],
    hidden_weight: Float[Tensor, "heads hidden head_dim"],
    hidden_bias: Float[Tensor, "heads hidden"],
    weight: Float[Tensor, "heads hidden"],
    bias: Float[Tensor, " heads"],
) -> Float[Tensor, "batch heads time"]:
    """``w_h . relu(V_h x_t[h] + c_h) + b_h``, where ``x_t[h]`` is the h-th slice of token t.

    Args:
        x: tokens, of width heads times head_dim.
        hidden_weight: ``V``.
        hidden_bias: ``c``.
        weight: ``w``.
        bias: ``b``.
    """
    slices = x.reshape(*x.shape[:2], hidden_weight.shape[0], hidden_weight.shape[2])
    hidden = torch.relu(torch.einsum("bthd,hnd->bthn", slices, hidden_weight) + hidden_bias)
    return torch.einsum("bthn,hn->bht", hidden, weight) + bias[:, None]


class PerHeadGate(nn.Module):
    """``sigmoid(G_h(x_t))``: one number in (0, 1) for each head and token.

    ============  =====================================  ====================================
    kind          ``G_h``                                parameters
    ============  =====================================  ====================================
    ``"linear"``  linear in the head's slice of x_t      heads (head_dim + 1)
    ``"mlp"``     one hidden layer on that slice         heads (hidden_dim (head_dim + 2) + 1)
    ``"all"``     linear in all of x_t                   heads (width + 1)
    ============  =====================================  ====================================

    The input is the attention layer's own input, neither its queries nor its output. The paper takes "linear" for OPT
    and "mlp" for BERT. Weights start as in `torch.nn.Linear`.

    To fit gates into a trained model without changing what it computes, set ``weight_std`` to about 0.01 (BERT) or
    0.001 (OPT) and ``is_rescaled``.

    Args:
        width: features of a token; a multiple of ``num_heads``.
        num_heads: number of heads.
        kind: the function ``G``.
        initial_probability: about how open the gates of "linear" and "all" start, in (0, 1); the paper takes 0.25.
            Gates of kind "mlp" start about half open.
        hidden_dim: hidden units a head of kind "mlp"; by default a quarter of head_dim.
        weight_std: draw the weights from a normal distribution of this standard deviation instead.
        is_rescaled: divide by what the gates start at (0.5 for "mlp"), so that they start near 1.

    Raises:
        ValueError: impossible sizes, an unknown kind, a probability outside (0, 1), a standard deviation below 0, or a
            hidden_dim for a kind that has none.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        kind: GateKind = "linear",
        *,
        initial_probability: float = 0.25,
        hidden_dim: int | None = None,
        weight_std: float | None = None,
        is_rescaled: bool = False,
    ) -> None:
        super().__init__()
        check_heads(width, num_heads)
        if kind not in ("linear", "mlp", "all"):
            raise ValueError(f"kind is 'linear', 'mlp' or 'all', got {kind!r}")
        if not 0 < initial_probability < 1:
            raise ValueError(f"initial_probability lies in (0, 1), got {initial_probability}")
        if weight_std is not None and not weight_std >= 0:
            raise ValueError(f"weight_std must be at least 0, got {weight_std}")
        if hidden_dim is not None and (kind != "mlp" or hidden_dim < 1):
            raise ValueError(f"hidden_dim is a positive integer, for kind 'mlp' alone; got {hidden_dim} for {kind!r}")
        self.width = width
        self.num_heads = num_heads
        self.kind = kind
        self.initial_probability = 0.5 if kind == "mlp" else initial_probability
        self.weight_std = weight_std
        self.is_rescaled = is_rescaled
        head_dim = width // num_heads
        hidden_dim = max(1, head_dim // 4) if hidden_dim is None else hidden_dim
        self.bias = nn.Parameter(torch.empty(num_heads))
        if kind == "mlp":
            self.hidden_weight = nn.Parameter(torch.empty(num_heads, hidden_dim, head_dim))
            self.hidden_bias = nn.Parameter(torch.empty(num_heads, hidden_dim))
            self.weight = nn.Parameter(torch.empty(num_heads, hidden_dim))
        else:
            self.weight = nn.Parameter(torch.empty(num_heads, width if kind == "all" else head_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew."""
        layers = [(self.weight, self.bias)]
        if self.kind == "mlp":
            layers.append((self.hidden_weight, self.hidden_bias))
        for weight, bias in layers:
            bound = weight.shape[-1] ** -0.5  # as torch.nn.Linear does
            nn.init.uniform_(bias, -bound, bound)
            if self.weight_std is None:
                nn.init.uniform_(weight, -bound, bound)
            else:
                nn.init.normal_(weight, std=self.weight_std)
        if self.kind != "mlp" or self.is_rescaled:
            nn.init.constant_(self.bias, math.log(self.initial_probability / (1 - self.initial_probability)))

    def forward(
        self, y: Float[Tensor, "batch heads time head_dim"], x: Float[Tensor, "batch time width"]
    ) -> Float[Tensor, "batch heads time head_dim"]:
        """Return the heads' outputs times their factors.

        Args:
            y: outputs of the heads.
            x: the attention layer's input.

        Raises:
            ValueError: tokens of another width.
        """
        return y * self.scores(x)

    def scores(self, x: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch heads time 1"]:
        """Return the factors of the heads' outputs.

        Raises:
            ValueError: tokens of another width.
        """
        check_input(x, self.width)
        if self.kind == "mlp":
            logits = mlp_gate_logits(x, self.hidden_weight, self.hidden_bias, self.weight, self.bias)
        elif self.kind == "linear":
            logits = linear_gate_logits(x, self.weight, self.bias)
        else:
            logits = F.linear(x, self.weight, self.bias).transpose(1, 2)
        gate = torch.sigmoid(logits).unsqueeze(-1)
        return gate / self.initial_probability if self.is_rescaled else gate

    def extra_repr(self) -> str:
        """Return what the printed module says of its settings."""
        return f"width={self.width}, num_heads={self.num_heads}, kind={self.kind!r}"


class PerHeadGatedAttention(SelfAttention):
    """Self-attention with heads ``sigmoid(G_h(x_t)) * softmax(Q_h K_h^T / sqrt(head_dim)) V_h``.

    Args:
        width: features of a token; a multiple of ``num_heads``.
        num_heads: number of heads.
        kind: see `PerHeadGate`.
        initial_probability: see `PerHeadGate`.
        options: see `SelfAttention`.

    Raises:
        ValueError: see `SelfAttention` and `PerHeadGate`.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        kind: GateKind = "linear",
        initial_probability: float = 0.25,
        **options: Unpack[HeadOptions],
    ) -> None:
        super().__init__(
            width,
            num_heads,
            gate=PerHeadGate(width, num_heads, kind, initial_probability=initial_probability),
            **options,
        )
