import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from postern.adaptive import EntropyExit, ExitPolicy, GateExit, MaxProbExit, PatienceExit, replay_exits, select_exits


def one_hot_logits(labels, classes=3):
    """Logits of exits that predict these classes, one row of labels an exit."""
    return [5.0 * torch.nn.functional.one_hot(torch.tensor(row), classes).float() for row in labels]


def test_one_threshold_against_a_loop():
    logits = [torch.randn(50, 4, generator=torch.Generator().manual_seed(s)) for s in range(4)]
    exits = replay_exits(MaxProbExit(0.6), logits)
    for sample in range(50):
        stopping = [l for l in range(3) if logits[l][sample].softmax(0).max() >= 0.6]
        assert exits[sample] == (stopping[0] if stopping else 3)


def test_a_threshold_for_each_exit():
    logits = [torch.zeros(2, 4), torch.zeros(2, 4), torch.zeros(2, 4)]
    assert replay_exits(MaxProbExit([0.3, 0.2]), logits).tolist() == [1, 1]
    assert replay_exits(MaxProbExit([0.25, 1.0]), logits).tolist() == [0, 0]
    assert replay_exits(MaxProbExit(1.1), logits).tolist() == [2, 2]


def test_one_bound_on_the_entropy_against_a_loop():
    logits = [torch.randn(50, 4, generator=torch.Generator().manual_seed(s)).double() for s in range(4)]
    exits = replay_exits(EntropyExit(1.0), logits)
    for sample in range(50):
        entropies = [-sum(p * math.log(p) for p in each[sample].softmax(0).tolist()) for each in logits[:3]]
        stopping = [l for l in range(3) if entropies[l] <= 1.0]
        assert exits[sample] == (stopping[0] if stopping else 3)
    assert len(exits.unique()) == 4


def test_a_bound_on_the_entropy_for_each_exit():
    """Two classes alike of four have log 2 nats, and a class that is certain has none."""
    alike = torch.tensor([[0.0, 0.0, -math.inf, -math.inf]])
    certain = torch.tensor([[0.0, -math.inf, -math.inf, -math.inf]])
    assert replay_exits(EntropyExit([0.69, 0.70]), [alike, alike, alike]).tolist() == [1]
    assert replay_exits(EntropyExit(0.0), [alike, certain, certain]).tolist() == [1]
    assert replay_exits(EntropyExit(-1.0), [certain, certain, certain]).tolist() == [2]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=3, max_size=3), min_size=2, max_size=7), st.integers(1, 3))
def test_patience_against_a_loop(labels, patience):
    exits = replay_exits(PatienceExit(patience), one_hot_logits(labels))
    for sample in range(3):
        expected, run = len(labels) - 1, 0
        for l in range(len(labels) - 1):
            run = run + 1 if l and labels[l][sample] == labels[l - 1][sample] else 0
            if run >= patience:
                expected = l
                break
        assert exits[sample] == expected


def test_selected_logits_are_those_of_the_exit():
    logits = [torch.full((3, 2), float(l)) for l in range(4)]
    assert select_exits(logits, torch.tensor([3, 0, 2]))[:, 0].tolist() == [3, 0, 2]


def test_all_policies_keep_the_protocol():
    for policy in (MaxProbExit(0.5), EntropyExit(0.5), PatienceExit(2), GateExit(3)):
        assert isinstance(policy, ExitPolicy)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: MaxProbExit([]), r"\(\)"),
        (lambda: MaxProbExit(float("nan")), "nan"),
        (lambda: MaxProbExit([0.5]).decide(torch.zeros(1, 2), 1, None), "exit number 1"),
        (lambda: EntropyExit(float("nan")), "nan"),
        (lambda: EntropyExit([0.5]).decide(torch.zeros(1, 2), 1, None), "exit number 1"),
        (lambda: PatienceExit(0), "got 0"),
        (lambda: replay_exits(MaxProbExit(0.5), []), "got none"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
