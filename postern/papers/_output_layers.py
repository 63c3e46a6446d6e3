"""Output layers as users would train them by gradient descent, for claims and benchmarks about their speed.

Each has a ``loss`` whose backward pass also reaches the hidden vectors, and a ``step`` that updates its weights. None
touches more memory than it has to: layers that use some rows of a table only also update only these.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from postern.heads import FactoredLinear, SoftmaxHead


class OutputLayer(Protocol):
    """An output layer that can be trained."""

    def loss(self, hidden: Tensor, target: Tensor) -> Tensor:
        """Return the mean loss; classes are sorted by frequency, the most frequent first."""
        ...

    def step(self) -> None:
        """Make a step of gradient descent with the gradients of the last backward pass."""
        ...


class FullSoftmax(nn.Module):
    """Log-softmax over all classes."""

    def __init__(self, width: int, classes: int, rate: float) -> None:
        super().__init__()
        self.head = SoftmaxHead(width, classes)
        self.optimizer = torch.optim.SGD(self.head.parameters(), rate)

    def loss(self, hidden: Tensor, target: Tensor) -> Tensor:
        """Return the mean cross-entropy."""
        return self.head.loss(hidden, target)

    def step(self) -> None:
        """Update all weights."""
        self.optimizer.step()
        self.optimizer.zero_grad()


class AdaptiveSoftmax(nn.Module):
    """torch's adaptive softmax, its clusters cut as is usual for the One Billion Word vocabulary."""

    SHARES = (1 / 80, 1 / 16, 1 / 4)  # 10,000, 50,000 and 200,000 of 793,471 words

    def __init__(self, width: int, classes: int, rate: float) -> None:
        super().__init__()
        cutoffs = sorted({max(2, round(classes * share)) for share in self.SHARES})
        self.head = nn.AdaptiveLogSoftmaxWithLoss(width, classes, cutoffs, head_bias=True)
        self.optimizer = torch.optim.SGD(self.head.parameters(), rate)

    def loss(self, hidden: Tensor, target: Tensor) -> Tensor:
        """Return the mean cross-entropy."""
        loss: Tensor = self.head(hidden, target).loss
        return loss

    def step(self) -> None:
        """Update all weights."""
        self.optimizer.step()
        self.optimizer.zero_grad()


class _Table(nn.Module):
    """Rows of weights of which a step uses some."""

    rows: Tensor

    def __init__(self, count: int, width: int, scale: float) -> None:
        super().__init__()
        self.register_buffer("rows", torch.empty(count, width).uniform_(-scale, scale))
        self._taken: list[tuple[Tensor, Tensor]] = []

    def take(self, index: Tensor) -> Tensor:
        """Copies of some rows, each named once, that a backward pass gives gradients."""
        taken = self.rows.index_select(0, index).requires_grad_()
        self._taken.append((index, taken))
        return taken

    def step(self, rate: float) -> None:
        """Update the rows that were taken."""
        for index, taken in self._taken:
            if taken.grad is not None:
                self.rows.index_add_(0, index, taken.grad, alpha=-rate)
        self._taken = []


class HierarchicalSoftmax(nn.Module):
    """Two levels of softmax: over ceil(sqrt(D)) groups of neighbours, then over the classes of the target's group."""

    def __init__(self, width: int, classes: int, rate: float) -> None:
        super().__init__()
        self.size = math.ceil(math.sqrt(classes))
        self.width = width
        self.groups = SoftmaxHead(width, math.ceil(classes / self.size))
        self.members = _Table(self.groups.num_classes, self.size * (width + 1), width**-0.5)
        self.optimizer = torch.optim.SGD(self.groups.parameters(), rate)
        self.rate = rate

    def loss(self, hidden: Tensor, target: Tensor) -> Tensor:
        """Return the mean of ``-log p(group) - log p(class | group)``."""
        group, member = target // self.size, target % self.size
        order = group.argsort()
        present, counts = torch.unique_consecutive(group[order], return_counts=True)
        blocks = self.members.take(present).view(-1, self.width + 1, self.size)
        parts = torch.split(hidden[order], counts.tolist())
        scores = torch.cat(
            [torch.addmm(block[-1], part, block[:-1]) for part, block in zip(parts, blocks, strict=True)]
        )
        return self.groups.loss(hidden, group) + nn.functional.cross_entropy(scores, member[order])

    def step(self) -> None:
        """Update the groups, and the members of those that were targets."""
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.members.step(self.rate)


class SampledSoftmax(nn.Module):
    """Softmax over the target and a sample of the other classes, the same for the batch.

    The exponentials of n classes drawn with the odds p, divided by n p, estimate the sum over all; here
    ``p(k) = log((k + 2) / (k + 1)) / log(D + 1)``, near Zipf's law.
    """

    def __init__(self, width: int, classes: int, rate: float, samples: int) -> None:
        super().__init__()
        self.classes = classes
        self.samples = samples
        self.rate = rate
        self.table = _Table(classes, width + 1, width**-0.5)

    def loss(self, hidden: Tensor, target: Tensor) -> Tensor:
        """Return the mean cross-entropy over the target and the sample."""
        uniform = torch.rand(self.samples, device=target.device)
        drawn = (torch.exp(uniform * math.log(self.classes + 1)) - 1).long().clamp_max(self.classes - 1)
        present, index = torch.unique(torch.cat([target, drawn]), return_inverse=True)
        rows = self.table.take(present)
        own, others = rows[index[: len(target)]], rows[index[len(target) :]]
        true_scores = torch.linalg.vecdot(own[:, :-1], hidden) + own[:, -1]
        scores = torch.addmm(others[:, -1] - self._log_expected(drawn), hidden, others[:, :-1].T)
        scores = scores.masked_fill(drawn == target[:, None], -torch.inf)
        losses: Tensor = torch.logsumexp(torch.cat([true_scores[:, None], scores], 1), 1) - true_scores
        return losses.mean()

    def step(self) -> None:
        """Update the rows of the targets and of the sample."""
        self.table.step(self.rate)

    def _log_expected(self, index: Tensor) -> Tensor:
        """Logarithm of how often a class is in the sample, on average."""
        place = index.float()
        return torch.log(self.samples * torch.log1p(1 / (place + 1)) / math.log(self.classes + 1))


def zipf_classes(count: int, classes: int, generator: torch.Generator) -> Tensor:
    """Classes drawn with probabilities as 1 / (rank + 1), the ranks from 0: the frequencies of words, about.

    By inverting the distribution function of ``1 / x`` on ``[1, D + 1]``: its integrals over unit intervals.
    """
    uniform = torch.rand(count, generator=generator, dtype=torch.float64)
    return (torch.exp(uniform * math.log(classes + 1)) - 1).long().clamp_max(classes - 1)


def restoring(layer: FactoredLinear) -> Callable[[], None]:
    """A call that brings a sixth of the singular values of U back to 1, from far below and far above in turn.

    The weights are not what they were afterwards: for timing only.
    """
    width = len(layer.mixer)
    values = torch.ones(width, device=layer.mixer.device)
    values[: max(1, width // 6)] = 2 * layer.singular_range[1]
    mixers = [torch.diag(values), torch.diag(1 / values)]

    def restore() -> None:
        layer.mixer.copy_(mixers[0])
        mixers.reverse()
        layer.stabilize()

    return restore
