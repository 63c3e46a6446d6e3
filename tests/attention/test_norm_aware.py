"""Norm-aware features against their definition, and layers of them against the quadratic form."""

import math
from functools import partial

import pytest
import torch

from postern.attention import (
    FEATURE_MAPS,
    NormAwareLinearAttention,
    grid_angles,
    norm_aware_key_features,
    norm_aware_query_features,
    norm_exponent,
    rotate,
)
from tests.modules import check_module

PHASES = ["sign", "soft", None]


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def definition(x, exponent, phase, *, is_query):
    """Plain powers, in the paper's symbols."""
    direction = x / x.norm(dim=-1, keepdim=True)
    size = (direction if is_query else x).abs() ** exponent
    if phase is None:
        return size
    angle = (direction < 0).to(x) * math.pi / 2 if phase == "sign" else math.pi / 4 * (1 - direction)
    return torch.cat([size * angle.cos(), size * angle.sin()], -1)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("has_norm_exponent", [True, False])
def test_equal_their_definition(phase, has_norm_exponent):
    x = torch.randn(4, 5, 8, dtype=torch.float64)
    exponent = 3 * (0.5 + torch.tanh(x.norm(dim=-1, keepdim=True))) if has_norm_exponent else 3
    found = norm_aware_query_features(x, phase=phase, has_norm_exponent=has_norm_exponent)
    torch.testing.assert_close(found, definition(x, exponent, phase, is_query=True), rtol=1e-7, atol=1e-12)
    keys = norm_aware_key_features(x, phase=phase)
    torch.testing.assert_close(keys, definition(x, 3, phase, is_query=False), rtol=1e-7, atol=1e-12)
    assert min(found.min(), keys.min()) >= 0


@pytest.mark.parametrize("phase", PHASES)
def test_gradients(phase):
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(partial(norm_aware_query_features, phase=phase, power=2.0), x)
    assert torch.autograd.gradcheck(partial(norm_aware_key_features, phase=phase, power=2.0), x)


@pytest.mark.parametrize("phase", ["sign", "soft"])
def test_a_phase_keeps_the_norm_and_tells_signs_apart(phase):
    x = torch.randn(50, 8, dtype=torch.float64)
    features = norm_aware_key_features(x, phase=phase)
    torch.testing.assert_close(features.norm(dim=-1), (x.abs() ** 3).norm(dim=-1))
    one = torch.zeros(4, dtype=torch.float64)
    one[0] = 2.0
    query, alike, opposite = (
        norm_aware_query_features(one, phase=phase),
        norm_aware_key_features(one, phase=phase),
        norm_aware_key_features(-one, phase=phase),
    )
    assert (query @ opposite).abs() < 1e-14
    if phase == "sign":
        assert (query @ opposite) == 0
    torch.testing.assert_close(query @ alike, one.norm() ** 3)


def test_the_exponent_lies_between_its_bounds_and_grows():
    exponent = norm_exponent(torch.linspace(0, 20, 50, dtype=torch.float64))
    assert exponent[0] == 1.5
    assert exponent[-1] == pytest.approx(4.5)
    assert (exponent.diff() >= 0).all()


@pytest.mark.parametrize("phase", PHASES)
def test_zeros_tiny_and_huge_numbers_are_finite_and_nothing_is_denormal(phase):
    x = torch.tensor([[0, 0, 0], [1e-30, 1e-38, 0], [1.0, 1e-9, 1e-20], [1e9, 1e-9, -1.0]], requires_grad=True)
    for features in (norm_aware_query_features(x, phase=phase), norm_aware_key_features(x, phase=phase)):
        assert torch.isfinite(features).all()
        assert (features[0] == 0).all()
        positive = features[features > 0]
        assert positive.min() ** 2 >= torch.finfo(torch.float32).tiny
        (gradient,) = torch.autograd.grad(features.sum(), x)
        assert torch.isfinite(gradient).all()


def test_a_query_of_zeros_gets_zeros():
    layer = NormAwareLinearAttention(8, 2, is_gated=False, bias=False)
    x = torch.randn(1, 4, 8, requires_grad=True)
    with torch.no_grad():
        layer.query.weight.zero_()
    output = layer(x)
    assert (output == 0).all()
    assert torch.isfinite(torch.autograd.grad(output.sum(), x)[0]).all()


