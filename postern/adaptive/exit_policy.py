"""Policies that decide at each exit of a network which samples stop there, all of one protocol.

Papers: BranchyNet (arXiv 1709.01686) for the threshold on the entropy; Multi-Scale Dense Networks (arXiv 1703.09844)
for that on the largest probability; BERT Loses Patience (arXiv 2006.04152) for patience. Learnt gates are in
`postern.adaptive.exit_gates`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor


@runtime_checkable
class ExitPolicy(Protocol):
    """Decides from the logits of an exit, and from what it remembers of the exits before, which samples stop."""

    def decide(
        self, logits: Float[Tensor, "batch classes"], index: int, state: Tensor | None
    ) -> tuple[Bool[Tensor, " batch"], Tensor | None]:
        """Decide for the samples that have come as far as an exit.

        Args:
            logits: of this exit, one row a sample.
            index: the exit's number; 0 is the first.
            state: what the policy returned at the exit before, with the rows of these samples; None at the first exit,
                or for a policy that remembers nothing.

        Returns:
            Whether each sample stops, and the state for the next exit, one row a sample, or None.
        """
        ...


@dataclass(frozen=True)
class _Threshold:
    """One for all exits, or one an exit."""

    threshold: float | Sequence[float]

    def __post_init__(self) -> None:
        if isinstance(self.threshold, Sequence):
            object.__setattr__(self, "threshold", tuple(float(each) for each in self.threshold))
        each = self.threshold if isinstance(self.threshold, tuple) else (self.threshold,)
        if not each or any(value != value for value in each):
            raise ValueError(f"thresholds are numbers, at least one, got {self.threshold!r}")

    def _at(self, index: int) -> float:
        if not isinstance(self.threshold, Sequence):
            return self.threshold
        if index >= len(self.threshold):
            raise ValueError(f"{len(self.threshold)} thresholds are for as many exits, got exit number {index}")
        return self.threshold[index]


@dataclass(frozen=True)
class MaxProbExit(_Threshold):
    """Stop where the largest softmax probability reaches a threshold: ``max_c p_c >= threshold``.

    Args:
        threshold: one for all exits, or one an exit, as `calibrate_thresholds` finds them. Above 1 nothing stops.

    Raises:
        ValueError: no threshold, or one that is NaN.
    """

    def decide(
        self, logits: Float[Tensor, "batch classes"], index: int, state: Tensor | None
    ) -> tuple[Bool[Tensor, " batch"], None]:
        """Decide for the samples that have come as far as an exit; see `ExitPolicy`.

        Raises:
            ValueError: an exit beyond the last threshold.
        """
        return logits.softmax(1).amax(1) >= self._at(index), None


@dataclass(frozen=True)
class EntropyExit(_Threshold):
    """Stop where the entropy of the softmax falls to a threshold: ``-sum_c p_c log p_c <= threshold``.

    Args:
        threshold: in nats, one for all exits, or one an exit. Below 0 nothing stops.

    Raises:
        ValueError: no threshold, or one that is NaN.
    """

    def decide(
        self, logits: Float[Tensor, "batch classes"], index: int, state: Tensor | None
    ) -> tuple[Bool[Tensor, " batch"], None]:
        """Decide for the samples that have come as far as an exit; see `ExitPolicy`.

        Raises:
            ValueError: an exit beyond the last threshold.
        """
        return torch.special.entr(logits.softmax(1)).sum(1) <= self._at(index), None


@dataclass(frozen=True)
class PatienceExit:
    """Stop as soon as so many exits after one another have agreed with the one before them.

    Args:
        patience: agreements in a row that are needed, at least 1; the first exit can agree with none.

    Raises:
        ValueError: a patience below 1.
    """

    patience: int

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise ValueError(f"patience is at least 1, got {self.patience}")

    def decide(
        self, logits: Float[Tensor, "batch classes"], index: int, state: Int64[Tensor, "batch 2"] | None
    ) -> tuple[Bool[Tensor, " batch"], Int64[Tensor, "batch 2"]]:
        """Decide for the samples that have come as far as an exit; see `ExitPolicy`.

        The state holds the class that the exit before has predicted, and the agreements in a row.
        """
        predicted = logits.argmax(1)
        if state is None:
            agreements = torch.zeros_like(predicted)
        else:
            agreements = torch.where(predicted == state[:, 0], state[:, 1] + 1, 0)
        return agreements >= self.patience, torch.stack([predicted, agreements], dim=1)


def replay_exits(policy: ExitPolicy, logits: Sequence[Float[Tensor, "batch classes"]]) -> Int64[Tensor, " batch"]:
    """Where a policy would stop each sample, found from the logits of all exits.

    The numbers are those that `EarlyExitModel.forward_dynamic` gives, which computes no more than it must.

    Args:
        policy: decides.
        logits: of each exit, the final head last, as `EarlyExitModel.forward_all` returns them.

    Returns:
        The exit of each sample; ``len(logits) - 1`` for the final head, which all take that nothing has stopped.

    Raises:
        ValueError: no logits.
    """
    if not len(logits):
        raise ValueError("exits are replayed from the logits of at least the final head, got none")
    exits = torch.full((len(logits[0]),), len(logits) - 1, device=logits[0].device)
    state = None
    for index, each in enumerate(logits[:-1]):
        stops, state = policy.decide(each, index, state)
        exits = torch.where(stops, exits.clamp_max(index), exits)
    return exits


def select_exits(
    logits: Sequence[Float[Tensor, "batch classes"]], exits: Int64[Tensor, " batch"]
) -> Float[Tensor, "batch classes"]:
    """The logits with which each sample leaves the network.

    Args:
        logits: of each exit, the final head last.
        exits: the exit of each sample, as `replay_exits` finds them.
    """
    return torch.stack(tuple(logits))[exits, torch.arange(len(exits), device=exits.device)]
