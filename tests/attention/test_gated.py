"""Gated attention, at every place of a gate, against loops over heads and against Transformers' Qwen3-Next."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from postern.attention import (
    AttentionGate,
    GatedAttention,
    HeadNonlinearity,
    SelfAttention,
    rotary_angles,
    rotate,
    split_query_and_gate,
)
from postern.attention.self_attention import GatePosition, repeat_heads
from tests.modules import check_module

WIDTH, HEADS, KV_HEADS, HEAD_DIM, TIME = 24, 6, 2, 4, 7
POSITIONS: tuple[GatePosition, ...] = ("heads", "value", "key", "query", "output")
ACTIVATIONS = {
    "sigmoid": torch.sigmoid,
    "half_sigmoid": lambda x: 0.5 + 0.5 * torch.sigmoid(x),
    "silu": F.silu,
    "identity": lambda x: x,
}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def tokens(batch=2):
    return torch.randn(batch, TIME, WIDTH, dtype=torch.float64)


def widen(module):
    """Gates that differ from one another: initial weights of 0.02 leave all of them half open."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return module


# -- the gate ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_additive", [False, True])
@pytest.mark.parametrize("is_shared", [False, True])
@pytest.mark.parametrize("activation", [None, *ACTIVATIONS])
@pytest.mark.parametrize("granularity", ["element", "head"])
def test_equals_a_loop_over_heads(granularity, activation, is_shared, is_additive):
    options = {"granularity": granularity, "activation": activation, "is_shared": is_shared, "is_additive": is_additive}
    gate = widen(AttentionGate(WIDTH, HEADS, HEAD_DIM, bias=True, **options).double())
    x, y = tokens(), torch.randn(2, HEADS, TIME, HEAD_DIM, dtype=torch.float64)
    function = ACTIVATIONS[activation or ("silu" if is_additive else "sigmoid")]
    size = HEAD_DIM if granularity == "element" else 1
    scores = []
    for head in range(HEADS):
        rows = slice(head * size, (head + 1) * size)
        scores.append(function(x @ gate.projection.weight[rows].T + gate.projection.bias[rows]))
    if is_shared:
        scores = [sum(scores) / HEADS] * HEADS
    expected = torch.stack(
        [y[:, head] + each if is_additive else y[:, head] * each for head, each in enumerate(scores)], dim=1
    )
    torch.testing.assert_close(gate(y, x), expected)


def test_without_input_the_scores_are_parameters_that_start_half_open():
    gate = AttentionGate(WIDTH, HEADS, HEAD_DIM, is_input_dependent=False).double()
    y = torch.randn(2, HEADS, TIME, HEAD_DIM, dtype=torch.float64)
    torch.testing.assert_close(gate(y, tokens()), y / 2)
    widen(gate)
    torch.testing.assert_close(gate(y, tokens()), y * torch.sigmoid(gate.logits))
    assert [parameter.numel() for parameter in gate.parameters()] == [HEADS * HEAD_DIM]


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, WIDTH * HEADS * HEAD_DIM),
        ({"granularity": "head"}, WIDTH * HEADS),
        ({"is_shared": True}, WIDTH * HEADS * HEAD_DIM),
        ({"bias": True}, (WIDTH + 1) * HEADS * HEAD_DIM),
    ],
)
def test_costs_what_the_paper_counts(options, count):
    assert sum(p.numel() for p in AttentionGate(WIDTH, HEADS, HEAD_DIM, **options).parameters()) == count


def test_starts_half_open_and_nearly_linear():
    gate = AttentionGate(512, 8, 64)
    assert 0.019 < gate.projection.weight.std() < 0.021
    scores = gate.scores(torch.randn(1, 9, 512))
    assert abs(scores.mean() - 0.5) < 0.01
    assert (AttentionGate(512, 8, 64, initial_std=0.0).scores(torch.randn(1, 9, 512)) == 0.5).all()


@pytest.mark.parametrize("function", ["rms_norm", "silu"])
def test_controls_are_functions_of_a_head_alone(function):
    y = torch.randn(2, HEADS, TIME, HEAD_DIM, dtype=torch.float64)
    found = HeadNonlinearity(HEAD_DIM, function).double()(y)
    expected = y * torch.sigmoid(y) if function == "silu" else y / y.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(found, expected)
    check_module(partial(HeadNonlinearity, HEAD_DIM, function), y.float())


