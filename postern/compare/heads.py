"""Output layers compared: the same network below, each head with its own loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from postern.claims.comparison import Member
from postern.compare.problems import CONTEXT, Problem, Words
from postern.compare.training import NEXT_WORD, Learner, make_contest
from postern.heads import (
    AdaptiveSoftmaxHead,
    FactoredLinear,
    FactoredSphericalHead,
    LowRankHead,
    SoftmaxHead,
    SphericalSoftmaxHead,
    StableMaxHead,
    SVMHead,
    TaylorSoftmaxHead,
    VQLogitsHead,
    ZLoss,
    ZLossHead,
    frequency_mapping,
    unigram_bias,
)
from postern.nets import MLP, ConvNet, LanguageModel
from postern.softmax import log_stablemax

TEXT_WIDTH = 128
MakeHead = Callable[[int, Tensor, float], nn.Module]  # (in_features, counts of the classes, learning rate)
LogProbabilities = Callable[[Tensor], Tensor]
log_softmax = partial(torch.log_softmax, dim=-1)

# Plain gradient descent needs larger steps than Adam: the grid times this.
DESCENT_RATE = 100.0
CODES = 8  # classes a code, on average


@dataclass(frozen=True)
class Entry:
    """How a head takes part.

    Attributes:
        make: makes it.
        log_probabilities: of its logits, None where it gives no probabilities.
        least_classes: below so many it makes no sense.
        why: then, the reason.
    """

    make: MakeHead
    log_probabilities: LogProbabilities | None = log_softmax
    least_classes: int = 2
    why: str = ""


class Headed(Learner):
    """A network below a head."""

    def __init__(self, trunk: nn.Module, head: nn.Module, log_probabilities: LogProbabilities | None) -> None:
        super().__init__()
        self.trunk: Any = trunk
        self.head: Any = head
        self._log_probabilities = log_probabilities

    def loss(self, inputs: Tensor, target: Tensor) -> Tensor:
        """The head's loss."""
        loss: Tensor = self.head.loss(self.trunk.features(inputs).flatten(0, -2), target.flatten())
        return loss

    def scores(self, inputs: Tensor) -> Tensor:
        """The head's logits."""
        scores: Tensor = self.head.logits(self.trunk.features(inputs))
        return scores

    def log_probabilities(self, scores: Tensor) -> Tensor | None:
        """As the head means its logits."""
        return None if self._log_probabilities is None else self._log_probabilities(scores)


def trunk_of(problem: Problem) -> tuple[nn.Module, int]:
    """The network below the heads, whose own output layer is not used, and the width of what it gives."""
    if isinstance(problem, Words):
        model = LanguageModel(problem.num_classes, TEXT_WIDTH, num_layers=2, num_heads=4, context=CONTEXT)
        return model, TEXT_WIDTH
    if problem.kind == "images":
        return ConvNet(problem.shape[0], 1, (16, 32, 64, 64)), 64
    return MLP(problem.shape[0], 1, (128, 64)), 64


def target_z(num_classes: int) -> float:
    """The Z-loss's b: half of the highest z-score there can be, and 8 at most, which suits thousands of classes."""
    return min(8.0, math.sqrt(num_classes - 1) / 2)


def make_factored(width: int, counts: Tensor, rate: float) -> nn.Module:
    """The Z-loss on a layer that trains itself."""
    layer = FactoredLinear(width, len(counts), learning_rate=DESCENT_RATE * rate)
    return FactoredSphericalHead(layer, ZLoss(b=target_z(len(counts))))


