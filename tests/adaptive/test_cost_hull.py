"""The best mixture of two settings, against a search over all pairs."""

import numpy as np
import pytest

from postern.adaptive import best_mixture


def by_search(costs, accuracies, budget) -> float:
    reached = [accuracy for cost, accuracy in zip(costs, accuracies, strict=True) if cost == budget]
    for low, first in zip(costs, accuracies, strict=True):
        for high, second in zip(costs, accuracies, strict=True):
            if low < budget < high:
                reached.append(first + (second - first) * (budget - low) / (high - low))
    return max(reached)


@pytest.mark.parametrize("seed", range(20))
def test_no_pair_of_settings_reaches_more(seed: int) -> None:
    rng = np.random.default_rng(seed)
    costs, accuracies = rng.integers(1, 8, 9) / 8, rng.integers(1, 8, 9) / 8
    for budget in (*np.linspace(costs.min(), costs.max(), 7), costs[0]):
        first, second, share = best_mixture(list(costs), list(accuracies), budget)
        assert 0 <= share <= 1
        assert (1 - share) * costs[first] + share * costs[second] == pytest.approx(budget)
        found = (1 - share) * accuracies[first] + share * accuracies[second]
        assert found == pytest.approx(by_search(costs, accuracies, budget))


def test_the_more_accurate_of_equal_costs_counts() -> None:
    assert best_mixture([0.5, 0.5, 1.0], [0.6, 0.7, 0.9], 0.5)[:2] == (1, 1)
    assert best_mixture([0.5, 0.5, 1.0], [0.6, 0.7, 0.9], 0.75) == (1, 2, 0.5)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"costs reach from 0.2 to 0.6, asked for 0.9"):
        best_mixture([0.2, 0.6], [0.5, 0.9], 0.9)
    with pytest.raises(ValueError, match="got 2 and 1"):
        best_mixture([0.2, 0.6], [0.5], 0.3)
    with pytest.raises(ValueError, match="got 0 and 0"):
        best_mixture([], [], 0.3)
