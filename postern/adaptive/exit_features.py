"""What the exits of a network with a frozen backbone see, computed once for training and calibration."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from postern.adaptive.early_exit import EarlyExitModel
from postern.nets import evaluating


@dataclass(frozen=True, eq=False)
class ExitFeatures:
    """What exits see of samples, computed once: a frozen backbone gives the same each time.

    Args:
        features: of each exit after pooling.
        final_logits: of the backbone.
        labels: the right classes.

    Raises:
        ValueError: other numbers of samples in one of them, or none.
    """

    features: tuple[Float[Tensor, "samples width"], ...]
    final_logits: Float[Tensor, "samples classes"]
    labels: Int64[Tensor, " samples"]

    def __post_init__(self) -> None:
        sizes = [len(each) for each in (*self.features, self.final_logits, self.labels)]
        if len(set(sizes)) != 1 or not sizes[0] or not self.features:
            raise ValueError(f"features, logits and labels are of the same samples, got {sizes} of them")

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, indices: Tensor) -> ExitFeatures:
        """Those of some samples.

        Args:
            indices: the samples' numbers.
        """
        return ExitFeatures(
            tuple(each[indices] for each in self.features), self.final_logits[indices], self.labels[indices]
        )

    def all_logits(self, model: EarlyExitModel) -> list[Float[Tensor, "samples classes"]]:
        """Logits of every exit, the final head last, without running the backbone.

        Args:
            model: whose classifiers to apply.
        """
        return [*model.exit_logits(self.features), self.final_logits]


@torch.no_grad()
def cache_exit_features(model: EarlyExitModel, batches: Iterable[tuple[Any, Tensor]]) -> ExitFeatures:
    """Run the backbone once over labelled samples, in evaluation mode, and keep what the exits see.

    Args:
        model: with its exits.
        batches: pairs of inputs (a tensor, a tuple of them, or a mapping by name) and labels.

    Raises:
        ValueError: no batches.
    """
    found: list[ExitFeatures] = []
    with evaluating(model):
        for inputs, labels in batches:
            if isinstance(inputs, Mapping):
                features, final = model.features(**inputs)
            else:
                features, final = model.features(*(inputs if isinstance(inputs, tuple | list) else (inputs,)))
            found.append(ExitFeatures(tuple(features), final, labels))
    if not found:
        raise ValueError("features come from at least one batch, got none")
    return ExitFeatures(
        tuple(torch.cat(parts) for parts in zip(*(each.features for each in found), strict=True)),
        torch.cat([each.final_logits for each in found]),
        torch.cat([each.labels for each in found]),
    )