def test_are_computed_in_single_precision_under_autocast():
    x = torch.randn(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = norm_aware_query_features(x), norm_aware_key_features(x.bfloat16())
    assert found[0].dtype == found[1].dtype == torch.float32
    torch.testing.assert_close(found[0], norm_aware_query_features(x))


def test_only_the_norm_in_the_exponent_survives_the_denominator():
    key = torch.rand(6, 8, dtype=torch.float64)
    query = torch.randn(8, dtype=torch.float64)
    for name, features in FEATURE_MAPS.items():
        products = [features.query(query * scale) @ features.key(key).mT for scale in (0.5, 2.0)]
        first, second = (product / product.sum() for product in products)
        forgets = name in ("relu", "relu-cubed", "fixed-exponent", "fixed-exponent-soft")
        assert torch.allclose(first, second, atol=1e-9) is forgets, name
        assert features.query(torch.randn(100, 8)).min() >= 0


def pieces(layer, x):
    """Queries, keys, values by head, and what the gate lets through, from the layer's own weights."""
    heads = (
        projection(x).unflatten(-1, (layer.num_heads, -1)).transpose(1, 2) for projection in (layer.query, layer.key)
    )
    query, key = (y for y in heads)
    value = layer.value(x).unflatten(-1, (layer.num_heads, -1)).transpose(1, 2)
    return query, key, value, torch.nn.functional.silu(layer.gate(x))


@pytest.mark.parametrize("phase", ["sign", "soft"])
def test_a_layer_for_images_equals_the_paper(phase):
    layer = NormAwareLinearAttention(16, 2, phase=phase, rotary="2d", has_lepe=True).double()
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    query, key, value, gate = pieces(layer, x)
    q = definition(query, 3 * (0.5 + torch.tanh(query.norm(dim=-1, keepdim=True))), phase, is_query=True)
    k = definition(key, 3, phase, is_query=False)
    angles = grid_angles(3, 4, 8)
    turned_q, turned_k = (torch.cat([rotate(half, angles) for half in y.chunk(2, -1)], -1) for y in (q, k))
    denominator = (q * k.mean(2, keepdim=True)).sum(-1, keepdim=True) + 1e-6
    heads = (turned_q @ turned_k.mT / 12 @ value) / denominator
    image = layer.value(x).mT.unflatten(-1, (3, 4))
    local = torch.nn.functional.conv2d(image, layer.lepe.weight, layer.lepe.bias, padding=2, groups=16)
    merged = heads.transpose(1, 2).flatten(2) + local.flatten(2).mT
    expected = layer.output(layer.norm(merged) * gate)
    torch.testing.assert_close(layer(x, grid=(3, 4)), expected)


def test_a_causal_layer_equals_the_quadratic_form():
    layer = NormAwareLinearAttention(16, 2, is_causal=True).double()
    x = torch.randn(2, 100, 16, dtype=torch.float64)
    query, key, value, gate = pieces(layer, x)
    q = definition(query, 3 * (0.5 + torch.tanh(query.norm(dim=-1, keepdim=True))), "sign", is_query=True)
    weights = (q @ definition(key, 3, "sign", is_query=False).mT).tril()
    seen = torch.arange(1, 101, dtype=torch.float64)[:, None]
    heads = weights / seen @ value / ((weights / seen).sum(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(layer(x), layer.output(layer.norm(heads.transpose(1, 2).flatten(2)) * gate))


def test_a_layer_for_images_survives():
    check_module(partial(NormAwareLinearAttention, 16, 2, rotary="2d", has_lepe=True), torch.randn(2, 9, 16))


def test_rejects_what_cannot_be():
    with pytest.raises(ValueError, match=r"must be positive, got 0 and 0\.5"):
        NormAwareLinearAttention(8, 2, power=0)
    with pytest.raises(ValueError, match=r"must be positive, got 3\.0 and -1"):
        norm_aware_query_features(torch.zeros(4), offset=-1)
    with pytest.raises(ValueError, match="'sign', 'soft' or None, got 'cosine'"):
        norm_aware_key_features(torch.zeros(4), phase="cosine")
