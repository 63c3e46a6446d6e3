"""Gated linear attention against its equations; what all layers must do is in `test_layers`."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from postern.attention import GatedLinearAttention, decay_slopes, simple_rms_norm


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def equations(layer, x, mask=None):
    """Head by head, with the matrix of all pairs."""
    width, heads = layer.width, layer.num_heads
    query, key, value = (x @ w.T for w in layer.project.weight[: 3 * width].chunk(3))
    query, key = layer.activation(query), layer.activation(key)
    steps = torch.arange(x.shape[1], dtype=x.dtype)
    distance = steps[:, None] - steps
    outputs = []
    for head in range(heads):
        part = slice(head * width // heads, (head + 1) * width // heads)
        turns = torch.ones(1) if layer.lrpe is None else torch.cos(distance[..., None] * layer.lrpe.angle[head])
        weights = (query[:, :, None, part] * key[:, None, :, part] * turns).sum(-1)
        weights = weights * torch.exp(-layer.slopes[head].double() * distance).tril()
        if mask is not None:
            weights = weights * mask[:, None]
        outputs.append(weights @ value[..., part])
    merged = layer.norm(torch.cat(outputs, -1))
    if layer.is_gated:
        merged = merged * (x @ layer.project.weight[3 * width :].T)
    return merged @ layer.output.weight.T


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"has_lrpe": False, "decay": None},
        {"layer": 2, "num_layers": 4, "decay": "paper", "is_gated": False},
        {"layer": 1, "num_layers": 4, "has_lrpe": True, "activation": nn.Identity()},
        {"norm": nn.LayerNorm(12), "activation": lambda x: F.elu(x) + 1},
    ],
)
def test_equals_its_equations(options):
    layer = GatedLinearAttention(12, 3, **options).double()
    x, mask = torch.randn(2, 9, 12, dtype=torch.float64), torch.rand(2, 9) < 0.7
    torch.testing.assert_close(layer(x), equations(layer, x))
    torch.testing.assert_close(layer(x, mask), equations(layer, x, mask))


def test_only_the_first_layer_turns_by_default():
    assert [GatedLinearAttention(12, 3, layer=n, num_layers=3).lrpe is not None for n in range(3)] == [
        True,
        False,
        False,
    ]


def test_the_norm_runs_over_all_heads_before_the_gate():
    layer = GatedLinearAttention(12, 3, has_lrpe=False).double()
    x = torch.randn(1, 1, 12, dtype=torch.float64)
    query, key, value, gate = (x @ w.T for w in layer.project.weight.chunk(4))
    heads = (F.silu(query) * F.silu(key)).view(3, 4).sum(-1, keepdim=True) * value.view(3, 4)
    expected = simple_rms_norm(heads.view(1, 1, 12)) * gate
    torch.testing.assert_close(layer(x), expected @ layer.output.weight.T)


def test_the_state_does_not_grow_and_is_in_32_bits():
    layer = GatedLinearAttention(16, 2).bfloat16()
    cache = layer.new_cache()
    with torch.no_grad():
        layer(torch.randn(1, 3, 16, dtype=torch.bfloat16), cache=cache)
        first = cache.memory.shape
        layer(torch.randn(1, 300, 16, dtype=torch.bfloat16), cache=cache)
    assert cache.memory.shape == first == (1, 2, 16, 8)
    assert cache.memory.dtype == torch.float32
    assert len(cache) == 303


def test_slopes_survive_16_bits_and_are_no_part_of_the_state():
    layer = GatedLinearAttention(12, 3, layer=1, num_layers=4)
    assert "slopes" not in layer.state_dict()
    for moved in (layer.bfloat16(), layer.double(), layer.to("meta")):
        assert moved.slopes.dtype == torch.float32
    assert layer.slopes.device.type == "meta"
    torch.testing.assert_close(layer.to_empty(device="cpu").slopes, decay_slopes(3, 1, 4))


@pytest.mark.parametrize("form", ["chunk", "tiled", "recurrent", "naive"])
def test_takes_any_form_of_the_sums(form):
    layer = GatedLinearAttention(12, 3, implementation=form)
    same = GatedLinearAttention(12, 3)
    same.load_state_dict(layer.state_dict())
    x = torch.randn(2, 90, 12)
    torch.testing.assert_close(layer(x), same(x))


def test_rejects_what_cannot_be():
    with pytest.raises(ValueError, match="multiple of num_heads, got 12 and 5"):
        GatedLinearAttention(12, 5)
    with pytest.raises(ValueError, match="got 3, 4 and 4"):
        GatedLinearAttention(12, 3, layer=4, num_layers=4)
    with pytest.raises(ValueError, match="'alibi' or 'paper', got 'other'"):
        GatedLinearAttention(12, 3, decay="other")