@pytest.mark.parametrize("options", [{}, {"granularity": "head", "is_shared": True}, {"is_additive": True}])
def test_gradients(options):
    gate = widen(AttentionGate(5, 2, 3, **options).double())
    y, x = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((1, 2, 4, 3), (1, 4, 5)))
    assert torch.autograd.gradcheck(gate, (y, x))


@pytest.mark.parametrize("options", [{}, {"is_shared": True}, {"is_input_dependent": False}])
def test_survives(options):
    check_module(
        partial(AttentionGate, WIDTH, HEADS, HEAD_DIM, **options),
        torch.randn(2, HEADS, TIME, HEAD_DIM),
        torch.randn(2, TIME, WIDTH),
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: AttentionGate(0, 2, 3), "got width=0, num_heads=2, head_dim=3"),
        (lambda: AttentionGate(6, 2, 3, granularity="token"), "got 'token'"),
        (lambda: AttentionGate(6, 2, 3, activation="relu"), "sigmoid, half_sigmoid, silu, identity; got 'relu'"),
        (lambda: AttentionGate(6, 2, 3, initial_std=-1.0), r"at least 0, got -1\.0"),
        (lambda: AttentionGate(6, 2, 3, is_input_dependent=False, bias=True), "leave bias=False"),
        (lambda: AttentionGate(6, 2, 3)(torch.zeros(1, 3, 4, 3), torch.zeros(1, 4, 6)), r"got \[1, 3, 4, 3\]"),
        (lambda: AttentionGate(6, 2, 3)(torch.zeros(1, 2, 4, 3), torch.zeros(1, 4, 5)), r"time, 6\], got \[1, 4, 5\]"),
        (lambda: HeadNonlinearity(0), "at least 1, got 0"),
        (lambda: HeadNonlinearity(3, "relu"), "'rms_norm' or 'silu', got 'relu'"),
        (lambda: GatedAttention(6, 2, gate_position="values"), "heads, value, key, query, output; got 'values'"),
        (lambda: SelfAttention(6, 2, gate_position="G1"), "got 'G1'"),
        (lambda: GatedAttention(6, 4), "multiple of num_heads, got 6 and 4"),
        (lambda: GatedAttention(6, 4, head_dim=0), "head_dim must be at least 1, got 0"),
    ],
)
def test_rejects_what_cannot_be(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# -- the layer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_qk_norm", [False, True])
@pytest.mark.parametrize("granularity", ["element", "head"])
@pytest.mark.parametrize("position", POSITIONS)
def test_each_position_equals_the_formula(position, granularity, has_qk_norm):
    """Grouped heads, rotations and a causal order, step by step."""
    layer = widen(
        GatedAttention(
            WIDTH,
            HEADS,
            gate_position=position,
            granularity=granularity,
            num_kv_heads=KV_HEADS,
            is_causal=True,
            rotary_base=100.0,
            has_qk_norm=has_qk_norm,
        ).double()
    )
    x = tokens()

    def gated(place, y, heads):
        if place != position:
            return y
        scores = torch.sigmoid(layer.gate.projection(x)).view(2, TIME, heads, -1)
        return (y.view(2, TIME, heads, -1) * scores).view(2, TIME, -1)

    def by_head(y):
        return y.view(2, TIME, -1, HEAD_DIM).transpose(1, 2)

    query = by_head(gated("query", layer.query(x), HEADS))
    key = by_head(gated("key", layer.key(x), KV_HEADS))
    value = by_head(gated("value", layer.value(x), KV_HEADS))
    if has_qk_norm:
        query, key = layer.query_norm(query), layer.key_norm(key)
    angles = rotary_angles(TIME, HEAD_DIM, base=100.0)
    query, key = rotate(query, angles), rotate(key, angles)
    scores = query @ repeat_heads(key, HEADS).mT / HEAD_DIM**0.5
    scores = scores.masked_fill(torch.ones(TIME, TIME).triu(1).bool(), -torch.inf)
    heads = (scores.softmax(-1) @ repeat_heads(value, HEADS)).transpose(1, 2).flatten(2)
    expected = gated("output", layer.output(gated("heads", heads, HEADS)), 1)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.weights(x), scores.softmax(-1))


@pytest.mark.parametrize("position", POSITIONS)
def test_closed_gates_silence_what_they_gate(position):
    layer = GatedAttention(WIDTH, HEADS, gate_position=position, num_kv_heads=KV_HEADS).double()
    with torch.no_grad():
        layer.output.bias.zero_()
        layer.value.bias.fill_(1.0)
        layer.gate.projection.bias.fill_(-100.0)
    if position in ("query", "key"):
        torch.testing.assert_close(layer.weights(tokens()), torch.full((2, HEADS, TIME, TIME), 1 / TIME).double())
    else:
        assert layer(tokens()).abs().max() < 1e-30


