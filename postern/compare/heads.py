"""Output layers compared: the same network below, each head with its own loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from postern.claims.comparison import Member
from postern.compare.problems import CONTEXT, Problem, Words
from postern.compare.training import NEXT_WORD, Learner, make_contest
from postern.heads import SoftmaxHead, StableMaxHead, SVMHead
from postern.nets import MLP, ConvNet, LanguageModel
from postern.softmax import log_stablemax

TEXT_WIDTH = 128
MakeHead = Callable[[int, int, float], nn.Module]  # (in_features, num_classes, learning rate)
LogProbabilities = Callable[[Tensor], Tensor]


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
    log_probabilities: LogProbabilities | None = None
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


log_softmax = partial(torch.log_softmax, dim=-1)
ENTRIES: Mapping[str, Entry] = {
    "softmax": Entry(lambda width, classes, rate: SoftmaxHead(width, classes), log_softmax),
    "stablemax": Entry(lambda width, classes, rate: StableMaxHead(width, classes), partial(log_stablemax, dim=-1)),
    "svm": Entry(lambda width, classes, rate: SVMHead(width, classes)),
}
MEMBERS = (
    Member("softmax", "linear layer and cross-entropy", "postern.heads.SoftmaxHead"),
    Member("stablemax", "StableMax in the place of softmax", "postern.heads.StableMaxHead", "grokking-stablemax"),
    Member("svm", "L2 support vector machine, one against the rest", "postern.heads.SVMHead", "cnn-svm"),
)


def build(name: str, problem: Problem, rate: float) -> Headed:
    """An untrained network with a head."""
    trunk, width = trunk_of(problem)
    entry = ENTRIES[name]
    return Headed(trunk, entry.make(width, problem.num_classes, rate), entry.log_probabilities)


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
