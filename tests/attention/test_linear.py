"""Linear attention against the quadratic form of its definition."""

import pytest
import torch

from postern.attention import LinearAttention, LinearState, elu_features, linear_attention, rotary_angles, rotate


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def features(time=130, heads=4, kv_heads=2):
    query = torch.rand(2, heads, time, 6, dtype=torch.float64)
    key = torch.rand(2, kv_heads, time, 6, dtype=torch.float64)
    return query, key, torch.randn(2, kv_heads, time, 5, dtype=torch.float64)


def quadratic(query, key, value, allowed, angles=None):
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    weights = (query @ key.mT) * allowed
    turned = weights if angles is None else (rotate(query, angles) @ rotate(key, angles).mT) * allowed
    return (turned @ value) / (weights.sum(-1, keepdim=True) + 1e-6)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("is_rotated", [False, True])
def test_equals_its_definition(is_causal, is_rotated):
    query, key, value = features()
    angles = rotary_angles(130, 6, base=100.0) if is_rotated else None
    mask = torch.rand(2, 130) < 0.8
    allowed = mask[:, None, None].double() * (torch.ones(130, 130).tril() if is_causal else 1)
    found = linear_attention(query, key, value, mask, is_causal=is_causal, angles=angles)
    torch.testing.assert_close(found, quadratic(query, key, value, allowed, angles))


@pytest.mark.parametrize("is_causal", [False, True])
def test_gradients_equal_those_of_the_definition(is_causal):
    inputs = [x.requires_grad_() for x in features(70)]
    allowed = torch.ones(70, 70).tril() if is_causal else 1
    found = torch.autograd.grad(linear_attention(*inputs, is_causal=is_causal).square().sum(), inputs)
    torch.testing.assert_close(found, torch.autograd.grad(quadratic(*inputs, allowed).square().sum(), inputs))


def test_what_may_attend_to_nothing_gets_nothing():
    query, key, value = features(9)
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0] = False
    mask[1, :3] = False
    assert (linear_attention(query, key, value, mask)[0] == 0).all()
    found = linear_attention(query, key, value, mask, is_causal=True)
    assert (found[0] == 0).all()
    assert (found[1, :, :3] == 0).all()
    assert (found[1, :, 3:] != 0).all()


def test_the_state_does_not_grow():
    layer, state = LinearAttention(16, 2, is_causal=True), LinearState()
    with torch.no_grad():
        layer(torch.randn(1, 3, 16), cache=state)
        sizes = state.memory.shape, state.total.shape
        layer(torch.randn(1, 300, 16), cache=state)
    assert (state.memory.shape, state.total.shape) == sizes == ((1, 2, 8, 8), (1, 2, 8))
    assert len(state) == 303


def test_half_precision_sums_in_single():
    query, key, value = (x.bfloat16() for x in features(2000))
    found = linear_attention(query, key, value, is_causal=True)
    assert found.dtype == torch.bfloat16
    exact = linear_attention(query.double(), key.double(), value.double(), is_causal=True)
    torch.testing.assert_close(found.double(), exact, rtol=0.01, atol=0.01)


def test_features_are_positive():
    assert (elu_features(torch.linspace(-30, 30, 100, dtype=torch.float64)) > 0).all()


def test_a_cache_needs_the_causal_order():
    layer = LinearAttention(8, 2)
    with pytest.raises(ValueError, match="a cache needs the causal order"):
        layer(torch.zeros(1, 3, 8), cache=layer.new_cache())


@pytest.mark.parametrize("is_causal", [False, True])
def test_averages_count_the_keys_that_may_be_attended_to(is_causal):
    query, key, value = features(20)
    query = query * 1e-6  # so that eps matters
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[0, :3] = False
    allowed = mask[:, None, None, :] * (torch.ones(20, 20).tril() if is_causal else torch.ones(20, 20))
    weights = query @ key.repeat_interleave(2, 1).mT * allowed
    count = allowed.sum(-1, keepdim=True).clamp_min(1)
    expected = (weights / count @ value.repeat_interleave(2, 1)) / ((weights / count).sum(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(
        linear_attention(query, key, value, mask, is_causal=is_causal, is_averaged=True), expected
    )


def test_groups_of_features_are_rotated_alike():
    query, key, value = features(12)
    angles = rotary_angles(12, 2, base=100.0)
    groups = [torch.cat([rotate(part, angles) for part in x.split(2, -1)], -1) for x in (query, key)]
    turned = groups[0] @ groups[1].repeat_interleave(2, 1).mT
    total = (query @ key.repeat_interleave(2, 1).mT).sum(-1, keepdim=True) + 1e-6
    expected = turned @ value.repeat_interleave(2, 1) / total
    torch.testing.assert_close(linear_attention(query, key, value, angles=angles), expected)
    with pytest.raises(ValueError, match="2 angles rotate groups of twice as many features, got 6"):
        linear_attention(query, key, value, angles=rotary_angles(12, 4))
