"""What a method with several settings reaches at a cost that none of them has: the upper concave hull of its points."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

Corner = tuple[float, float, int]  # cost, accuracy, number of the setting


class Mixture(NamedTuple):
    """Two settings, one of which answers a sample.

    Attributes:
        first: number of the cheaper setting.
        second: number of the dearer one.
        share: of the samples that the second answers, between 0 and 1.
    """

    first: int
    second: int
    share: float


def best_mixture(costs: Sequence[float], accuracies: Sequence[float], budget: float) -> Mixture:
    """The two settings between which a cost is reached with the highest accuracy.

    Answering some samples, drawn at random, by one setting and the others by another reaches every cost between theirs,
    so that the settings that count are the corners of the upper concave hull of accuracy over cost:

        (1 - share) cost_first + share cost_second = budget

    Args:
        costs: of each setting, in any unit.
        accuracies: of each setting.
        budget: the cost to reach.

    Raises:
        ValueError: other numbers of costs than of accuracies, no settings, or a cost that they do not reach.
    """
    if len(costs) != len(accuracies) or not costs:
        raise ValueError(f"each setting has a cost and an accuracy, got {len(costs)} and {len(accuracies)}")
    corners: list[Corner] = []
    for corner in sorted(zip(costs, accuracies, range(len(costs)), strict=True), key=lambda each: each[:2]):
        while corners and (
            corner[0] == corners[-1][0] or (len(corners) > 1 and _is_below(corners[-2], corners[-1], corner))
        ):
            corners.pop()
        corners.append(corner)
    if not corners[0][0] <= budget <= corners[-1][0]:
        raise ValueError(f"costs reach from {corners[0][0]:.3g} to {corners[-1][0]:.3g}, asked for {budget:g}")
    above = next(k for k, corner in enumerate(corners) if corner[0] >= budget)
    if not above:
        return Mixture(corners[0][2], corners[0][2], 0.0)
    (low, _, first), (high, _, second) = corners[above - 1 : above + 1]
    return Mixture(first, second, (budget - low) / (high - low))


def _is_below(first: Corner, middle: Corner, last: Corner) -> bool:
    return (middle[1] - first[1]) * (last[0] - first[0]) <= (last[1] - first[1]) * (middle[0] - first[0])
