"""Routers compared: one language model with experts, between ordinary blocks of as much work and of as much size."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from postern.claims.comparison import Member, Quantity
from postern.compare.problems import Problem, Words
from postern.compare.training import CROSS_ENTROPY, Learner, make_contest
from postern.experts import (
    ConsistencyLoss,
    CosineRouter,
    DenseToSparseRouter,
    FeedForwardExperts,
    HashRouter,
    LinearTemperatureSchedule,
    MixtureOfExperts,
    RandomRouter,
    Router,
    Routing,
    SoftmaxRouter,
    StochasticRouter,
    TokenGraphRouter,
    expert_shares,
    set_temperature,
    two_passes,
)
from postern.nets import ExpertLanguageModel

WIDTH, HEADS, LAYERS = 64, 4, 2
CONTEXT = 128  # words
EXPERTS, HIDDEN, TOP_K = 8, 64, 2
_PROBED_WINDOWS = 16

LOAD = Quantity("load_entropy", "entropy of the experts' load, % of an even one", higher_is_better=True, scale=100.0)
ROUTING = Quantity("routing_entropy", "entropy of a word's routing, % of an even one", scale=100.0)
ACTIVE = Quantity("active_experts", "experts at work for a word")
ACTIVE_IN_TRAINING = Quantity("active_experts_in_training", "experts at work for a word, mean over training")


@dataclass(frozen=True)
class Entry:
    """How a member takes part.

    Attributes:
        make: makes the router of a layer, for so many different words; None for an ordinary block.
        hidden_dim: hidden width of the ordinary block.
        schedule: temperatures over the budget, of which it is 1 step; None for none.
        alpha: weight of the agreement of two passes of each batch; None for one pass.
    """

    make: Callable[[int], Router] | None
    hidden_dim: int = 0
    schedule: LinearTemperatureSchedule | None = None
    alpha: float | None = None


ENTRIES: Mapping[str, Entry] = {
    "dense": Entry(None, TOP_K * HIDDEN),
    "dense-large": Entry(None, EXPERTS * HIDDEN),
    "softmax": Entry(lambda words: SoftmaxRouter(WIDTH, EXPERTS, TOP_K)),
    "switch": Entry(lambda words: SoftmaxRouter(WIDTH, EXPERTS, 1)),
    "cosine": Entry(lambda words: CosineRouter(WIDTH, EXPERTS, TOP_K)),
    "dense-to-sparse": Entry(
        lambda words: DenseToSparseRouter(WIDTH, EXPERTS, TOP_K), schedule=LinearTemperatureSchedule(1)
    ),
    "activated": Entry(
        lambda words: DenseToSparseRouter(WIDTH, EXPERTS, TOP_K, temperature="learned", activation=torch.tanh)
    ),
    "similarity": Entry(lambda words: TokenGraphRouter(WIDTH, EXPERTS, TOP_K, "similarity")),
    "attention": Entry(lambda words: TokenGraphRouter(WIDTH, EXPERTS, TOP_K, "attention")),
    "hash": Entry(lambda words: HashRouter(WIDTH, EXPERTS, words, TOP_K)),
    "random": Entry(lambda words: RandomRouter(WIDTH, EXPERTS, TOP_K)),
    "stochastic": Entry(lambda words: StochasticRouter(WIDTH, EXPERTS), alpha=5.0),
}
MEMBERS = (
    Member("dense", f"no experts: a block as wide as {TOP_K} of them", "torch.nn.Linear"),
    Member("dense-large", f"no experts: a block as wide as all {EXPERTS} of them", "torch.nn.Linear"),
    Member("softmax", f"the {TOP_K} experts with the highest logits", "postern.experts.SoftmaxRouter"),
    Member("switch", "the expert with the highest logit", "postern.experts.SoftmaxRouter"),
    Member("cosine", "the same by cosines in few dimensions", "postern.experts.CosineRouter"),
    Member(
        "dense-to-sparse",
        "all experts at first, fewer as the temperature falls",
        "postern.experts.DenseToSparseRouter",
        "temperature-gmoe",
    ),
    Member(
        "activated",
        "the same with tanh scores and a temperature that is learnt",
        "postern.experts.DenseToSparseRouter",
        "temperature-gmoe",
    ),
    Member(
        "similarity",
        "the same as softmax, agreed on by words that are alike",
        "postern.experts.TokenGraphRouter",
        "graph-of-tokens-smoe",
    ),
    Member(
        "attention",
        "the same, agreed on by words that attend to each other",
        "postern.experts.TokenGraphRouter",
        "graph-of-tokens-smoe",
    ),
    Member("hash", "fixed experts for each word of the vocabulary", "postern.experts.HashRouter"),
    Member("random", "experts drawn anew for each word", "postern.experts.RandomRouter"),
    Member(
        "stochastic",
        "an expert drawn for each batch; two passes a step, which are to agree",
        "postern.experts.StochasticRouter",
        "thor",
    ),
)


class Routed(Learner):
    """A language model with a member's routers, whose auxiliary losses count in training."""

    def __init__(self, name: str, num_words: int, context: int) -> None:
        super().__init__()
        entry = ENTRIES[name]
        self.schedule = entry.schedule
        self.consistency = None if entry.alpha is None else ConsistencyLoss(entry.alpha)

        def experts(layer: int) -> MixtureOfExperts | None:
            if entry.make is None:
                return None
            return MixtureOfExperts(
                entry.make(num_words), FeedForwardExperts(EXPERTS, WIDTH, HIDDEN, activation=F.relu)
            )

        self.network = ExpertLanguageModel(
            num_words, experts, WIDTH, LAYERS, HEADS, context, feedforward_dim=entry.hidden_dim or None
        )
        self._at_work: list[int] = []  # experts of a word, in each layer and pass of the training
        for layer in self.network.modules():
            if isinstance(layer, MixtureOfExperts):
                layer.register_forward_hook(self._count)

    def _count(self, layer: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Routing]) -> None:
        if layer.training:
            self._at_work.append(output[1].indices.shape[-1])

    @property
    def active_in_training(self) -> float:
        """Experts that worked for a word, the mean over layers and steps; 0 before training and without experts."""
        return sum(self._at_work) / max(1, len(self._at_work))

    def set_progress(self, share: float) -> None:
        """Let the temperature fall."""
        if self.schedule is not None:
            set_temperature(self.network, self.schedule(share))

    def loss(self, inputs: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy and what the routers add; with two passes, the mean of theirs and of how they differ."""
        if self.consistency is not None:
            loss: Tensor = self.consistency(*two_passes(self.network, [inputs]), target) / 2
            return loss
        logits, routings = self.network.route(inputs)
        auxiliary = [routing.auxiliary_loss for routing in routings]
        return torch.stack([F.cross_entropy(logits.flatten(0, 1), target.flatten()), *auxiliary]).sum()

    def scores(self, inputs: Tensor) -> Tensor:
        """The logits."""
        scores: Tensor = self.network(inputs)
        return scores

    def log_probabilities(self, scores: Tensor) -> Tensor | None:
        """By softmax."""
        return torch.log_softmax(scores, -1)


def prepare(problem: Problem) -> Problem:
    """Longer windows of the text."""
    assert isinstance(problem, Words), "the contest takes texts alone"
    return replace(problem, context=CONTEXT)


def build(name: str, problem: Problem, rate: float) -> Routed:
    """An untrained language model with a member's routers."""
    assert isinstance(problem, Words), "the contest takes texts alone"
    return Routed(name, problem.num_classes, problem.context)


@torch.no_grad()
def examine(learner: Learner, problem: Problem) -> dict[str, float]:
    """How evenly experts are used, how decided routers are and how many experts work, over layers; none, nothing."""
    assert isinstance(learner, Routed)
    network = learner.network
    device = next(learner.parameters()).device
    learner.eval()
    _, routings = network.route(problem.batches("test")[0][0][:_PROBED_WINDOWS].to(device))
    if not routings:
        return {}
    load = [_entropy(expert_shares(routing.indices, EXPERTS)) for routing in routings]
    decided = [_entropy(routing.probabilities).mean() for routing in routings]
    active = [(routing.weights > 0).sum(-1).float().mean() for routing in routings]
    return {
        "load_entropy": float(torch.stack(load).mean()) / math.log(EXPERTS),
        "routing_entropy": float(torch.stack(decided).mean()) / math.log(EXPERTS),
        "active_experts": float(torch.stack(active).mean()),
        "active_experts_in_training": learner.active_in_training,
    }


def _entropy(probabilities: Tensor) -> Tensor:
    entropy: Tensor = torch.special.entr(probabilities).sum(-1)
    return entropy


CONTEST = make_contest(
    family="experts",
    module=__name__,
    members=MEMBERS,
    task={
        "text": f"A causal transformer of {LAYERS} layers, {WIDTH} wide, tells each word of the text from the "
        f"{CONTEXT} before it; each layer has {EXPERTS} experts of {HIDDEN} hidden features, and the member is their "
        "router.",
    },
    text_quality=CROSS_ENTROPY,
    build=build,
    prepare=prepare,
    examined=(LOAD, ROUTING, ACTIVE, ACTIVE_IN_TRAINING),
    examine=examine,
)
