"""Per-head gates in models of Transformers that are built from a configuration."""

import copy

import pytest
import torch
from torch import nn

from postern.attention import PerHeadGate, add_per_head_gates, register_clipped_softmax
from tests.attention.test_hugging_face import MODELS, SMALL, bert, build, opt, text, transformers, vit

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
