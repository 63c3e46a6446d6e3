"""Routing fluctuation: how many tokens change their experts from one checkpoint of a training to another.

The measure of a checkpoint against the end of training is that of "StableMoE", arXiv 2204.08396; that of checkpoints in
a row is what "Improving Routing in Sparse Mixture of Experts with Graph of Tokens", arXiv 2505.00792, is about.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Int
from torch import Tensor

Measure = Literal["set", "overlap"]


def routing_fluctuation(
    before: Int[Tensor, "*tokens top_k"],
    after: Int[Tensor, "*tokens top_k"],
    measure: Measure = "set",
    mask: Bool[Tensor, "*tokens"] | None = None,
) -> float:
    """Mean over tokens of ``1{T_a != T_b}`` ("set"), or of ``1 - |T_a & T_b| / top_k`` ("overlap").

    The order of a token's experts does not matter.

    Args:
        before: the chosen experts of one checkpoint, all different for a token.
        after: those of another, of the same tokens.
        measure: whether any change counts, or the share of the experts that changed.
        mask: true where a token counts.

    Raises:
        ValueError: an unknown measure, choices that do not belong together, or no token that counts.
    """
    if measure not in get_args(Measure):
        raise ValueError(f"measure is one of {', '.join(get_args(Measure))}; got {measure!r}")
    if before.shape != after.shape:
        raise ValueError(f"choices of the same tokens have one shape, got {list(before.shape)} and {list(after.shape)}")
    shared = (before.unsqueeze(-1) == after.unsqueeze(-2)).any(-1).double().mean(-1)
    changed = (shared < 1).double() if measure == "set" else 1 - shared
    if mask is not None:
        changed = changed[mask]
    if not changed.numel():
        raise ValueError("fluctuation is a mean over tokens, got none that counts")
    return changed.mean().item()


class RoutingRecorder:
    """Chosen experts of the same tokens at checkpoints of a training, layer by layer.

    Attributes:
        steps: of the checkpoints.
        mask: true where a token counts; None where all do.
    """

    def __init__(self, mask: Bool[Tensor, "batch time"] | None = None) -> None:
        self.steps: list[int] = []
        self.mask = None if mask is None else mask.cpu()
        self._choices: list[list[Tensor]] = []

    def add(self, step: int, indices: Sequence[Int[Tensor, "batch time top_k"]]) -> None:
        """Keep a copy of what was chosen at a checkpoint.

        Args:
            step: of the training, later than the last.
            indices: the chosen experts, one tensor a layer; e.g. the ``indices`` of each `Routing`.

        Raises:
            ValueError: a step that is not later, or other layers or tokens than before.
        """
        shapes = [list(each.shape) for each in indices]
        if self.steps and step <= self.steps[-1]:
            raise ValueError(f"checkpoints come one after the other, got step {step} after {self.steps[-1]}")
        if not shapes or (self._choices and shapes != [list(each.shape) for each in self._choices[-1]]):
            before = [list(each.shape) for each in self._choices[-1]] if self._choices else "some"
            raise ValueError(f"each checkpoint has the same layers and tokens; got {shapes} after {before}")
        self.steps.append(step)
        self._choices.append([each.detach().to("cpu", torch.int16) for each in indices])

    def successive(self, measure: Measure = "set") -> list[float]:
        """Fluctuation from each checkpoint to the next; the mean over layers.

        Args:
            measure: see `routing_fluctuation`.

        Raises:
            ValueError: fewer than two checkpoints, or see `routing_fluctuation`.
        """
        self._check()
        return [self._mean(before, after, measure) for before, after in pairwise(self._choices)]

    def until_end(self, measure: Measure = "set") -> list[float]:
        """Fluctuation from each checkpoint but the last to the last; the mean over layers.

        With one expert a token this is the cumulative change of StableMoE.

        Args:
            measure: see `routing_fluctuation`.

        Raises:
            ValueError: fewer than two checkpoints, or see `routing_fluctuation`.
        """
        self._check()
        return [self._mean(before, self._choices[-1], measure) for before in self._choices[:-1]]

    def _check(self) -> None:
        if len(self.steps) < 2:
            raise ValueError(f"fluctuation needs two checkpoints or more, got {len(self.steps)}")

    def _mean(self, before: list[Tensor], after: list[Tensor], measure: Measure) -> float:
        layers = [routing_fluctuation(a, b, measure, self.mask) for a, b in zip(before, after, strict=True)]
        return sum(layers) / len(layers)
