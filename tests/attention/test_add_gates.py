"""Gates in models of Transformers that are built from a configuration."""

import copy

import pytest
import torch
from torch import nn

from postern.attention import (
    AttentionGate,
    GatedAttention,
    HeadNonlinearity,
    PerHeadGate,
    add_attention_gates,
    add_gates,
    add_per_head_gates,
    fit_attention,
    register_clipped_softmax,
)
from tests.attention.test_gated import POSITIONS, widen
from tests.attention.test_hugging_face import MODELS, SMALL, bert, build, llama, opt, text, transformers, vit


def qwen3():
    config = transformers.Qwen3Config(
        **SMALL, intermediate_size=32, initializer_range=0.3, num_key_value_heads=1, head_dim=12
    )
    return build(transformers.Qwen3ForCausalLM, config)


CAUSAL = {"opt": (opt, {}), "llama": (llama, {}), "qwen3": (qwen3, {"head_dim": 12, "has_qk_norm": True})}
KINDS = ("linear", "mlp", "all")


@pytest.fixture(params=MODELS.values(), ids=MODELS.keys())
def model_and_inputs(request):
    make, inputs = request.param
    return make(), inputs()


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("kind", KINDS)
def test_open_gates_change_nothing_and_closed_ones_stop_the_heads(model_and_inputs, kind):
    model, inputs = model_and_inputs
    before = logits(model, inputs)
    gates = add_per_head_gates(model, kind)
    assert len(gates) == 2
    assert all(isinstance(gate, PerHeadGate) for gate in gates.values())
    with torch.no_grad():
        for gate in gates.values():
            gate.weight.zero_()
            gate.bias.fill_(100.0)
    torch.testing.assert_close(logits(model, inputs), before)
    with torch.no_grad():
        for gate in gates.values():
            gate.bias.fill_(-200.0)
        closed = logits(model, inputs)
        for name, module in model.named_modules():
            if name.endswith(("v_proj", "value")):
                module.weight.add_(1.0)  # what is read makes no difference any more
    torch.testing.assert_close(logits(model, inputs), closed)
    assert (closed - before).abs().max() > 1e-3


