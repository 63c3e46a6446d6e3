"""Gates in softmax attention, at each place where one can stand, and what else makes its linear maps non-linear.

Between the value and the output projection of a head there is nothing but a weighted mean, so that both are one linear
map of low rank; and a head with nothing to add must still spend its weights on some token. A sigmoid of the layer's
input on the heads' outputs is a non-linearity in the one place and a way out in the other.

Paper: "Gated Attention for Large Language Models: Non-linearity, Sparsity, and Attention-Sink-Free", arXiv 2505.06708.
Its code keeps the gate's weights among those of the query projection, see `split_query_and_gate`. The paper does not
say whether queries and keys are gated before or after they are normalised; here it is before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, Unpack, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from postern.attention.protocol import check_input
from postern.attention.self_attention import GatePosition, HeadOptions, SelfAttention, check_heads, check_position

GateGranularity = Literal["element", "head"]
GateActivation = Literal["sigmoid", "half_sigmoid", "silu", "identity"]
HeadFunction = Literal["rms_norm", "silu"]


def half_sigmoid(x: Tensor) -> Tensor:
    """``1/2 + sigmoid(x) / 2``: a gate that is never closed (the paper's NS-sigmoid)."""
    return 0.5 + 0.5 * torch.sigmoid(x)


def _identity(x: Tensor) -> Tensor:
    return x


_ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "half_sigmoid": half_sigmoid,
    "silu": F.silu,
    "identity": _identity,
}


class AttentionGate(nn.Module):
    """``y_h * f(W_h x)``, or ``y_h + f(W_h x)``: what is gated, ``y``, in the light of the layer's input ``x``.

    ====================  ==========================  =====================  ==========================
    setting               scores a token              parameters             in the paper
    ====================  ==========================  =====================  ==========================
    ``"element"``         num_heads * head_dim        width * their number   elementwise
    ``"head"``            num_heads                   width * their number   headwise
    ``is_shared``         head_dim (or 1)             as without             head-shared
    without input         num_heads * head_dim        their number           input-independent
    ====================  ==========================  =====================  ==========================

    Shared scores are the mean of the heads' scores, not those of one smaller projection. Without input the scores are
    ``f`` of parameters that start at 0.

    The input is what the layer's queries are made of: normalised, where the network normalises first.

    Args:
        width: features of a token of the layer's input.
        num_heads: heads of what is gated: keys and values may have fewer; 1 for the layer's output.
        head_dim: features of a head; those of a token for the layer's output.
        granularity: whether each feature of a head has a score, or each head.
        activation: ``f``: "sigmoid"; "half_sigmoid", 1/2 + sigmoid/2, which never closes; "silu" or "identity". By
            default "sigmoid", and "silu" where the scores are added.
        is_shared: whether all heads have the same scores.
        is_additive: whether scores are added instead of multiplied.
        is_input_dependent: whether they are functions of the input.
        bias: whether the linear map has one.
        initial_std: standard deviation of its initial weights; its biases start at 0.

    Raises:
        ValueError: sizes below 1, an unknown granularity or activation, a standard deviation below 0, or a bias where
            there is no input.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        head_dim: int,
        *,
        granularity: GateGranularity = "element",
        activation: GateActivation | None = None,
        is_shared: bool = False,
        is_additive: bool = False,
        is_input_dependent: bool = True,
        bias: bool = False,
        initial_std: float = 0.02,
    ) -> None:
        super().__init__()
        if activation is None:
            activation = "silu" if is_additive else "sigmoid"
        if min(width, num_heads, head_dim) < 1:
            raise ValueError(f"sizes are positive, got width={width}, num_heads={num_heads}, head_dim={head_dim}")
        if granularity not in get_args(GateGranularity):
            raise ValueError(f"granularity is 'element' or 'head', got {granularity!r}")
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation is one of {', '.join(_ACTIVATIONS)}; got {activation!r}")
        if not initial_std >= 0:
            raise ValueError(f"initial_std must be at least 0, got {initial_std}")
        if bias and not is_input_dependent:
            raise ValueError("a gate that does not depend on the input is all bias; leave bias=False")
        self.width = width
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.granularity = granularity
        self.activation = activation
        self.is_shared = is_shared
        self.is_additive = is_additive
        self.initial_std = initial_std
        scores = head_dim if granularity == "element" else 1
        self.projection = nn.Linear(width, num_heads * scores, bias=bias) if is_input_dependent else None
        self.logits = None if is_input_dependent else nn.Parameter(torch.empty(num_heads, 1, scores))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters anew."""
        if self.projection is not None:
            nn.init.normal_(self.projection.weight, std=self.initial_std)
            if self.projection.bias is not None:
                nn.init.zeros_(self.projection.bias)
        if self.logits is not None:
            nn.init.zeros_(self.logits)

    def forward(
        self, y: Float[Tensor, "batch heads time head_dim"], x: Float[Tensor, "batch time width"]
    ) -> Float[Tensor, "batch heads time head_dim"]:
        """Return ``y`` gated.

        Args:
            y: what is gated.
            x: the attention layer's input.

        Raises:
            ValueError: an input of another width, or something else to gate.
        """
        if y.dim() != 4 or y.shape[1] != self.num_heads or y.shape[-1] != self.head_dim:
            raise ValueError(
                f"this gate is for [batch, {self.num_heads}, time, {self.head_dim}], got {list(y.shape)} to be gated"
            )
        scores = self.scores(x)
        return y + scores if self.is_additive else y * scores

    def scores(self, x: Float[Tensor, "batch time width"]) -> Float[Tensor, "#batch #heads #time #head_dim"]:
        """Return the gating scores; sizes of 1 are those in which they do not differ.

        Raises:
            ValueError: an input of another width.
        """
        check_input(x, self.width)
        if self.projection is not None:
            logits = self.projection(x).reshape(*x.shape[:2], self.num_heads, -1).transpose(1, 2)
        else:
            assert self.logits is not None
            logits = self.logits[None]
        scores = _ACTIVATIONS[self.activation](logits)
        return scores.mean(1, keepdim=True) if self.is_shared else scores

    def extra_repr(self) -> str:
        """Return what the printed module says of its settings."""
        shared = ", is_shared=True" if self.is_shared else ""
        added = ", is_additive=True" if self.is_additive else ""
        return (
            f"width={self.width}, num_heads={self.num_heads}, head_dim={self.head_dim}, "
            f"granularity={self.granularity!r}, activation={self.activation!r}{shared}{added}"
        )


