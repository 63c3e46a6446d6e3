"""What the probe sees, against attention that is recomputed by hand."""

import pytest
import torch
from torch import nn

from postern.attention import (
    GatedAttention,
    LinearAttention,
    SelfAttention,
    SinkProbe,
    add_attention_gates,
    first_token_share,
    first_value_ratio,
    fit_attention,
    register_clipped_softmax,
)
from postern.nets import LanguageModel
from tests.attention.test_gated import widen
from tests.attention.test_hugging_face import bert, llama, opt, text, transformers

LENGTH, FIRST = 9, 3


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def tokens():
    return torch.randint(0, 30, (3, LENGTH), generator=torch.Generator().manual_seed(1))


def language_model(attention=None):
    return widen(LanguageModel(30, 16, 2, 4, 12, attention=attention))


def test_shares_and_ratios_by_hand():
    weights = torch.zeros(1, 2, 4, 4)
    weights[0, 0, :, 0] = torch.tensor([1.0, 0.5, 0.4, 0.2])
    weights[0, 1, :, 0] = torch.tensor([1.0, 0.5, 0.0, 0.2])
    torch.testing.assert_close(first_token_share(weights, 2), torch.tensor([0.2]))
    value = torch.tensor([[3.0, 4.0], [0.0, 10.0], [20.0, 0.0]])[None, None]
    torch.testing.assert_close(first_value_ratio(value), torch.tensor([5 / 15]))
    assert first_value_ratio(torch.zeros(1, 1, 3, 2)) == 0


@pytest.mark.parametrize("position", [None, "heads", "value", "output"])
def test_a_language_model_is_seen_as_it_computes(position):
    if position is None:
        model = language_model()
    else:
        model = language_model(
            lambda _: GatedAttention(16, 4, gate_position=position, num_kv_heads=2, is_causal=True, rotary_base=50.0)
        )
    expected = model(tokens())
    hidden, share, ratio, largest, gates, before, after = model.embedding(tokens()), [], [], [], [], [], []
    hidden = hidden + model.position.weight[:LENGTH]
    for layer in model.layers:
        x = layer.attention_norm(hidden)
        weights, value = layer.attention.weights(x), layer.attention.project(x)[2]
        share.append(weights[:, :, FIRST:, 0].mean())
        norms = value.norm(dim=-1)
        ratio.append((norms[:, :, 0] / norms[:, :, 1:].mean(-1)).mean())
        heads = weights @ value.repeat_interleave(4 // value.shape[1], dim=1)
        before.append((heads.abs() < 0.5).float().mean())
        if position is not None:
            gates.append(layer.attention.gate.scores(x).mean())
        if position == "heads":
            heads = layer.attention.gate(heads, x)
        after.append((heads.abs() < 0.5).float().mean())
        hidden = layer(hidden)
        largest.append(hidden.abs().amax((1, 2)).mean())
    with SinkProbe(model, first_query=FIRST, bounds=(0.5,)) as probe:
        torch.testing.assert_close(model(tokens()), expected)
    mean = lambda values: pytest.approx(torch.stack(values).mean().item(), rel=1e-4)  # noqa: E731
    assert probe.first_token_attention == mean(share)
    assert probe.value_norm_ratio == mean(ratio)
    assert probe.max_activation == mean(largest)
    assert probe.small_before_gate == {0.5: mean(before)}
    assert probe.small_after_gate == {0.5: mean(after)}
    assert probe.gate_mean == (None if position is None else mean(gates))
    assert probe.kurtosis > 1
    assert list(probe.per_layer) == ["layers.0.attention", "layers.1.attention"]
    assert probe.per_layer["layers.1.attention"].first_token_attention == pytest.approx(share[1].item(), rel=1e-4)


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "postern/clipped_softmax"])
def test_a_transformers_model_is_seen_whatever_computes_its_attention(implementation):
    register_clipped_softmax(gamma=0.0)
    model = llama(attn_implementation=implementation)
    for gate in add_attention_gates(model).values():
        widen(gate)
    for gate in add_attention_gates(model, "value").values():
        widen(gate)
    ids = text()["input_ids"]
    before = model(ids).logits
    rebuilt = llama()
    rebuilt.load_state_dict(model.state_dict(), strict=False)
    with SinkProbe(model, first_query=FIRST) as probe:
        torch.testing.assert_close(model(ids).logits, before)
    assert model.config._attn_implementation == implementation
    torch.testing.assert_close(model(ids).logits, before)
    layer = probe.per_layer["model.layers.0.self_attn"]

    x = rebuilt.model.layers[0].input_layernorm(rebuilt.model.embed_tokens(ids))
    attention, gates = rebuilt.model.layers[0].self_attn, model.model.layers[0].self_attn
    value = gates.value_gate(attention.v_proj(x)[:, None], x)
    norms = value.norm(dim=-1)
    assert layer.value_norm_ratio == pytest.approx((norms[..., 0] / norms[..., 1:].mean(-1)).mean().item(), rel=1e-4)
    own = SelfAttention(16, 2, num_kv_heads=1, is_causal=True, bias=False, rotary_base=10_000.0)
    for ours, theirs in ((own.query, attention.q_proj), (own.key, attention.k_proj)):
        ours.load_state_dict(theirs.state_dict())
    weights = own.weights(x)
    assert layer.first_token_attention == pytest.approx(weights[:, :, FIRST:, 0].mean().item(), rel=1e-4)
    scores = torch.cat([gates.heads_gate.scores(x).flatten(), gates.value_gate.scores(x).flatten()])
    assert layer.gate_mean == pytest.approx(scores.mean().item(), rel=1e-4)
    heads = weights @ value
    gated = gates.heads_gate(heads, x)
    assert layer.small_before_gate[0.01] == pytest.approx((heads.abs() < 0.01).float().mean().item(), abs=1e-3)
    assert layer.small_after_gate[0.01] == pytest.approx((gated.abs() < 0.01).float().mean().item(), abs=1e-3)


