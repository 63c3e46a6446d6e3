"""A transformer as a learner, for members that are parts of it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from postern.compare.training import Learner


class Transformer(Learner):
    """A transformer that the shared optimiser trains by cross-entropy."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def loss(self, inputs: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy."""
        return nn.functional.cross_entropy(self.scores(inputs).flatten(0, -2), target.flatten())

    def scores(self, inputs: Tensor) -> Tensor:
        """The logits."""
        scores: Tensor = self.network(inputs)
        return scores

    def log_probabilities(self, scores: Tensor) -> Tensor | None:
        """By softmax, whatever the attention does."""
        return torch.log_softmax(scores, -1)
