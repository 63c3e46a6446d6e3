"""The definitions that the common form is held against, and the training of the recall networks."""

import pytest
import torch

import postern.papers.dynamical_systems_framework as paper
from postern.attention import SelfAttention
from postern.claims import Run

TINY = paper.Training(2, 4, (1e-3,), validation=8, test=8)


@pytest.mark.parametrize("name", ["linear", "normalised", "S6", "SSD", "qLSTM", "qLSTM, reversed gate"])
def test_the_definitions_are_the_layers(name):
    torch.manual_seed(0)
    layer = paper._random_layers(paper.Layers())[name]
    x = torch.randn(2, 24, 6, dtype=torch.float64)
    torch.testing.assert_close(paper._by_definition(layer, x, 0), layer(x), rtol=1e-10, atol=1e-10)


def test_the_truncated_definition_comes_near_softmax():
    torch.manual_seed(0)
    layer = SelfAttention(6, 2, is_causal=True).double()
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    torch.testing.assert_close(paper._by_definition(layer, x, 20), layer(x))
    assert (paper._by_definition(layer, x, 0) - layer(x)).abs().max() > 1e-2


@pytest.mark.parametrize("arm", ["softmax", "linear", "exp", "constant", "s6", "ssd", "qlstm", "qlstm_reversed"])
def test_every_mixer_recalls_in_both_tasks(arm):
    for task in (paper.Paired(4, 8, 8, width=8), paper.MultiQuery(16, 2, 16, width=8)):
        assert 0 <= paper._learn(task, arm, 3, TINY, Run(seed=0, scale="test")) <= 1


def test_positions_are_for_attention_and_qlstm_alone():
    task = paper.MultiQuery(16, 2, 16, width=8)
    positions = {arm: task.network(arm, 3).position is not None for arm in ("softmax", "linear", "s6", "ssd", "qlstm")}
    assert positions == {"softmax": True, "linear": True, "s6": False, "ssd": False, "qlstm": True}


def test_accuracy_counts_what_is_asked():
    class Echo(torch.nn.Module):
        def forward(self, tokens, asked):
            return torch.nn.functional.one_hot(tokens[asked], 5).float()

    tokens = torch.tensor([[1, 2, 3], [4, 0, 1]])
    target = torch.tensor([[-100, 2, 0], [-100, -100, 1]])
    found = paper._accuracy(Echo(), ((tokens,), target), torch.device("cpu"), at_once=1)
    assert found == pytest.approx(2 / 3)


def test_longer_sequences_are_told_apart_from_those_of_training():
    run = Run(seed=0, scale="test")
    config = paper.Arms(paper.Paired(4, 8, 8, width=8), TINY, (3,), longer=2)
    metrics = paper._compare(config, ("exp",), run)
    (row,) = run.tables["accuracy"]
    assert metrics["accuracy_exp"] == row["accuracy when longer"]
