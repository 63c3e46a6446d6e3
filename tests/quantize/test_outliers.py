"""Outlier statistics against scipy, and against activations collected by hand."""

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from postern.quantize import OutlierStatistics, infinity_norm, kurtosis


class Stack(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(4, 6)
        self.blocks = nn.ModuleList([nn.Linear(6, 6) for _ in range(3)])
        self.heads = nn.ModuleList([nn.Linear(6, 2)])

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = torch.tanh(block(x))
        return self.heads[0](x)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def test_kurtosis_equals_scipys():
    x = torch.randn(5, 200, 30, dtype=torch.float64) ** 3
    expected = stats.kurtosis(x.flatten(1).numpy(), axis=1, fisher=False)
    np.testing.assert_allclose(kurtosis(x), expected, rtol=1e-4)


def test_kurtosis_of_known_distributions():
    torch.testing.assert_close(kurtosis(torch.randn(4, 200_000)), torch.full((4,), 3.0), atol=0.1, rtol=0)
    signs = torch.tensor([1.0, -1.0]).repeat(50)[None]
    torch.testing.assert_close(kurtosis(signs), torch.ones(1), atol=1e-5, rtol=0)
    assert kurtosis(torch.full((1, 9), 7.0)) == 0


def test_kurtosis_does_not_depend_on_shift_and_scale():
    x = torch.randn(3, 500, dtype=torch.float64)
    torch.testing.assert_close(kurtosis(100 * x - 7), kurtosis(x), rtol=1e-5, atol=0)


def test_infinity_norm_is_the_largest_entry():
    x = torch.zeros(2, 3, 4)
    x[0, 1, 2], x[1, 2, 0] = -9.0, 4.0
    torch.testing.assert_close(infinity_norm(x), torch.tensor([9.0, 4.0]))


def test_averages_over_samples_and_then_over_layers_or_their_maximum():
    model = Stack()
    batches = [torch.randn(2, 5, 4), torch.randn(3, 5, 4)]  # batches of two sizes: samples count, not batches
    seen = [[] for _ in model.blocks]
    with OutlierStatistics(model) as outliers, torch.no_grad():
        for batch in batches:
            model(batch)
            x = model.stem(batch)
            for block, outputs in zip(model.blocks, seen, strict=True):
                y = nn.functional.linear(x, block.weight, block.bias)
                outputs.append(y.flatten(1).double())
                x = torch.tanh(y)
    norms = [torch.cat(outputs).abs().amax(1).mean().item() for outputs in seen]
    peaks = [kurtosis(torch.cat(outputs)).mean().item() for outputs in seen]
    assert outliers.max_infinity_norm == pytest.approx(max(norms), rel=1e-5)
    assert outliers.mean_kurtosis == pytest.approx(np.mean(peaks), rel=1e-5)
    assert list(outliers.per_layer) == ["blocks.0", "blocks.1", "blocks.2"]
    assert outliers.per_layer["blocks.1"]["infinity_norm"] == pytest.approx(norms[1], rel=1e-5)


def test_finds_a_planted_outlier():
    model = Stack()
    with torch.no_grad():
        model.blocks[1].bias[3] = 500.0
        with OutlierStatistics(model) as outliers:
            model(torch.randn(4, 5, 4))
    assert outliers.max_infinity_norm == pytest.approx(500, rel=0.01)
    assert max(outliers.per_layer, key=lambda name: outliers.per_layer[name]["infinity_norm"]) == "blocks.1"


def test_watches_what_it_is_told_and_no_longer_than_told():
    model = Stack()
    with OutlierStatistics(model, ["stem", "heads.*"]) as outliers:
        model(torch.randn(2, 4))
    before = outliers.per_layer
    assert list(before) == ["stem", "heads.0"]
    model(100 * torch.randn(2, 4))
    assert outliers.per_layer == before
    with outliers:
        model(100 * torch.randn(2, 4))
    assert outliers.max_infinity_norm > 10 * max(layer["infinity_norm"] for layer in before.values())


def test_watches_the_layers_of_transformers_models():
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=30, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16
    )
    model = transformers.BertModel(config).eval()
    ids = torch.randint(0, 30, (3, 7))
    with OutlierStatistics(model) as layers, torch.no_grad():
        states = model(ids, output_hidden_states=True).hidden_states
    assert list(layers.per_layer) == ["encoder.layer.0", "encoder.layer.1"]
    expected = max(infinity_norm(state).mean().item() for state in states[1:])
    assert layers.max_infinity_norm == pytest.approx(expected)
    with OutlierStatistics(model, ["*.output.dense"]) as dense, torch.no_grad():
        model(ids)
    assert "encoder.layer.1.output.dense" in dense.per_layer


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: OutlierStatistics(nn.Linear(2, 2)), r"Linear has no torch\.nn\.ModuleList"),
        (lambda: OutlierStatistics(Stack(), ["nothing"]), "fits 'nothing'"),
        (lambda: OutlierStatistics(Stack(), []), "at least one pattern"),
        (lambda: OutlierStatistics(Stack()).max_infinity_norm, "'blocks.0' has seen no samples"),
    ],
)
def test_rejects_what_cannot_be(call, message):
    with pytest.raises(ValueError, match=message):
        call()
