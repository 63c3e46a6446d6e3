import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from postern.adaptive import ExitConformal, conformal_quantile, conformal_scores


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 60), st.sampled_from(["0.01", "0.05", "0.1", "0.2", "0.5"]), st.integers(0, 100))
def test_quantile_is_the_least_score_that_covers_enough(samples, alpha, seed):
    scores = np.random.default_rng(seed).uniform(size=samples)
    needed = (samples + 1) * (1 - Fraction(alpha))
    enough = [score for score in scores if (scores <= score).sum() >= needed]
    assert conformal_quantile(torch.from_numpy(scores), float(alpha)) == min(enough, default=math.inf)


def test_coverage_is_exact_on_average():
    """Of n + 1 exchangeable scores, the last lies below the quantile of the others in rank / (n + 1) of all cases."""
    scores = torch.from_numpy(np.random.default_rng(0).permutation(20).astype(float))
    inside = 0
    for left_out in range(20):
        others = torch.cat([scores[:left_out], scores[left_out + 1 :]])
        inside += int(scores[left_out] <= conformal_quantile(others, 0.1))
    assert inside == 18


def predictions(samples=4000, seed=0):
    generator = torch.Generator().manual_seed(seed)
    exits = torch.randint(3, (samples,), generator=generator)
    logits = torch.randn(3, samples, 5, generator=generator, dtype=torch.float64)
    labels = torch.randint(5, (samples,), generator=generator)
    rows = torch.arange(samples)
    logits[:, rows, labels] += torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)[:, None]
    return logits.softmax(-1), labels, exits


def test_every_exit_is_covered():
    probabilities, labels, exits = predictions()
    conformal = ExitConformal(0.1).fit(conformal_scores(probabilities, labels.expand(3, -1)).T, exits)
    fresh, labels, exits = predictions(seed=1)
    own = fresh[exits, torch.arange(len(exits))]
    sets = conformal.predict_set(own, exits)
    covered = sets[torch.arange(len(labels)), labels]
    for exit_index in range(3):
        assert covered[exits == exit_index].double().mean().item() == pytest.approx(0.9, abs=0.03)
    common = ExitConformal(0.1, is_per_exit=False).fit(conformal_scores(fresh, labels.expand(3, -1)).T, exits)
    assert len(common.thresholds.unique()) == 1
    uneven = common.predict_set(own, exits)[torch.arange(len(labels)), labels]
    assert uneven.double().mean().item() == pytest.approx(0.9, abs=0.01)
    assert uneven[exits == 0].double().mean() < 0.85  # the easy exits make up for the hard one


def test_on_the_calibration_samples_themselves_nothing_is_lost_by_rounding():
    probabilities, labels, exits = predictions(400, seed=2)
    probabilities = probabilities.float()
    conformal = ExitConformal(0.2).fit(conformal_scores(probabilities, labels.expand(3, -1)).T, exits)
    own = probabilities[exits, torch.arange(len(exits))]
    covered = conformal.predict_set(own, exits)[torch.arange(len(labels)), labels]
    for exit_index in range(3):
        here = int((exits == exit_index).sum())
        assert int(covered[exits == exit_index].sum()) == math.ceil((here + 1) * 0.8 - 1e-9)


def test_a_rare_exit_is_calibrated_on_all_samples():
    scores = torch.rand(100, 3, generator=torch.Generator().manual_seed(0))
    exits = torch.tensor([0] * 79 + [1] * 21)
    conformal = ExitConformal(0.1).fit(scores, exits)
    expected = [conformal_quantile(each, 0.1) for each in (scores[:79, 0], scores[79:, 1], scores[:, 2])]
    assert conformal.thresholds.tolist() == pytest.approx(expected)
    more = ExitConformal(0.1, min_samples=21).fit(scores, exits)
    assert more.thresholds[1].item() == pytest.approx(conformal_quantile(scores[:, 1], 0.1))


def test_too_few_samples_give_every_class():
    conformal = ExitConformal(0.01).fit(torch.rand(5, 2), torch.zeros(5, dtype=torch.long))
    assert conformal.predict_set(torch.rand(3, 4), torch.tensor([0, 1, 0])).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ExitConformal(1.0), "got 1.0"),
        (lambda: ExitConformal().fit(torch.rand(4, 2), torch.zeros(3, dtype=torch.long)), r"\[4, 2\] and \[3\]"),
        (lambda: ExitConformal().fit(torch.rand(2, 2), torch.tensor([0, 2])), r"0\.\.1"),
        (lambda: ExitConformal().predict_set(torch.rand(2, 2), torch.tensor([0, 1])), "call it first"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