def make_codebook(width: int, counts: Tensor, with_bias: bool) -> nn.Module:
    """Codes of equally frequent classes, as the paper has them or with the classes' frequencies as biases."""
    mapping = frequency_mapping(counts, max(2, len(counts) // CODES))
    bias = unigram_bias(counts, mapping) if with_bias else None
    return VQLogitsHead(width, len(counts), int(mapping.max()) + 1, mapping, token_bias=bias)


def make_adaptive(width: int, counts: Tensor, rate: float) -> nn.Module:
    """Torch's adaptive softmax with a tenth and a half of the classes in the first clusters."""
    return AdaptiveSoftmaxHead(width, counts, (len(counts) // 10, len(counts) // 2))


SHARED = "classes that share a code cannot be told apart, so that it suits large vocabularies"
ENTRIES: Mapping[str, Entry] = {
    "softmax": Entry(lambda width, counts, rate: SoftmaxHead(width, len(counts))),
    "stablemax": Entry(lambda width, counts, rate: StableMaxHead(width, len(counts)), partial(log_stablemax, dim=-1)),
    "svm": Entry(lambda width, counts, rate: SVMHead(width, len(counts)), None),
    "z-loss": Entry(lambda width, counts, rate: ZLossHead(width, len(counts), b=target_z(len(counts))), None),
    "factored-z-loss": Entry(make_factored, None),
    "taylor": Entry(lambda width, counts, rate: TaylorSoftmaxHead(width, len(counts))),
    "spherical": Entry(lambda width, counts, rate: SphericalSoftmaxHead(width, len(counts))),
    "vq-logits": Entry(lambda width, counts, rate: make_codebook(width, counts, False), least_classes=100, why=SHARED),
    "vq-logits-unigram": Entry(
        lambda width, counts, rate: make_codebook(width, counts, True), least_classes=100, why=SHARED
    ),
    "low-rank": Entry(
        lambda width, counts, rate: LowRankHead(width, len(counts), width // CODES),
        least_classes=100,
        why="two thin matrices save nothing where there are few classes",
    ),
    "adaptive": Entry(
        make_adaptive, least_classes=100, why="it has narrower vectors for rare classes, so that it suits many"
    ),
}
MEMBERS = (
    Member("softmax", "linear layer and cross-entropy", "postern.heads.SoftmaxHead"),
    Member("stablemax", "StableMax in the place of softmax", "postern.heads.StableMaxHead", "grokking-stablemax"),
    Member("svm", "L2 support vector machine, one against the rest", "postern.heads.SVMHead", "cnn-svm"),
    Member("z-loss", "z-score of the target, a = 1, b by the number of classes", "postern.heads.ZLossHead", "z-loss"),
    Member(
        "factored-z-loss",
        f"the same without computing scores, by gradient descent at {DESCENT_RATE:g} times the rate",
        "postern.heads.FactoredSphericalHead",
        "z-loss",
    ),
    Member("taylor", "softmax of the second order", "postern.heads.TaylorSoftmaxHead", "z-loss"),
    Member("spherical", "squares of the scores, normalised", "postern.heads.SphericalSoftmaxHead", "z-loss"),
    Member("vq-logits", f"one vector for {CODES} classes", "postern.heads.VQLogitsHead", "vq-logits"),
    Member("vq-logits-unigram", "the same with frequencies as biases", "postern.heads.VQLogitsHead", "vq-logits"),
    Member("low-rank", f"a matrix of an {CODES}th of the rank", "postern.heads.LowRankHead"),
    Member("adaptive", "narrower vectors for rare classes", "postern.heads.AdaptiveSoftmaxHead"),
)


def build(name: str, problem: Problem, rate: float) -> Headed:
    """An untrained network with a head."""
    trunk, width = trunk_of(problem)
    entry = ENTRIES[name]
    return Headed(trunk, entry.make(width, problem.counts(), rate), entry.log_probabilities)


def unsuited(problem: Problem) -> dict[str, str]:
    """Heads that need more classes than there are."""
    classes = problem.num_classes
    return {
        name: f"{entry.why} (the data has {classes} classes, it takes {entry.least_classes} or more)"
        for name, entry in ENTRIES.items()
        if classes < entry.least_classes
    }


CONTEST = make_contest(
    family="heads",
    module=__name__,
    members=MEMBERS,
    task={
        "text": f"A causal transformer of two layers, {TEXT_WIDTH} wide, tells each word of the text from the "
        f"{CONTEXT} before it; the head is not tied to the embedding.",
        "table": "A multilayer perceptron with hidden layers of 128 and 64 classifies the rows.",
        "images": "A convolutional network of four stages classifies the images.",
    },
    text_quality=NEXT_WORD,
    build=build,
    unsuited=unsuited,
)
