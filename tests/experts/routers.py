"""The routers that follow the protocol: each is put through `test_routers` by its entry here."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from postern.experts import (
    CosineRouter,
    DenseToSparseRouter,
    HashRouter,
    RandomRouter,
    RoutingContext,
    SoftmaxRouter,
    StochasticRouter,
    TokenGraphRouter,
)

WIDTH, EXPERTS, BATCH, TIME, VOCABULARY = 8, 5, 2, 7, 11


@dataclass(frozen=True)
class Entry:
    """How a router is made and what may be asked of it.

    Attributes:
        build: of width `WIDTH`, for `EXPERTS`.
        draws: whether it routes at random, in evaluation as well.
        compile: whether it compiles to one graph in training.
        sums_to_one: whether the weights of a token add up to 1 in evaluation.
    """

    build: Callable[[], nn.Module]
    draws: bool = False
    compile: bool = True
    sums_to_one: bool = True


ROUTERS = {
    "softmax": Entry(partial(SoftmaxRouter, WIDTH, EXPERTS)),
    "switch": Entry(partial(SoftmaxRouter, WIDTH, EXPERTS, 1, z=1e-3, bias=True), sums_to_one=False),
    "mixtral": Entry(partial(SoftmaxRouter, WIDTH, EXPERTS, 3, renormalises=True, temperature=0.5)),
    "cosine": Entry(partial(CosineRouter, WIDTH, EXPERTS)),
    "cosine-switch": Entry(
        partial(CosineRouter, WIDTH, EXPERTS, 1, dimensions=3, z=1e-3, temperature=1.0), sums_to_one=False
    ),
    "dense-to-sparse": Entry(partial(DenseToSparseRouter, WIDTH, EXPERTS), compile=False),
    "activated": Entry(
        partial(DenseToSparseRouter, WIDTH, EXPERTS, 1, temperature="learned", activation=torch.tanh, has_noise=False),
        compile=False,
    ),
    "similarity-aware": Entry(partial(TokenGraphRouter, WIDTH, EXPERTS)),
    "similarity-aware-logits": Entry(
        partial(TokenGraphRouter, WIDTH, EXPERTS, 1, mix="logits", similarity="distance", tau=4.0, z=1e-3, bias=True),
        sums_to_one=False,
    ),
    "attention-aware": Entry(partial(TokenGraphRouter, WIDTH, EXPERTS, graph="attention")),
    "attention-aware-learned-heads": Entry(
        partial(TokenGraphRouter, WIDTH, EXPERTS, 3, graph="attention", heads="learned", num_heads=4, mix="chosen")
    ),
    "attention-aware-sharpest-head": Entry(
        partial(
            TokenGraphRouter,
            WIDTH,
            EXPERTS,
            graph="attention",
            heads="sharpest",
            self_weight=0.0,
            weights="own",
            balances="own",
        )
    ),
    "uniform-graph": Entry(partial(TokenGraphRouter, WIDTH, EXPERTS, graph="uniform")),
    "hash": Entry(partial(HashRouter, WIDTH, EXPERTS, VOCABULARY, 2)),
    "random": Entry(partial(RandomRouter, WIDTH, EXPERTS, 2), draws=True),
    "stochastic": Entry(partial(StochasticRouter, WIDTH, EXPERTS), draws=True),
    "ensemble": Entry(partial(StochasticRouter, WIDTH, EXPERTS, level="ensemble"), draws=True),
}


def context(*, is_causal: bool = True, mask: torch.Tensor | None = None) -> RoutingContext:
    """All that a router may ask for."""
    generator = torch.Generator().manual_seed(1)
    return RoutingContext(
        mask=mask,
        token_ids=torch.randint(VOCABULARY, (BATCH, TIME), generator=generator),
        query=torch.randn(BATCH, 4, TIME, 6, generator=generator),
        key=torch.randn(BATCH, 2, TIME, 6, generator=generator),
        is_causal=is_causal,
    )


def double(found: RoutingContext) -> RoutingContext:
    """The context in float64."""
    assert found.query is not None
    assert found.key is not None
    return replace(found, query=found.query.double(), key=found.key.double())
