"""Top-p and top-k as maps from utilities to probabilities: the baselines of `postern.heads.utility_transforms`.

They keep the best outcomes with the mass that the softmax gives them and exclude the others, so that they too keep the
order of the utilities. Top-p: "The Curious Case of Neural Text Degeneration" (arXiv 1904.09751). Top-k: "Hierarchical
Neural Story Generation" (arXiv 1805.04833).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from postern.heads.utility_transforms import UtilityTransform, check_utilities


class TopPTransform(UtilityTransform):
    """The fewest outcomes whose probabilities reach a mass ``p``, renormalised.

    Args:
        mass: ``p``, above 0 and at most 1; 1 keeps everything.

    Raises:
        ValueError: a mass outside (0, 1].
    """

    fitted = "mass"
    # fmt: off
    grid = (0.3, 0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8, 0.825, 0.85, 0.875, 0.9, 0.925, 0.95, 0.975, 1.0)
    # fmt: on
    mass: Tensor

    def __init__(self, mass: float = 1.0) -> None:
        super().__init__(mass)

    def forward(self, utilities: Float[Tensor, "*batch outcomes"]) -> Float[Tensor, "*batch outcomes"]:
        """Return log-probabilities, minus infinity for what is cut off.

        Raises:
            ValueError: utilities without outcomes, or not floating point.
        """
        check_utilities(utilities)
        probabilities, order = torch.softmax(utilities, -1).sort(dim=-1, descending=True, stable=True)
        before = probabilities.cumsum(-1) - probabilities
        kept = torch.zeros_like(utilities, dtype=torch.bool).scatter(-1, order, before < self.mass)
        return torch.log_softmax(utilities.masked_fill(~kept, -torch.inf), -1)

    def _check(self, value: float) -> None:
        if not 0 < value <= 1:
            raise ValueError(f"a mass lies in (0, 1], got {value}")


class TopKTransform(UtilityTransform):
    """The ``k`` best outcomes, and what is as good as the last of them, renormalised.

    Args:
        count: ``k``, a whole number, at least 1.

    Raises:
        ValueError: a count that is no whole number or below 1.
    """

    fitted = "count"
    grid = tuple(float(count) for count in range(1, 17))
    count: Tensor

    def __init__(self, count: int = 50) -> None:
        super().__init__(count)

    def forward(self, utilities: Float[Tensor, "*batch outcomes"]) -> Float[Tensor, "*batch outcomes"]:
        """Return log-probabilities, minus infinity for what is cut off.

        Raises:
            ValueError: utilities without outcomes, or not floating point.
        """
        check_utilities(utilities)
        descending = utilities.sort(dim=-1, descending=True).values
        last = (self.count.long() - 1).clamp_max(utilities.shape[-1] - 1)
        least = descending.index_select(-1, last.reshape(1))
        return torch.log_softmax(utilities.masked_fill(utilities < least, -torch.inf), -1)

    def _check(self, value: float) -> None:
        if not value >= 1 or value != round(value):
            raise ValueError(f"a count is a whole number, at least 1, got {value}")