def test_heads_may_have_any_size():
    layer = GatedAttention(WIDTH, HEADS, head_dim=10, num_kv_heads=3, bias=False)
    assert (layer.head_dim, layer.query.out_features, layer.key.out_features) == (10, 60, 30)
    assert layer.output.in_features == layer.gate.projection.out_features == 60
    assert "gate_position='heads'" in repr(layer)


@pytest.mark.parametrize("num_key_value_heads", [HEADS, KV_HEADS])
def test_equals_the_attention_of_qwen3_next(num_key_value_heads):
    transformers = pytest.importorskip("transformers")
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextAttention, Qwen3NextRotaryEmbedding

    config = transformers.Qwen3NextConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=num_key_value_heads,
        head_dim=8,
        partial_rotary_factor=1.0,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 1.0},
        attn_implementation="eager",
    )
    theirs = widen(Qwen3NextAttention(config, 0).double())
    ours = GatedAttention(
        WIDTH,
        HEADS,
        head_dim=8,
        num_kv_heads=num_key_value_heads,
        is_causal=True,
        bias=False,
        rotary_base=10_000.0,
        has_qk_norm=True,
    ).double()
    query, gate = split_query_and_gate(theirs.q_proj.weight, HEADS, 8, num_groups=HEADS)
    with torch.no_grad():
        for layer, weight in (
            (ours.query, query),
            (ours.gate.projection, gate),
            (ours.key, theirs.k_proj.weight),
            (ours.value, theirs.v_proj.weight),
            (ours.output, theirs.o_proj.weight),
            (ours.query_norm, 1 + theirs.q_norm.weight),
            (ours.key_norm, 1 + theirs.k_norm.weight),
        ):
            layer.weight.copy_(weight)
    ours.query_norm.eps = ours.key_norm.eps = config.rms_norm_eps
    x = tokens()
    positions = Qwen3NextRotaryEmbedding(config)(x, torch.arange(TIME)[None])
    order = torch.zeros(TIME, TIME, dtype=torch.float64).masked_fill(torch.ones(TIME, TIME).triu(1).bool(), -torch.inf)
    expected, _ = theirs(x, positions, order[None, None])
    # their softmax and norms are in float32
    torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-5)
    assert expected.abs().max() > 0.1


@pytest.mark.parametrize("size", [HEAD_DIM, 1])
@pytest.mark.parametrize("num_groups", [1, KV_HEADS, HEADS])
def test_splits_a_common_projection_as_published_code_splits_its_outputs(num_groups, size):
    weight = torch.randn(HEADS * (HEAD_DIM + size), WIDTH)
    query, gate = split_query_and_gate(weight, HEADS, HEAD_DIM, num_groups)
    x = torch.randn(3, WIDTH)
    heads = HEADS // num_groups
    grouped = F.linear(x, weight).view(3, num_groups, -1)
    expected = grouped.split([HEAD_DIM * heads, size * heads], dim=-1)
    torch.testing.assert_close(F.linear(x, query), expected[0].reshape(3, -1))
    torch.testing.assert_close(F.linear(x, gate), expected[1].reshape(3, -1))
    bias = torch.arange(float(len(weight)))
    torch.testing.assert_close(torch.cat(split_query_and_gate(bias, HEADS, HEAD_DIM, num_groups)).sort().values, bias)


@pytest.mark.parametrize(
    ("rows", "num_groups", "message"),
    [(47, 2, "48 rows, with headwise ones 30; got 47"), (48, 4, "do not form 4 groups")],
)
def test_splits_nothing_else(rows, num_groups, message):
    with pytest.raises(ValueError, match=message):
        split_query_and_gate(torch.zeros(rows, WIDTH), HEADS, HEAD_DIM, num_groups)


def test_a_gate_without_its_own_kind_can_be_put_in():
    """Any module (y, x) -> y will do."""

    class Halve(nn.Module):
        def forward(self, y, x):
            return y / 2

    layer = SelfAttention(WIDTH, HEADS, gate=Halve(), gate_position="output").double()
    plain = SelfAttention(WIDTH, HEADS).double()
    plain.load_state_dict(layer.state_dict())
    x = tokens()
    torch.testing.assert_close(layer(x), plain(x) / 2)