def test_a_gate_multiplies_its_own_head():
    """One layer of OPT and BERT, recomputed by hand from what enters the layer."""
    for make, path in ((opt, "model.decoder.layers.0.self_attn"), (bert, "bert.encoder.layer.0.attention.self")):
        model = make(attn_implementation="eager")
        gates = add_per_head_gates(model)
        layer = model.get_submodule(path)
        seen = {}
        layer.register_forward_pre_hook(
            lambda module, args, kwargs, seen=seen: seen.update(x=args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        layer.register_forward_hook(lambda module, args, output, seen=seen: seen.update(y=output[0]))
        model(**text() | {"attention_mask": torch.ones(2, 9)})
        x, y = seen["x"], seen["y"]
        query, key, value = (
            getattr(layer, f"{name[0]}_proj", None) or getattr(layer, name) for name in ("query", "key", "value")
        )
        heads = []
        for head in range(2):
            part = slice(8 * head, 8 * head + 8)
            scores = query(x)[..., part] @ key(x)[..., part].mT / 8**0.5
            if make is opt:
                scores = scores.masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf)
            gate = torch.sigmoid(x[..., part] @ gates[path].weight[head] + gates[path].bias[head])
            heads.append(gate[..., None] * (scores.softmax(-1) @ value(x)[..., part]))
        expected = torch.cat(heads, -1)
        if make is opt:
            expected = nn.functional.linear(expected, layer.out_proj.weight, layer.out_proj.bias)
        torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_model_starts_unchanged(model_and_inputs, kind):
    model, inputs = model_and_inputs
    before = logits(model, inputs)
    add_per_head_gates(model, kind, weight_std=0.0, is_rescaled=True)
    torch.testing.assert_close(logits(model, inputs), before, rtol=1e-4, atol=1e-5)


def test_gates_learn(model_and_inputs):
    model, inputs = model_and_inputs
    gates = add_per_head_gates(model)
    model(**inputs).logits.square().sum().backward()
    for gate in gates.values():
        assert gate.weight.grad.abs().max() > 0
        assert gate.bias.grad.abs().min() > 0


def test_works_with_the_clipped_softmax_and_any_other_attention():
    register_clipped_softmax()
    inputs = text()
    plain = opt(attn_implementation="postern/clipped_softmax", clipped_softmax={"gamma": 0.0})
    add_per_head_gates(plain)
    fused = opt(attn_implementation="sdpa")
    add_per_head_gates(fused)
    fused.load_state_dict(plain.state_dict())
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(logits(plain, inputs)[real], logits(fused, inputs)[real])


def test_decoding_with_a_cache_equals_the_whole():
    model = opt()
    add_per_head_gates(model)
    ids = text()["input_ids"]
    first = model(ids[:, :5], use_cache=True)
    rest = model(ids[:, 5:], past_key_values=first.past_key_values, use_cache=True).logits
    torch.testing.assert_close(torch.cat([first.logits, rest], dim=1), model(ids).logits)


def test_survives_copying_saving_checkpointing_and_compiling():
    inputs = text()
    for make in (opt, bert):
        model = make()
        gates = add_per_head_gates(model)
        expected = logits(model, inputs)
        copied = copy.deepcopy(model)
        torch.testing.assert_close(logits(copied, inputs), expected)
        with torch.no_grad():
            next(iter(gates.values())).bias.add_(3.0)
        torch.testing.assert_close(logits(copied, inputs), expected)
        assert (logits(model, inputs) - expected).abs().max() > 1e-4

        fresh = make()
        add_per_head_gates(fresh)
        fresh.load_state_dict(copied.state_dict())
        torch.testing.assert_close(logits(fresh, inputs), expected)

        torch.compiler.reset()
        compiled = torch.compile(copied, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(logits(compiled, inputs), expected)

        copied.train()
        for module in copied.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        plain = copied(**inputs).logits
        copied.gradient_checkpointing_enable({"use_reentrant": False})
        checkpointed = copied(**inputs).logits
        torch.testing.assert_close(checkpointed, plain)
        checkpointed.sum().backward()


def test_gates_follow_the_models_dtype():
    model = vit().to(torch.bfloat16)
    gates = add_per_head_gates(model)
    assert {gate.weight.dtype for gate in gates.values()} == {torch.bfloat16}


def test_leaves_cross_attention_alone():
    config = transformers.BertConfig(**SMALL, intermediate_size=32, is_decoder=True, add_cross_attention=True)
    gates = add_per_head_gates(build(transformers.BertLMHeadModel, config))
    assert list(gates) == [f"bert.encoder.layer.{i}.attention.self" for i in range(2)]


def test_the_pattern_chooses_layers():
    assert list(add_per_head_gates(opt(), modules="*layers.1*")) == ["model.decoder.layers.1.self_attn"]


def test_rejects_what_has_no_place_for_gates():
    with pytest.raises(ValueError, match="Linear has no self-attention layer"):
        add_per_head_gates(nn.Linear(3, 3))
    model = opt()
    with pytest.raises(ValueError, match=r"fits '\*encoder\*'"):
        add_per_head_gates(model, modules="*encoder*")
    add_per_head_gates(model)
    with pytest.raises(ValueError, match="has a gate already"):
        add_per_head_gates(model)


# -- gates at any position --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["element", "head"])
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("name", CAUSAL)
def test_a_gated_model_is_one_of_gated_layers(name, position, granularity):
    """The same weights in postern's own layers, in the place of the model's."""
    make, options = CAUSAL[name]
    is_opt = name == "opt"
    model = make()
    gates = add_attention_gates(model, position, granularity=granularity, bias=is_opt)
    assert all(isinstance(widen(gate), AttentionGate) for gate in gates.values())
    ids = text()["input_ids"]
    expected = logits(model, {"input_ids": ids})

    rebuilt = copy.deepcopy(model)
    fitted = fit_attention(
        rebuilt,
        lambda _: GatedAttention(
            16,
            2,
            gate_position=position,
            granularity=granularity,
            num_kv_heads=None if is_opt else 1,
            is_causal=True,
            bias=is_opt,
            rotary_base=None if is_opt else 10_000.0,
            **options,
        ),
    )
    for path, layer in fitted.items():
        old = model.get_submodule(path)
        for ours, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
            getattr(layer.attention, ours).load_state_dict(getattr(old, theirs).state_dict())
        layer.attention.output.load_state_dict((old.out_proj if is_opt else old.o_proj).state_dict())
        layer.attention.gate.load_state_dict(gates[path].state_dict())
        if "has_qk_norm" in options:
            for norm in (layer.attention.query_norm, layer.attention.key_norm):
                norm.eps = model.config.rms_norm_eps
    torch.testing.assert_close(logits(rebuilt, {"input_ids": ids}), expected, rtol=1e-4, atol=1e-5)


def test_gates_at_several_positions_are_saved_copied_and_compiled():
    inputs = text()
    model = llama()
    for position in POSITIONS:
        for gate in add_attention_gates(model, position, is_shared=position == "heads").values():
            widen(gate)
    expected = logits(model, inputs)
    state = model.state_dict()
    assert {f"model.layers.0.self_attn.{position}_gate.projection.weight" for position in POSITIONS} <= set(state)
    fresh = llama()
    for position in POSITIONS:
        add_attention_gates(fresh, position, is_shared=position == "heads")
    fresh.load_state_dict(state)
    torch.testing.assert_close(logits(fresh, inputs), expected)

    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    torch.testing.assert_close(logits(copied, inputs), expected)
    torch.compiler.reset()
    compiled = torch.compile(copied, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled, inputs), expected)
    copied.train()
    plain = copied(**inputs).logits
    copied.gradient_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(copied(**inputs).logits, plain)


def test_decoding_with_gates_and_a_cache_equals_the_whole():
    for position in POSITIONS:
        model = qwen3()
        for gate in add_attention_gates(model, position).values():
            widen(gate)
        ids = text()["input_ids"]
        first = model(ids[:, :5], use_cache=True)
        rest = model(ids[:, 5:], past_key_values=first.past_key_values, use_cache=True).logits
        torch.testing.assert_close(torch.cat([first.logits, rest], dim=1), model(ids).logits)


def test_gates_start_as_the_model_does():
    for model, std in ((llama(), 0.3), (opt(), 0.3)):
        gates = add_attention_gates(model)
        weights = torch.cat([gate.projection.weight.flatten() for gate in gates.values()])
        assert abs(weights.std() / std - 1) < 0.2
    gates = add_attention_gates(llama(), initial_std=0.0)
    assert all((gate.projection.weight == 0).all() for gate in gates.values())


def test_any_module_can_be_fitted():
    shapes = []

    def make(width, num_heads, head_dim):
        shapes.append((width, num_heads, head_dim))
        return HeadNonlinearity(head_dim, "silu")

    model = bert()
    before = logits(model, text())
    add_gates(model, make)
    assert (logits(model, text()) - before).abs().max() > 1e-4
    for position in POSITIONS:
        add_gates(qwen3(), make, position, modules="*.1.*")
    assert shapes == [(16, 2, 8)] * 2 + [(16, 2, 12), (16, 1, 12), (16, 1, 12), (16, 2, 12), (16, 1, 16)]


def test_rejects_positions_that_a_model_does_not_have():
    with pytest.raises(ValueError, match="heads, value, key, query, output; got 'G1'"):
        add_attention_gates(opt(), "G1")
    with pytest.raises(ValueError, match="no projection to its output that could be gated"):
        add_attention_gates(bert(), "output")
    model = opt()
    add_attention_gates(model, "value")
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn' has a gate already, on its value"):
        add_attention_gates(model, "value")
    add_per_head_gates(model)
    with pytest.raises(ValueError, match="has a gate already, on its heads"):
        add_attention_gates(model)
    qwen = transformers.Qwen3NextConfig(
        **SMALL, num_key_value_heads=1, head_dim=8, layer_types=["full_attention"] * 2, num_experts=0
    )
    with pytest.raises(ValueError, match="projects to 32 features for its query, which are not heads of 8"):
        add_attention_gates(build(transformers.Qwen3NextForCausalLM, qwen), "query")
