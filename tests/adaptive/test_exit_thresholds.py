import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from postern.adaptive import MaxProbExit, calibrate_thresholds, geometric_exit_fractions, replay_exits


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.floats(1e-3, 1e3))
def test_fractions_are_geometric(num_exits, ratio):
    fractions = geometric_exit_fractions(num_exits, ratio)
    assert sum(fractions) == pytest.approx(1)
    for first, second in pairwise(fractions):
        assert second == pytest.approx(first * ratio, rel=1e-9)


def test_extreme_ratios_do_not_overflow():
    assert geometric_exit_fractions(40, 1e30)[-1] == pytest.approx(1)
    assert geometric_exit_fractions(40, 1e-30)[0] == pytest.approx(1)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.floats(0.05, 20))
def test_the_wanted_shares_stop(seed, ratio):
    generator = torch.Generator().manual_seed(seed)
    logits = [torch.randn(200, 5, generator=generator, dtype=torch.float64) for _ in range(4)]
    fractions = geometric_exit_fractions(4, ratio)
    exits = replay_exits(MaxProbExit(calibrate_thresholds(logits, fractions)), logits)
    counts = torch.bincount(exits, minlength=4).tolist()
    assert counts[:3] == [min(round(f * 200), 200 - sum(counts[:k])) for k, f in enumerate(fractions[:3])]


def test_the_most_confident_stop_first():
    logits = [torch.tensor([[4.0, 0], [1, 0], [2, 0], [3, 0]]), torch.zeros(4, 2)]
    exits = replay_exits(MaxProbExit(calibrate_thresholds(logits, (0.5, 0.5))), logits)
    assert exits.tolist() == [0, 1, 1, 0]


def test_no_share_means_no_exit():
    logits = [torch.full((5, 2), 9.0)] * 3
    assert calibrate_thresholds(logits, (0.0, 0.0, 1.0)) == (math.inf, math.inf)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: geometric_exit_fractions(0, 1.0), "num_exits=0"),
        (lambda: geometric_exit_fractions(3, 0.0), "ratio=0.0"),
        (lambda: calibrate_thresholds([torch.zeros(2, 2)] * 3, (0.5, 0.5)), "got 2 for 3 exits"),
        (lambda: calibrate_thresholds([torch.zeros(2, 2)] * 2, (0.5, 0.6)), "sum 1"),
        (lambda: calibrate_thresholds([torch.zeros(2, 2)] * 2, (-0.5, 1.5)), "not negative"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
