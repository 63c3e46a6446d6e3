"""Normalised attention against the matrix of its definition."""

import pytest
import torch
from torch.nn import functional as F

from postern.attention import LinearState, NormalizedAttention, normalized_attention


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def arguments(time=70):
    shapes = (2, 4, time, 3), (2, 2, time, 3), (2, 2, time, 5)
    return [*(torch.randn(*shape, dtype=torch.float64) for shape in shapes), torch.rand(2, 4, time).double() + 0.1]


def by_matrix(query, key, value, normaliser, allowed):
    key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    return (query @ key.mT * allowed / normaliser[..., None]) @ value


@pytest.mark.parametrize("is_causal", [False, True])
def test_equals_its_definition(is_causal):
    inputs = [x.requires_grad_() for x in arguments()]
    mask = torch.rand(2, 70) < 0.8
    allowed = mask[:, None, None].double() * (torch.ones(70, 70).tril() if is_causal else 1)
    found = normalized_attention(*inputs, mask, is_causal=is_causal)
    expected = by_matrix(*inputs, allowed)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found.square().sum(), inputs), torch.autograd.grad(expected.square().sum(), inputs)
    )


@pytest.mark.parametrize(
    ("kind", "function"),
    [("exp", torch.exp), ("softplus", F.softplus), ("sigmoid", torch.sigmoid), ("constant", torch.ones_like)],
)
def test_the_layer_divides_by_its_normaliser(kind, function):
    layer = NormalizedAttention(8, 2, key_dim=3, normaliser=kind, is_causal=True).double()
    x = torch.randn(2, 9, 8, dtype=torch.float64)
    if kind == "constant":
        assert layer.normalise is None
        logits = torch.zeros(2, 9, 2).double()
    else:
        torch.nn.init.normal_(layer.normalise.weight)
        logits = layer.normalise(x)
    query, key, value = (
        projection(x).unflatten(-1, (2, -1)).transpose(1, 2) for projection in (layer.query, layer.key, layer.value)
    )
    weights = (query @ key.mT).tril() / function(logits).mT[..., None]
    torch.testing.assert_close(layer(x), layer.output((weights @ value).transpose(1, 2).flatten(2)))


def test_the_state_does_not_grow():
    layer, state = NormalizedAttention(16, 2, key_dim=5, is_causal=True), LinearState()
    for tokens in (1, 9, 3):
        layer(torch.randn(1, tokens, 16), cache=state)
        assert state.memory.numel() == layer.state_size == 80
    assert len(state) == 13


def test_rejects_bad_input():
    with pytest.raises(ValueError, match="exp, softplus, sigmoid, constant; got 'relu'"):
        NormalizedAttention(8, 2, normaliser="relu")
    with pytest.raises(ValueError, match="key_dim must be at least 1, got 0"):
        NormalizedAttention(8, 2, key_dim=0)
    with pytest.raises(ValueError, match="causal order"):
        NormalizedAttention(8, 2)(torch.zeros(1, 2, 8), cache=LinearState())
