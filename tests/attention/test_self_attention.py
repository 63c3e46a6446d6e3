"""Self-attention against torch's own; what all layers have in common is in `test_layers`."""

from functools import partial

import pytest
import torch
from torch import nn

from postern.attention import (
    ClippedSoftmaxAttention,
    KeyValueCache,
    PerHeadGatedAttention,
    SelfAttention,
    attend,
    attention_weights,
)
from postern.softmax import clipped_softmax, softmax_off_by_one
from tests.attention.layers import HEADS, TIME, WIDTH


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("normalise", [None, torch.softmax])
def test_equals_torchs_multi_head_attention(is_causal, normalise):
    layer = SelfAttention(WIDTH, HEADS, is_causal=is_causal, normalise=normalise).double()
    reference = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True).double()
    with torch.no_grad():
        reference.in_proj_weight.copy_(torch.cat([layer.query.weight, layer.key.weight, layer.value.weight]))
        reference.in_proj_bias.copy_(torch.cat([layer.query.bias, layer.key.bias, layer.value.bias]))
        reference.out_proj.load_state_dict(layer.output.state_dict())
    x = torch.randn(2, TIME, WIDTH, dtype=torch.float64)
    padding = torch.ones(2, TIME, dtype=torch.bool)
    padding[1, 4:] = False
    order = torch.ones(TIME, TIME, dtype=torch.bool).triu(1) if is_causal else None
    expected, weights = reference(x, x, x, key_padding_mask=~padding, attn_mask=order, average_attn_weights=False)
    torch.testing.assert_close(layer(x, padding), expected)
    torch.testing.assert_close(layer.weights(x, padding), weights)


@pytest.mark.parametrize("normalise", [None, torch.softmax, partial(clipped_softmax, alpha=1.0), softmax_off_by_one])
@pytest.mark.parametrize("is_causal", [False, True])
def test_what_may_attend_to_nothing_gets_nothing(normalise, is_causal):
    query, key, value = torch.randn(3, 2, HEADS, TIME, 8)
    mask = torch.ones(2, TIME, dtype=torch.bool)
    mask[0] = False
    query.requires_grad_()
    output = attend(query, key, value, mask, is_causal=is_causal, normalise=normalise)
    assert (output[0] == 0).all()
    assert torch.isfinite(output).all()
    output.square().sum().backward()
    assert torch.isfinite(query.grad).all()


def test_clipping_refers_to_the_length_of_training():
    layer = ClippedSoftmaxAttention(WIDTH, HEADS, alpha=4.0, length=16)
    x = torch.randn(2, TIME, WIDTH)
    plain = SelfAttention(WIDTH, HEADS)
    plain.load_state_dict(layer.state_dict())
    expected = (plain.weights(x) * (1 + 4 / 16) - 4 / 16).clamp(0, 1)
    torch.testing.assert_close(layer.weights(x), expected)
    torch.testing.assert_close(
        layer(x), layer.output((expected @ plain.project(x)[2]).transpose(1, 2).flatten(2)), atol=1e-6, rtol=1e-5
    )


def test_gates_multiply_the_heads():
    layer = PerHeadGatedAttention(WIDTH, HEADS)
    x = torch.randn(2, TIME, WIDTH)
    with torch.no_grad():
        layer.gate.bias[1] = -100
        heads = attend(*layer.project(x))
        expected = heads * layer.gate.scores(x)
    assert (expected[:, 1] == 0).all()
    torch.testing.assert_close(layer(x), layer.output(expected.transpose(1, 2).flatten(2)))


def test_gradients():
    query, key, value = (
        torch.randn(1, 2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(i), requires_grad=True)
        for i in range(3)
    )
    assert torch.autograd.gradcheck(
        lambda q, k, v: attend(q, k, v, is_causal=True, normalise=partial(clipped_softmax, alpha=0.5)),
        (query, key, value),
    )


