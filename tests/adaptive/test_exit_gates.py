import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import entropy

from postern.adaptive import (
    ExitGate,
    GateExit,
    exit_decision,
    exit_probabilities,
    gate_operations,
    replay_exits,
    uncertainty_features,
)
from tests.modules import check_module


def outputs(rows=40, gates=5, seed=0):
    return torch.rand(rows, gates, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive(g):
    """P and a of one sample, by the definition."""
    p, a = [], []
    for l in range(len(g)):
        p.append(max(0.0, min(g[l], 1 - sum(g[:l]))))
        left = 1.0
        for earlier in a:
            left *= 1 - earlier
        a.append(min(max(p[l] / left, 0.0), 1.0) if left > 1e-12 else 1.0)
    return [*p, 1 - sum(p)], a


def test_features_against_scipy():
    logits = torch.randn(20, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    p = logits.softmax(1).numpy()
    u = uncertainty_features(logits).numpy()
    ordered = -(-p).copy()
    ordered.sort(axis=1)
    assert u[:, 0] == pytest.approx(p.max(1))
    assert u[:, 1] == pytest.approx(entropy(p, axis=1))
    assert u[:, 2] == pytest.approx(ordered[:, -1] - ordered[:, -2])
    assert u[:, 3] == pytest.approx(entropy(p**2, axis=1))  # scipy normalises


def test_features_of_the_extremes():
    u = uncertainty_features(torch.tensor([[0.0, 0.0, 0.0, 0.0], [200.0, 0.0, 0.0, 0.0]]))
    log4 = torch.log(torch.tensor(4.0))
    torch.testing.assert_close(u, torch.tensor([[0.25, log4, 0.0, log4], [1.0, 0.0, 1.0, 0.0]]))


def test_half_precision_is_widened():
    logits = torch.randn(3, 5).bfloat16()
    assert uncertainty_features(logits).dtype == torch.float32
    torch.testing.assert_close(uncertainty_features(logits), uncertainty_features(logits.float()))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=7))
def test_probabilities_against_the_definition(g):
    p, a = exit_probabilities(torch.tensor([g], dtype=torch.float64))
    expected_p, expected_a = naive(g)
    assert p[0].tolist() == pytest.approx(expected_p, abs=1e-12)
    assert p.sum().item() == pytest.approx(1)
    left = 1.0
    for found, expected in zip(a[0].tolist(), expected_a, strict=True):
        if left < 1e-6:  # the quotient of two rounding errors
            break
        assert found == pytest.approx(expected, abs=1e-6)
        left *= 1 - expected


def test_they_are_not_independent_gates():
    g = torch.tensor([[0.4, 0.4, 0.4]])
    p, a = exit_probabilities(g)
    torch.testing.assert_close(p, torch.tensor([[0.4, 0.4, 0.2, 0.0]]))
    torch.testing.assert_close(a, torch.tensor([[0.4, 2 / 3, 1.0]]))
    assert exit_decision(a).tolist() == [1]  # independent gates would all say no


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=7))
def test_independent_gates_against_the_definition(g):
    p, a = exit_probabilities(torch.tensor([g], dtype=torch.float64), is_independent=True)
    expected, left = [], 1.0
    for each in g:
        expected.append(each * left)
        left *= 1 - each
    assert p[0].tolist() == pytest.approx([*expected, left], abs=1e-12)
    assert a[0].tolist() == g


def test_probability_is_differentiable():
    g = (outputs(3, 3) * 0.3).requires_grad_()  # away from the kinks
    assert torch.autograd.gradcheck(lambda g: exit_probabilities(g), (g,))


def test_the_final_head_takes_the_rest():
    a = torch.tensor([[0.4, 0.6, 0.1], [0.1, 0.2, 0.3], [0.5, 0.0, 0.0]])
    assert exit_decision(a).tolist() == [1, 3, 0]
    assert exit_decision(a, threshold=0.35).tolist() == [0, 3, 0]


@pytest.mark.parametrize("is_independent", [False, True])
def test_the_policy_is_the_decision(is_independent):
    torch.manual_seed(1)
    policy = GateExit(4, is_independent=is_independent).double()
    for gate in policy.gates:
        torch.nn.init.normal_(gate.linear.weight, std=2.0)
    logits = [3 * torch.randn(200, 6, dtype=torch.float64) for _ in range(5)]
    g = torch.sigmoid(policy(logits))
    assert g.shape == (200, 4)
    exits = exit_decision(exit_probabilities(g, is_independent=is_independent)[1])
    assert len(exits.unique()) > 2
    torch.testing.assert_close(replay_exits(policy, logits), exits)


def test_certain_gates_leave_nothing_behind():
    policy = GateExit(3)
    for gate in policy.gates:
        torch.nn.init.zeros_(gate.linear.weight)
        torch.nn.init.constant_(gate.linear.bias, 5.0)
    state = None
    for index in range(3):  # the sums exceed 1 from the second exit on
        stops, state = policy.decide(torch.randn(4, 3), index, state)
        assert stops.all()


def test_gates_do_not_shape_the_classifier():
    logits = torch.randn(4, 3, requires_grad=True)
    ExitGate()(logits).sum().backward()
    assert logits.grad is None


def test_modules():
    check_module(ExitGate, torch.randn(6, 5))
    check_module(lambda: GateExit(3), [torch.randn(6, 5) for _ in range(4)])


def test_operations():
    assert gate_operations(10) == 96


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: uncertainty_features(torch.zeros(2, 1)), "two classes at least, got 1"),
        (lambda: GateExit(0), "num_gates=0"),
        (lambda: GateExit(2, threshold=0), "got 0"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
