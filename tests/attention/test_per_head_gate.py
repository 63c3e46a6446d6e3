"""Per-head gates against one small network a head, as the paper's code has it."""

import math
from functools import partial

import pytest
import torch
from torch import nn

from postern.attention import PerHeadGate
from tests.modules import check_module

WIDTH, HEADS = 32, 4
HEAD_DIM = WIDTH // HEADS


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def tokens():
    return torch.randn(2, 5, WIDTH, dtype=torch.float64)


def test_linear_equals_a_loop_over_heads():
    gate, x = PerHeadGate(WIDTH, HEADS).double(), tokens()
    found = gate.scores(x)
    for head in range(HEADS):
        layer = nn.Linear(HEAD_DIM, 1).double()
        layer.load_state_dict({"weight": gate.weight[head : head + 1], "bias": gate.bias[head : head + 1]})
        expected = torch.sigmoid(layer(x[..., head * HEAD_DIM : (head + 1) * HEAD_DIM]))
        torch.testing.assert_close(found[:, head], expected)


def test_mlp_equals_a_loop_over_heads():
    gate, x = PerHeadGate(WIDTH, HEADS, "mlp", hidden_dim=3).double(), tokens()
    found = gate.scores(x)
    for head in range(HEADS):
        network = nn.Sequential(nn.Linear(HEAD_DIM, 3), nn.ReLU(), nn.Linear(3, 1)).double()
        network[0].load_state_dict({"weight": gate.hidden_weight[head], "bias": gate.hidden_bias[head]})
        network[2].load_state_dict({"weight": gate.weight[head : head + 1], "bias": gate.bias[head : head + 1]})
        torch.testing.assert_close(
            found[:, head], torch.sigmoid(network(x[..., head * HEAD_DIM : (head + 1) * HEAD_DIM]))
        )


def test_all_sees_the_whole_token():
    gate, x = PerHeadGate(WIDTH, HEADS, "all").double(), tokens()
    layer = nn.Linear(WIDTH, HEADS).double()
    layer.load_state_dict(gate.state_dict())
    torch.testing.assert_close(gate.scores(x), torch.sigmoid(layer(x)).transpose(1, 2).unsqueeze(-1))


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("linear", HEADS * (HEAD_DIM + 1)),
        ("mlp", HEADS * (HEAD_DIM // 4 * (HEAD_DIM + 2) + 1)),
        ("all", HEADS * (WIDTH + 1)),
    ],
)
def test_costs_what_the_paper_counts(kind, count):
    assert sum(p.numel() for p in PerHeadGate(WIDTH, HEADS, kind).parameters()) == count


def test_the_mlp_of_bert_has_16_hidden_units():
    assert PerHeadGate(768, 12, "mlp").hidden_weight.shape == (12, 16, 64)


@pytest.mark.parametrize("kind", ["linear", "all"])
def test_starts_as_open_as_asked(kind):
    gate = PerHeadGate(WIDTH, HEADS, kind, initial_probability=0.25)
    torch.testing.assert_close(gate.scores(torch.zeros(1, 1, WIDTH)), torch.full((1, HEADS, 1, 1), 0.25))
    torch.testing.assert_close(gate.bias, torch.full((HEADS,), -math.log(3)))


@pytest.mark.parametrize("kind", ["linear", "mlp", "all"])
def test_weights_start_as_in_linear_layers(kind):
    torch.manual_seed(0)
    gate = PerHeadGate(4096, 2, kind)
    weight = gate.hidden_weight if kind == "mlp" else gate.weight
    bound = weight.shape[-1] ** -0.5
    assert 0.95 * bound < weight.abs().max() <= bound


@pytest.mark.parametrize("kind", ["linear", "mlp", "all"])
def test_leaves_a_trained_model_nearly_unchanged(kind):
    gate = PerHeadGate(WIDTH, HEADS, kind, weight_std=0.001, is_rescaled=True)
    assert (gate.scores(torch.randn(4, 9, WIDTH)) - 1).abs().max() < 0.05


def test_gradients():
    for kind in ("linear", "mlp", "all"):
        gate = PerHeadGate(8, 2, kind).double()
        y, x = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((1, 2, 3, 4), (1, 3, 8)))
        assert torch.autograd.gradcheck(gate, (y, x))


@pytest.mark.parametrize("kind", ["linear", "mlp", "all"])
def test_survives(kind):
    check_module(partial(PerHeadGate, WIDTH, HEADS, kind), torch.randn(2, HEADS, 5, HEAD_DIM), torch.randn(2, 5, WIDTH))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "multiple of num_heads, got 32 and 5"),
        ({"kind": "cubic"}, "got 'cubic'"),
        ({"initial_probability": 0.0}, r"\(0, 1\), got 0\.0"),
        ({"initial_probability": 1.0}, r"\(0, 1\), got 1\.0"),
        ({"weight_std": -1.0}, "at least 0, got -1.0"),
        ({"hidden_dim": 4}, "got 4 for 'linear'"),
        ({"kind": "mlp", "hidden_dim": 0}, "got 0 for 'mlp'"),
    ],
)
def test_rejects_impossible_settings(options, message):
    with pytest.raises(ValueError, match=message):
        PerHeadGate(**{"width": WIDTH, "num_heads": HEADS} | options)
