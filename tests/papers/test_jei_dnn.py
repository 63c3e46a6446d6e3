"""How methods are read at equal cost."""

import numpy as np
import pytest
import torch

from postern.adaptive import MaxProbExit, replay_exits, select_exits
from postern.claims import Run
from postern.papers.jei_dnn import (
    THRESHOLDS,
    Joint,
    Outcome,
    Point,
    Spirals,
    accuracy_at,
    bracket,
    calibration_error_at,
    steep_gates,
)


def outcome(cost, right, samples=1000, confidence=0.5):
    correct = torch.arange(samples) < right * samples
    return Outcome(torch.full((samples,), cost), correct, torch.full((samples,), confidence, dtype=torch.float64))


def point(cost, right, test_right=None):
    return Point(outcome(cost, right), outcome(cost, right if test_right is None else test_right))


def test_validation_chooses_and_test_is_read():
    cheap, dear = point(0.2, 0.6, test_right=0.5), point(0.6, 0.9, test_right=0.7)
    dominated = point(0.4, 0.7, test_right=1.0)  # below the line between the others on validation samples
    first, second, share = bracket([dear, dominated, cheap], 0.3)
    assert (first, second) == (cheap, dear)
    assert share == pytest.approx(0.25)
    assert accuracy_at([dear, dominated, cheap], 0.3) == pytest.approx((0.55, 0.3))


def test_corners_above_the_line_count():
    points = [point(0.2, 0.6), point(0.4, 0.85), point(0.6, 0.9), point(0.4, 0.3)]
    assert accuracy_at(points, 0.3)[0] == pytest.approx(0.725)
    assert accuracy_at(points, 0.5)[0] == pytest.approx(0.875)


def test_a_cost_out_of_reach():
    with pytest.raises(ValueError, match=r"from 0.2 to 0.6, asked for 0.9"):
        bracket([point(0.2, 0.6), point(0.6, 0.9)], 0.9)


def test_answers_are_mixed_before_calibration_is_measured():
    """Half the answers are 10 % too sure and half 10 % too unsure; in one bin the mixture is calibrated."""
    first = Point(
        outcome(0.2, 0.6), Outcome(torch.full((4000,), 0.2), torch.arange(4000) % 10 < 6, torch.full((4000,), 0.7))
    )
    second = Point(
        outcome(0.6, 0.9), Outcome(torch.full((4000,), 0.6), torch.arange(4000) % 10 < 8, torch.full((4000,), 0.7))
    )
    rng = np.random.default_rng(0)
    error, cost = calibration_error_at([first, second], 0.4, rng)
    assert error == pytest.approx(0.0, abs=0.02)
    assert cost == pytest.approx(0.4, abs=0.02)
    assert first.test.calibration_error == pytest.approx(0.1, abs=1e-6)


def test_steep_gates_agree_with_thresholds():
    logits = [2 * torch.randn(300, 5, generator=torch.Generator().manual_seed(k)) for k in range(4)]
    thresholds = (0.5, 0.6, 0.7)
    gates = steep_gates(thresholds, torch.device("cpu"))
    assert torch.equal(replay_exits(gates, logits), replay_exits(MaxProbExit(thresholds), logits))


def test_controls_use_the_heads_and_costs_that_they_name():
    """Fixed exits cost what their exit does; the warmed-up threshold reads the heads as they are after the warm-up."""
    torch.manual_seed(0)
    joint = Joint((0.1,), phase_batches=2, epochs=1, warm_up_epochs=1)
    study = Spirals(400, 200, 300, depth=3, epochs=2, joint=joint).study(Run(seed=3, scale="smoke"))
    curves = study.thresholds()
    assert [point.test.mean_cost for point in curves["fixed"][:3]] == pytest.approx(study.shares.tolist())
    trained, _ = study.trained(0.1, ratio_grad=True)
    with torch.no_grad():
        before, after = (study.test.all_logits(model) for model in (study.model, trained))
    labels = study.test.labels
    for point, logits in zip(curves["fixed"][:3], after, strict=True):
        assert point.test.accuracy == pytest.approx((logits.argmax(1) == labels).double().mean().item())
    policy = MaxProbExit(THRESHOLDS[1])
    # The weights that cancel leave rounding errors, so that classifiers trained twice are not the same to the last bit.
    for name, logits in (("threshold", after), ("warmed_up", before)):
        confidence, predicted = select_exits(logits, replay_exits(policy, logits)).softmax(1).max(1)
        torch.testing.assert_close(curves[name][1].test.confidence, confidence, rtol=1e-4, atol=1e-4)
        assert torch.equal(curves[name][1].test.correct, predicted == labels)
    one, other = (curves[name][1].test.confidence for name in ("threshold", "warmed_up"))
    assert (one - other).abs().max() > 0.01
