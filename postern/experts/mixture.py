"""A layer of experts with any router: tokens are sorted by expert, worked on together, and weighted.

Of the papers on mixtures of experts this is what they share. No expert waits for another, and no token is dropped
unless a capacity says so.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from postern.experts.feedforward import Experts
from postern.experts.routing import NO_CONTEXT, Router, Routing, RoutingContext


@dataclass(frozen=True)
class Capacity:
    """How many tokens an expert takes: ``max(least, ceil(factor * assignments / num_experts))``.

    Assignments are those of all tokens that count. What comes on top is dropped: it adds nothing to its token.

    Attributes:
        factor: 1 is room for an even load.
        least: room that each expert has whatever the number of tokens.
        priority: whom an expert takes: "order", the first ones, those of the first sequence first; "weight", those with
            the largest weights.

    Raises:
        ValueError: a factor that is not positive, or a negative least.
    """

    factor: float
    least: int = 1
    priority: Literal["order", "weight"] = "order"

    def __post_init__(self) -> None:
        if not self.factor > 0 or self.least < 0 or self.priority not in ("order", "weight"):
            raise ValueError(
                "a capacity has a positive factor, a least room of 0 or more, and goes by 'order' or 'weight'; got "
                f"{self.factor}, {self.least} and {self.priority!r}"
            )


@dataclass(frozen=True)
class Dispatch:
    """Assignments sorted by expert; those that no expert takes come last.

    Attributes:
        order: the assignments, numbered ``token * top_k + choice``.
        ends: where the assignments of each expert end.
        num_dropped: assignments of tokens that count, which no expert took.
    """

    order: Int[Tensor, " assignments"]
    ends: Int[Tensor, " num_experts"]
    num_dropped: Int[Tensor, ""]


def dispatch(
    routing: Routing, num_experts: int, context: RoutingContext = NO_CONTEXT, capacity: Capacity | None = None
) -> Dispatch:
    """Sort the assignments of a routing by expert.

    Args:
        routing: who goes where.
        num_experts: how many there are.
        context: whose mask says which tokens count.
        capacity: how many an expert takes; None for all.
    """
    indices = routing.indices
    counts = indices if context.mask is None else indices.masked_fill(~context.mask[..., None], num_experts)
    expert = counts.flatten()
    order = torch.arange(len(expert), device=expert.device)
    if capacity is not None and capacity.priority == "weight":
        order = routing.weights.flatten().argsort(descending=True, stable=True)
    order = order[expert[order].argsort(stable=True)]
    ends = _ends(expert[order], num_experts)
    dropped = ends.new_zeros(())
    if capacity is not None:
        # the place among those of the same expert
        starts = torch.cat([ends.new_zeros(1), ends])[:-1]
        chosen = expert[order].clamp_max(num_experts - 1)
        place = torch.arange(len(order), device=order.device) - starts[chosen]
        room = (ends[-1].double() * capacity.factor / num_experts).ceil().clamp_min(capacity.least)
        is_taken = (place < room) & (expert[order] < num_experts)
        kept = torch.where(is_taken, expert[order], num_experts)
        again = kept.argsort(stable=True)
        dropped = ends[-1] - is_taken.sum()
        order, ends = order[again], _ends(kept[again], num_experts)
    return Dispatch(order, ends, dropped)


def _ends(sorted_experts: Tensor, num_experts: int) -> Tensor:
    return torch.searchsorted(sorted_experts, torch.arange(num_experts, device=sorted_experts.device), right=True)


class MixtureOfExperts(nn.Module):
    """``y_t = sum_k weight_tk expert_{index_tk}(x_t)``, with the router's choice of experts.

    The layer returns the routing with the output: add ``routing.auxiliary_loss`` to the loss.

    Args:
        router: assigns tokens to experts.
        experts: as many as the router knows.
        capacity: how many tokens an expert takes; None for all.

    Raises:
        ValueError: another number of experts than the router's, or experts that take no order of assignments.
    """

    def __init__(self, router: Router, experts: Experts, *, capacity: Capacity | None = None) -> None:
        super().__init__()
        if router.num_experts != experts.num_experts:
            raise ValueError(f"the router knows {router.num_experts} experts, but there are {experts.num_experts}")
        _check_takes_order(experts)
        self.router = router
        self.experts = experts
        self.capacity = capacity
        self.width = router.width
        self.num_experts = router.num_experts

    def forward(
        self, tokens: Float[Tensor, "batch time width"], context: RoutingContext = NO_CONTEXT
    ) -> tuple[Float[Tensor, "batch time width"], Routing]:
        """Route tokens and let the experts work; tokens that do not count give zeros.

        Args:
            tokens: what the router judges by and the experts see.
            context: what else the router may know.

        Raises:
            ValueError: tokens that do not fit, or what the router needs and was not given.
        """
        routing = self.router(tokens, context)
        found = dispatch(routing, self.num_experts, context, self.capacity)
        top_k = routing.indices.shape[-1]
        rows = tokens.flatten(0, 1)
        outputs = self.experts(rows, found.ends, found.order).view(len(rows), top_k, self.width)
        weights = routing.weights.flatten(0, 1).unsqueeze(1).to(outputs.dtype)
        return torch.bmm(weights, outputs).view(tokens.shape), routing


def _check_takes_order(experts: Experts) -> None:
    called = inspect.signature(experts.forward if isinstance(experts, nn.Module) else experts)
    try:
        called.bind("rows", "ends", "order")
    except TypeError:
        raise ValueError(
            f"a bank of experts is called with (rows, ends, order), but {type(experts).__name__} takes {called}; "
            "postern.experts.in_order does the rest for a bank that takes sorted rows"
        ) from None


def evaluate_densely(
    layer: MixtureOfExperts, tokens: Float[Tensor, "batch time width"], context: RoutingContext = NO_CONTEXT
) -> Float[Tensor, "batch time width"]:
    """What the layer computes, by letting every expert see every token: the definition, for tests.

    Args:
        layer: without a capacity.
        tokens: as the layer's.
        context: as the layer's.

    Raises:
        ValueError: a layer with a capacity.
    """
    if layer.capacity is not None:
        raise ValueError(f"a layer that drops tokens has no dense form; its capacity is {layer.capacity}")
    routing = layer.router(tokens, context)
    rows = tokens.flatten(0, 1)
    weights = tokens.new_zeros(len(rows), layer.num_experts)
    weights = weights.scatter_add(1, routing.indices.flatten(0, 1), routing.weights.flatten(0, 1).to(weights.dtype))
    if context.mask is not None:
        weights = weights * context.mask.flatten()[:, None]
    output = torch.zeros_like(rows)
    for expert in range(layer.num_experts):
        ends = torch.zeros(layer.num_experts, dtype=torch.int64, device=rows.device)
        ends[expert:] = len(rows)
        output = output + weights[:, expert, None] * layer.experts(rows, ends)
    return output.view(tokens.shape)