def test_dropout_acts_in_training_alone_and_keeps_the_mean():
    query, key, value = torch.randn(3, 1, 1, 50, 4)
    draws = torch.stack([attend(query, key, value, normalise=torch.softmax, dropout=0.5) for _ in range(400)])
    error = (draws.mean(0) - attend(query, key, value)) / (draws.std(0) / 20)
    assert draws.std(0).mean() > 0.05
    assert error.abs().mean() < 1.2  # 0.8 for a normal distribution
    layer = SelfAttention(WIDTH, HEADS, dropout=0.5)
    x = torch.randn(1, TIME, WIDTH)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    torch.testing.assert_close(layer(x), layer(x))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SelfAttention(10, 3), "multiple of num_heads, got 10 and 3"),
        (lambda: SelfAttention(8, 0), "got 8 and 0"),
        (lambda: SelfAttention(8, 4, num_kv_heads=3), "multiple of num_kv_heads, got 4 and 3"),
        (lambda: SelfAttention(6, 2, rotary_base=10.0), "even number of features.*got 3 and 10"),
        (lambda: SelfAttention(8, 2, dropout=1.0), r"dropout lies in \[0, 1\), got 1\.0"),
        (lambda: SelfAttention(8, 2)(torch.zeros(1, 3, 9)), r"\[batch, time, 8\], got \[1, 3, 9\]"),
        (lambda: SelfAttention(8, 2)(torch.zeros(1, 3, 8, dtype=torch.int64)), r"got torch\.int64"),
        (lambda: SelfAttention(8, 2)(torch.zeros(1, 3, 8), torch.ones(1, 3)), r"a mask is boolean.*torch\.float32"),
        (lambda: SelfAttention(8, 2)(torch.zeros(1, 3, 8), torch.ones(1, 4).bool()), r"\[batch, 3\].*\[1, 1, 1, 4\]"),
        (lambda: ClippedSoftmaxAttention(8, 2, alpha=-1, length=8), "alpha must be at least 0, got -1"),
        (lambda: ClippedSoftmaxAttention(8, 2, alpha=1, length=0), "length must be at least 1, got 0"),
    ],
)
def test_rejects_what_cannot_be(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_the_weights_of_a_causal_layer_are_lower_triangular():
    x = torch.randn(1, TIME, WIDTH)
    for layer in (SelfAttention(WIDTH, HEADS, is_causal=True), SelfAttention(WIDTH, 6, num_kv_heads=2, is_causal=True)):
        assert layer.weights(x).shape == (1, layer.num_heads, TIME, TIME)
        assert (layer.weights(x).triu(1) == 0).all()


@pytest.mark.parametrize("normalise", [None, torch.softmax])
def test_shared_heads_are_copies(normalise):
    layer = SelfAttention(WIDTH, 6, num_kv_heads=2, is_causal=True, normalise=normalise, rotary_base=100.0).double()
    whole = SelfAttention(WIDTH, 6, is_causal=True, rotary_base=100.0).double()
    state = layer.state_dict()
    for name in ("key", "value"):
        for kind in ("weight", "bias"):
            shared = state[f"{name}.{kind}"]
            state[f"{name}.{kind}"] = shared.view(2, 4, -1).repeat_interleave(3, 0).reshape(24, *shared.shape[1:])
    whole.load_state_dict(state)
    x = torch.randn(2, TIME, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(layer(x), whole(x))


def test_a_cache_belongs_to_one_batch():
    cache = KeyValueCache()
    cache.append(*torch.zeros(2, 2, 3, 1, 4))
    with pytest.raises(ValueError, match=r"\[2, 3\], got new ones of \[1, 3\]"):
        cache.append(*torch.zeros(2, 1, 3, 1, 4))


def test_weights_sum_to_one_for_softmax_and_to_less_for_the_others():
    query, key = torch.randn(2, 1, 1, TIME, 8)
    torch.testing.assert_close(attention_weights(query, key).sum(-1), torch.ones(1, 1, TIME))
    assert (attention_weights(query, key, normalise=partial(clipped_softmax, alpha=1.0)).sum(-1) < 1).all()
    assert (attention_weights(query, key, normalise=softmax_off_by_one).sum(-1) < 1).all()