class HeadNonlinearity(nn.Module):
    """A function of what is gated alone: the paper's controls for what non-linearity does without a gate.

    "rms_norm" divides each head's output by its root mean square and scales it by ``head_dim`` learned factors; "silu"
    is ``y * sigmoid(y)``. It stands where an `AttentionGate` stands.

    Args:
        head_dim: features of a head.
        function: which.

    Raises:
        ValueError: a size below 1, or an unknown function.
    """

    def __init__(self, head_dim: int, function: HeadFunction = "rms_norm") -> None:
        super().__init__()
        if head_dim < 1:
            raise ValueError(f"head_dim must be at least 1, got {head_dim}")
        if function not in get_args(HeadFunction):
            raise ValueError(f"function is 'rms_norm' or 'silu', got {function!r}")
        self.function: nn.Module = nn.RMSNorm(head_dim) if function == "rms_norm" else nn.SiLU()

    def forward(
        self, y: Float[Tensor, "batch heads time head_dim"], x: Float[Tensor, "batch time width"] | None = None
    ) -> Float[Tensor, "batch heads time head_dim"]:
        """Return the function of ``y``; the layer's input makes no difference."""
        changed: Tensor = self.function(y)
        return changed


class GatedAttention(SelfAttention):
    """Self-attention with an `AttentionGate`, by default a sigmoid for each feature of each head's output.

    ====================  =====  =================================================
    ``gate_position``     paper  what is gated
    ====================  =====  =================================================
    ``"heads"``           G1     each head's output, before the output projection
    ``"value"``           G2     values, as they leave their projection
    ``"key"``             G3     keys, before they are normalised and rotated
    ``"query"``           G4     queries, before they are normalised and rotated
    ``"output"``          G5     what leaves the output projection
    ====================  =====  =================================================

    Nothing is added to the cache: the gate of a token depends on that token alone.

    Args:
        width: features of a token.
        num_heads: number of heads.
        gate_position: what is gated; the paper recommends "heads".
        granularity: see `AttentionGate`.
        activation: see `AttentionGate`.
        is_shared: see `AttentionGate`.
        is_additive: see `AttentionGate`.
        is_input_dependent: see `AttentionGate`.
        options: see `SelfAttention`; its bias is also the gate's, where that can have one.

    Raises:
        ValueError: see `SelfAttention` and `AttentionGate`.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        gate_position: GatePosition = "heads",
        granularity: GateGranularity = "element",
        activation: GateActivation | None = None,
        is_shared: bool = False,
        is_additive: bool = False,
        is_input_dependent: bool = True,
        **options: Unpack[HeadOptions],
    ) -> None:
        check_position(gate_position)
        num_kv_heads = options.get("num_kv_heads") or num_heads
        head_dim = check_heads(width, num_heads, num_kv_heads, options.get("head_dim"))
        gated_heads = {"value": num_kv_heads, "key": num_kv_heads, "output": 1}.get(gate_position, num_heads)
        super().__init__(
            width,
            num_heads,
            gate=AttentionGate(
                width,
                gated_heads,
                width if gate_position == "output" else head_dim,
                granularity=granularity,
                activation=activation,
                is_shared=is_shared,
                is_additive=is_additive,
                is_input_dependent=is_input_dependent,
                bias=options.get("bias", True) and is_input_dependent,
            ),
            gate_position=gate_position,
            **options,
        )


def split_query_and_gate(
    weight: Float[Tensor, "rows ..."], num_heads: int, head_dim: int, num_groups: int
) -> tuple[Float[Tensor, "query_rows ..."], Float[Tensor, "gate_rows ..."]]:
    """Take apart a query projection that holds a gate's weights as well, as published checkpoints have it.

    The rows come in groups: first the queries of the group's heads, then their gates. In Qwen3-Next a group is one
    query head, in the paper's own code it is all query heads that share a head of keys.

    Args:
        weight: of the common projection, or its bias. There are ``2 * num_heads * head_dim`` rows for elementwise
            gates, ``num_heads * (head_dim + 1)`` for headwise ones.
        num_heads: number of query heads.
        head_dim: features of a head.
        num_groups: ``num_heads`` for Qwen3-Next, the number of key heads for the paper's code.

    Returns:
        Weights for `SelfAttention.query` and for `AttentionGate.projection`.

    Raises:
        ValueError: another number of rows, or heads that do not form so many groups.
    """
    if min(num_heads, head_dim, num_groups) < 1 or num_heads % num_groups:
        raise ValueError(f"{num_heads} heads of {head_dim} features do not form {num_groups} groups")
    rows, queries = weight.shape[0], num_heads * head_dim
    if rows not in (2 * queries, queries + num_heads):
        raise ValueError(
            f"a query projection with elementwise gates has {2 * queries} rows, with headwise ones "
            f"{queries + num_heads}; got {rows}"
        )
    grouped = weight.reshape(num_groups, -1, *weight.shape[1:])
    query, gate = grouped.tensor_split([queries // num_groups], dim=1)
    return query.flatten(0, 1), gate.flatten(0, 1)
