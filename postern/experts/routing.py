"""What a router says of tokens, what it may know of them, and the losses that keep experts busy and logits small.

The balance loss is that of "Switch Transformers", arXiv 2101.03961; the z-loss that of "ST-MoE", arXiv 2202.08906.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Routing(NamedTuple):
    """Which experts see a token, and how much each counts.

    Attributes:
        weights: of the chosen experts, 0 or more; what they add up to is the router's affair.
        indices: the chosen experts of a token, all different.
        auxiliary_loss: what the router wants added to the loss, a scalar; 0 if nothing.
        probabilities: what the router holds of all experts, adding up to 1; what routers are compared by.
    """

    weights: Float[Tensor, "batch time top_k"]
    indices: Int[Tensor, "batch time top_k"]
    auxiliary_loss: Float[Tensor, ""]
    probabilities: Float[Tensor, "batch time num_experts"]


@dataclass(frozen=True)
class RoutingContext:
    """What a router may know besides the tokens' vectors; each router says what it needs.

    Attributes:
        mask: true where a token counts; None where all do. Others get no expert, and count in no loss.
        token_ids: the tokens' numbers in the vocabulary.
        query: of the attention layer before, as it multiplies them: rotated, not scaled.
        key: likewise, in as many heads or in fewer that query heads share.
        is_causal: whether a token may be routed by earlier ones alone.
        document_ids: whose tokens these are, where a sequence holds several documents: none is routed by those of
            another; None where each sequence is one.
    """

    mask: Bool[Tensor, "batch time"] | None = None
    token_ids: Int[Tensor, "batch time"] | None = None
    query: Float[Tensor, "batch heads time head_dim"] | None = None
    key: Float[Tensor, "batch kv_heads time head_dim"] | None = None
    is_causal: bool = True
    document_ids: Int[Tensor, "batch time"] | None = None


NO_CONTEXT = RoutingContext()


@runtime_checkable
class Router(Protocol):
    """Assigns tokens to experts: a module that is called with tokens and a context.

    Attributes:
        width: features of a token.
        num_experts: how many there are to choose from.
    """

    width: int
    num_experts: int

    def __call__(self, tokens: Float[Tensor, "batch time width"], context: RoutingContext = NO_CONTEXT) -> Routing:
        """Route tokens.

        Args:
            tokens: what the experts will see.
            context: what else is known of them.
        """
        ...


def balance_loss(
    probabilities: Float[Tensor, "*tokens num_experts"],
    indices: Int[Tensor, "*tokens top_k"],
    mask: Bool[Tensor, "*tokens"] | None = None,
) -> Float[Tensor, ""]:
    """``num_experts sum_i f_i P_i``: 1 for an even load, ``num_experts`` where one expert gets all (``top_k`` = 1).

    ``f_i`` is the share of assignments that expert i got, which has no gradient, and ``P_i`` the mean of its
    probability over tokens.

    Args:
        probabilities: of all experts.
        indices: the chosen ones.
        mask: true where a token counts.
    """
    num_experts = probabilities.shape[-1]
    share = expert_shares(indices, num_experts, mask)
    if mask is None:
        mean = _mean(probabilities.flatten(0, -2))
    else:
        mean = (probabilities * mask.unsqueeze(-1)).flatten(0, -2).sum(0) / mask.sum().clamp_min(1)
    return num_experts * (share.to(mean.dtype) * mean).sum()


def expert_shares(
    indices: Int[Tensor, "*tokens top_k"], num_experts: int, mask: Bool[Tensor, "*tokens"] | None = None
) -> Float[Tensor, " num_experts"]:
    """The share of all assignments that each expert got, in float32; zeros where there are none.

    Args:
        indices: the chosen experts.
        num_experts: how many there are.
        mask: true where a token counts.
    """
    counted = torch.ones_like(indices, dtype=torch.float32)
    if mask is not None:
        counted = counted * mask.unsqueeze(-1)
    counts = counted.new_zeros(num_experts).index_add(0, indices.flatten(), counted.flatten())
    return counts / counts.sum().clamp_min(1)


def router_z_loss(
    logits: Float[Tensor, "*tokens num_experts"], mask: Bool[Tensor, "*tokens"] | None = None
) -> Float[Tensor, ""]:
    """``mean logsumexp(logits)^2``, which keeps a router's logits small.

    Args:
        logits: before softmax.
        mask: true where a token counts.
    """
    squares = logits.logsumexp(-1).square()
    return _mean(squares.flatten()) if mask is None else (squares * mask).sum() / mask.sum().clamp_min(1)


def _mean(x: Tensor) -> Tensor:
    """Over tokens, the first axis; 0 where there are none."""
    return x.mean(0) if len(x) else x.sum(0)


def evenly(
    tokens: Float[Tensor, "batch time width"], indices: Int[Tensor, "batch time top_k"], num_experts: int
) -> Routing:
    """Equal weights for the chosen experts, and probabilities likewise.

    Args:
        tokens: what is routed.
        indices: the chosen experts, all different.
        num_experts: how many there are.
    """
    dtype = torch.promote_types(tokens.dtype, torch.float32)
    weights = torch.full(indices.shape, 1 / indices.shape[-1], dtype=dtype, device=indices.device)
    probabilities = weights.new_zeros(*indices.shape[:-1], num_experts).scatter(-1, indices, weights)
    return Routing(weights, indices, weights.new_zeros(()), probabilities)


def check_tokens(router: Router, tokens: Float[Tensor, "batch time width"], context: RoutingContext) -> None:
    """Check that tokens and their context fit a router.

    Args:
        router: what is about to route them.
        tokens: what it is given.
        context: what else it is given.

    Raises:
        ValueError: tokens of another shape or no floating-point numbers, or a mask or numbers of tokens or documents
            that do not belong to them.
    """
    if tokens.dim() != 3 or tokens.shape[2] != router.width or not tokens.is_floating_point():
        raise ValueError(
            f"tokens are floating-point [batch, time, {router.width}], got {tokens.dtype} {list(tokens.shape)}"
        )
    for name, x, kind in (
        ("mask", context.mask, "boolean"),
        ("token_ids", context.token_ids, "integer"),
        ("document_ids", context.document_ids, "integer"),
    ):
        if x is None:
            continue
        is_kind = x.dtype == torch.bool if kind == "boolean" else x.dtype in (torch.int64, torch.int32)
        if x.shape != tokens.shape[:2] or not is_kind:
            raise ValueError(f"{name} is {kind}, {list(tokens.shape[:2])}; got {x.dtype} {list(x.shape)}")


def check_sizes(width: int, num_experts: int, top_k: int) -> None:
    """Check the sizes of a router.

    Args:
        width: features of a token.
        num_experts: how many there are to choose from.
        top_k: experts of a token.

    Raises:
        ValueError: sizes below 1, or more experts a token than there are.
    """
    if min(width, num_experts, top_k) < 1 or top_k > num_experts:
        raise ValueError(
            f"a router has a width, experts, and at most as many for a token; got width={width}, "
            f"num_experts={num_experts}, top_k={top_k}"
        )
