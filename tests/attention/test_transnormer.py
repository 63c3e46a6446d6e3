"""TransNormer as a model of Transformers."""

import copy
import importlib
import sys

import pytest
import torch
from torch.nn import functional as F

from postern.attention import GatedLinearAttention, decay_slopes, simple_rms_norm
from postern.errors import MissingExtra

transformers = pytest.importorskip("transformers")
from postern.attention.transnormer import (  # noqa: E402 - Transformers may be missing
    TransNormerConfig,
    TransNormerForCausalLM,
    TransNormerModel,
)

GREEDY = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


def config(**options):
    sizes = {"vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3}
    return TransNormerConfig(initializer_range=0.2, **{**sizes, **options})


def build(**options):
    torch.manual_seed(0)
    return TransNormerForCausalLM(config(**options)).eval()


def ids(batch=2, time=9):
    return torch.randint(3, 40, (batch, time), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def model():
    return build()


def definition(model, tokens):
    """The model by the paper's equations, in one piece: a matrix of all pairs."""
    settings = model.config
    x = model.model.embedding.weight[tokens]
    steps = torch.arange(tokens.shape[1], dtype=x.dtype)
    distance = steps[:, None] - steps
    for index, layer in enumerate(model.model.layers):
        y = simple_rms_norm(x)
        q, k, v, u = (y @ w.T for w in layer.attention.project.weight.chunk(4))
        q, k = F.silu(q), F.silu(k)
        slopes = decay_slopes(settings.num_attention_heads, index, settings.num_hidden_layers, settings.decay)
        heads = []
        for head, slope in enumerate(slopes.to(x.dtype)):
            part = slice(8 * head, 8 * head + 8)
            pairs = q[..., None, :, None, part] * k[..., None, None, :, part]
            if layer.attention.lrpe is not None:
                pairs = pairs * torch.cos(distance[..., None] * layer.attention.lrpe.angle[head])
            weights = pairs.sum(-1)[..., 0, :, :] * torch.exp(-slope * distance).tril()
            heads.append(weights @ v[..., part])
        x = x + (simple_rms_norm(torch.cat(heads, -1)) * u) @ layer.attention.output.weight.T
        value, gate = (simple_rms_norm(x) @ w.T for w in layer.feedforward.expand.weight.chunk(2))
        x = x + (value * gate) @ layer.feedforward.contract.weight.T
    return simple_rms_norm(x) @ model.lm_head.weight.T


@pytest.mark.parametrize("options", [{}, {"decay": "paper", "lrpe": "all"}, {"tie_word_embeddings": True}])
def test_equals_the_equations(options):
    model = build(**options).double()
    logits = model(ids()).logits
    torch.testing.assert_close(logits, definition(model, ids()))
    assert (logits.softmax(-1) - 1 / 40).abs().max() > 0.05, "the weights are large enough to matter"


def test_starts_as_the_code_does():
    model = TransNormerForCausalLM(
        TransNormerConfig(vocab_size=400, hidden_size=120, num_hidden_layers=2, num_attention_heads=3)
    )
    linear = {name: p for name, p in model.named_parameters() if "lrpe" not in name}
    for name, parameter in linear.items():
        assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name
        assert not name.endswith("bias"), name
    (angle,) = (p for name, p in model.named_parameters() if "lrpe" in name)
    torch.testing.assert_close(angle, 10_000 ** (-2 * torch.arange(120.0).view(3, 40) / 120))
    assert angle.requires_grad


@pytest.mark.parametrize("options", [{}, {"lrpe": "all", "decay": None}])
def test_generates_with_its_cache_what_it_does_without(options):
    model = build(**options)
    with_cache = model.generate(ids(), **GREEDY)
    assert with_cache.shape == (2, 17)
    assert torch.equal(with_cache, model.generate(ids(), **GREEDY, use_cache=False))
    assert len(set(with_cache[0, 9:].tolist())) > 1


def test_generates_with_beams_and_samples(model):
    options = {**GREEDY, "num_beams": 3, "num_return_sequences": 2}
    with_cache = model.generate(ids(), **options)
    assert torch.equal(with_cache, model.generate(ids(), **options, use_cache=False))
    torch.manual_seed(0)
    sampled = model.generate(ids(), **{**GREEDY, "do_sample": True}, num_return_sequences=3)
    assert sampled.shape == (6, 17)
    assert not torch.equal(sampled[0], sampled[1])


def test_padding_on_the_left_makes_no_difference(model):
    padded = torch.cat([torch.zeros(2, 4, dtype=torch.long), ids()], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :4] = 0
    found = model(padded, attention_mask=mask).logits[:, 4:]
    torch.testing.assert_close(found, model(ids()).logits)
    expected = model.generate(ids(), **GREEDY)[:, 9:]
    assert torch.equal(model.generate(padded, attention_mask=mask, **GREEDY)[:, 13:], expected)


def test_the_cache_does_not_grow(model):
    def size(cache):
        return [layer.own.memory.numel() for layer in cache.layers]

    with torch.no_grad():
        first = model(ids(1, 3), use_cache=True)
        short = size(first.cache)
        model(ids(1, 300), cache=first.cache)
    assert size(first.cache) == short
    assert short == [24 * 16, 24 * 8, 24 * 8], "twice the features where positions turn them"
    assert first.cache.get_seq_length() == 303
    assert first.cache.layers[0].own.memory.dtype == torch.float32


def test_goes_on_from_a_cache(model):
    tokens = ids()
    whole = model(tokens).logits
    first = model(tokens[:, :5], use_cache=True)
    rest = model(tokens[:, 5:], cache=first.cache, logits_to_keep=2)
    torch.testing.assert_close(rest.logits, whole[:, -2:])
    older = model(tokens[:, :5], use_cache=True).cache
    torch.testing.assert_close(model(tokens[:, 5:], past_key_values=older).logits, whole[:, 5:])


def test_saves_and_loads(model, tmp_path):
    with torch.no_grad():
        model.model.layers[0].attention.lrpe.angle.mul_(1.5)
    expected = model(ids()).logits
    model.save_pretrained(tmp_path)
    for load in (TransNormerForCausalLM, transformers.AutoModelForCausalLM):
        loaded = load.from_pretrained(tmp_path)
        assert isinstance(loaded, TransNormerForCausalLM)
        torch.testing.assert_close(loaded.eval()(ids()).logits, expected, rtol=0, atol=0)
    loaded = transformers.AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, TransNormerConfig)
    assert {**loaded.to_dict(), "_name_or_path": ""} == model.config.to_dict()
    base = transformers.AutoModel.from_pretrained(tmp_path)
    assert isinstance(base, TransNormerModel)
    torch.testing.assert_close(base.eval()(ids()).last_hidden_state, model.model(ids()).last_hidden_state)


def test_in_16_bits_slopes_stay_in_32(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = TransNormerForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    cast = copy.deepcopy(model).to(torch.bfloat16)
    for each in (loaded, cast):
        for index, layer in enumerate(each.model.layers):
            assert layer.attention.project.weight.dtype == torch.bfloat16
            assert layer.attention.slopes.dtype == torch.float32
            torch.testing.assert_close(layer.attention.slopes, decay_slopes(3, index, 3))
    logits = cast(ids()).logits
    assert logits.dtype == torch.bfloat16
    error = (logits.float() - model(ids()).logits).abs().max() / model(ids()).logits.abs().max()
    assert error < 0.1


def test_ties_its_embeddings(tmp_path):
    model = build(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embedding.weight
    model.save_pretrained(tmp_path)
    loaded = TransNormerForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embedding.weight
    torch.testing.assert_close(loaded.eval()(ids()).logits, model(ids()).logits)
    model.resize_token_embeddings(50)
    assert model(ids()).logits.shape[-1] == 50


def test_learns_with_and_without_checkpointing():
    tokens = ids(4, 20)
    gradients = []
    for is_checkpointed in (False, True):
        model = build().train()
        if is_checkpointed:
            model.gradient_checkpointing_enable()
        model(tokens, labels=tokens).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(gradient.abs().max() > 0 for gradient in gradients[0].values())
    torch.testing.assert_close(gradients[0], gradients[1])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_compiles_to_one_graph(model):
    expected = model(ids(), use_cache=False).logits
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(ids(), use_cache=False).logits, expected)


def test_returns_hidden_states_and_tuples(model):
    outputs = model(ids(), output_hidden_states=True)
    assert len(outputs.hidden_states) == 4
    torch.testing.assert_close(outputs.hidden_states[0], model.model.embedding(ids()))
    torch.testing.assert_close(model.lm_head(outputs.hidden_states[-1]), outputs.logits)
    embedded = model(inputs_embeds=model.get_input_embeddings()(ids())).logits
    torch.testing.assert_close(embedded, outputs.logits)
    torch.testing.assert_close(model(ids(), return_dict=False)[0], outputs.logits)


def test_rejects_what_cannot_be(model):
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match=r"mask is boolean and \[2, 9\].*got torch.bool \[2, 4\]"):
        model(ids(), attention_mask=torch.ones(2, 4))
    with pytest.raises(ValueError, match="width must be a positive multiple of num_heads, got 24 and 5"):
        config(num_attention_heads=5)
    with pytest.raises(ValueError, match="got 'second' and 'alibi'"):
        config(lrpe="second")
    with pytest.raises(ValueError, match="are positive, got 40, 24, 0, 48"):
        config(num_hidden_layers=0)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        model.generate(ids(1), **GREEDY, assistant_model=build())


def test_names_the_extra_where_transformers_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "postern.attention.transnormer")
    with pytest.raises(MissingExtra, match=r"pip install 'postern\[transformers\]'"):
        importlib.import_module("postern.attention.transnormer")


def test_has_the_layers_that_the_paper_recommends(model):
    layers = [layer.attention for layer in model.model.layers]
    assert all(isinstance(layer, GatedLinearAttention) for layer in layers)
    assert [layer.lrpe is not None for layer in layers] == [True, False, False]
    assert layers[-1].slopes.max() < 1e-4 < 0.05 < layers[0].slopes.max(), "the last layer hardly forgets"