def test_models_without_an_output_projection_and_models_with_fitted_layers():
    model = bert(attn_implementation="sdpa")
    with SinkProbe(model, first_query=0) as probe:
        model(text()["input_ids"])
    assert 0.05 < probe.first_token_attention < 0.25
    assert probe.small_after_gate == probe.small_before_gate
    assert probe.small_after_gate[0.01] > probe.small_after_gate[0.001] > 0

    model = opt()
    fit_attention(model, lambda _: GatedAttention(16, 2, is_causal=True))
    with SinkProbe(model, first_query=FIRST) as probe:
        model(text()["input_ids"])
    assert probe.gate_mean == pytest.approx(0.5, abs=0.01)
    assert len(probe.per_layer) == 2


def test_a_sink_is_found():
    model = LanguageModel(30, 16, 1, 1, 12)
    attention = model.layers[0].attention
    with torch.no_grad():
        model.position.weight.zero_()
        model.position.weight[0, 0] = 100.0
        attention.query.bias.fill_(30.0)
        attention.key.weight.zero_()
        attention.key.weight[:, 0] = 1.0
        attention.value.weight[:, 0] = 0.0
    with SinkProbe(model) as probe:
        model(tokens())
    assert probe.first_token_attention > 0.99
    assert probe.value_norm_ratio < 0.5
    assert probe.max_activation > 50


def test_batches_add_up_and_hooks_leave():
    model = language_model()
    with SinkProbe(model, first_query=FIRST) as whole:
        model(tokens())
    with SinkProbe(model, first_query=FIRST) as parts:
        model(tokens()[:1])
        model(tokens()[1:])
    assert parts.first_token_attention == pytest.approx(whole.first_token_attention, rel=1e-5)
    assert parts.max_activation == pytest.approx(whole.max_activation, rel=1e-5)
    model(tokens())
    assert parts.max_activation == pytest.approx(whole.max_activation, rel=1e-5)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_rejects_what_it_cannot_see():
    with pytest.raises(ValueError, match="Linear has no attention layers"):
        SinkProbe(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="LanguageModel has no attention layers"):
        SinkProbe(LanguageModel(30, 16, attention=lambda _: LinearAttention(16, 2, is_causal=True)))
    model = language_model()
    with pytest.raises(ValueError, match=r"'layers\.0\.attention' has seen no tokens"):
        SinkProbe(model).first_token_attention  # noqa: B018
    with SinkProbe(model), pytest.raises(ValueError, match="number 8 on are none of 5"):
        model(tokens()[:, :5])
    with SinkProbe(model, first_query=0), pytest.raises(ValueError, match="got 1 token"):
        model(tokens()[:, :1])
    cache = model.new_cache()
    model(tokens(), cache=cache)
    with SinkProbe(model, first_query=0), pytest.raises(ValueError, match="without a cache"):
        model(tokens()[:, :2], cache=cache)
    foreign = llama()
    foreign.model.layers[1].self_attn.v_proj = nn.Identity()
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn' has no projection to its values"):
        SinkProbe(foreign)
    foreign = llama()
    cache = transformers.DynamicCache()
    foreign(text()["input_ids"], cache=cache, use_cache=True)
    with SinkProbe(foreign, first_query=0), pytest.raises(ValueError, match="no weights over the 2 tokens"):
        foreign(text()["input_ids"][:, :2], cache=cache, use_cache=True)
