"""Layers of postern in models of Transformers that are built from a configuration."""

from functools import partial

import pytest
import torch

from postern.attention import FittedAttention, LinearAttention, SelfAttention, fit_attention
from tests.attention.layers import LAYERS, WIDTH
from tests.attention.test_hugging_face import bert, build, transformers

SIZES = {"vocab_size": 40, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 3}
CAUSAL = [name for name, layer in LAYERS.items() if True in layer.directions]


def opt():
    config = transformers.OPTConfig(
        **SIZES, ffn_dim=32, word_embed_proj_dim=WIDTH, init_std=0.3, dropout=0.0, max_position_embeddings=32
    )
    return build(transformers.OPTForCausalLM, config)


def llama():
    config = transformers.LlamaConfig(**SIZES, intermediate_size=32, initializer_range=0.3, num_key_value_heads=1)
    return build(transformers.LlamaForCausalLM, config)


MODELS = {"opt": opt, "llama": llama}


@pytest.fixture(params=MODELS.values(), ids=MODELS.keys())
def model(request):
    return request.param()


def ids(batch=2, length=9):
    return torch.randint(3, 40, (batch, length), generator=torch.Generator().manual_seed(1))


def test_the_models_own_attention_can_be_rebuilt():
    """Llama with layers that are its own: grouped heads and rotations."""
    model = llama()
    own = model(ids()).logits
    old = {name: module for name, module in model.named_modules() if name.endswith("self_attn")}
    fitted = fit_attention(
        model, lambda _: SelfAttention(WIDTH, 3, num_kv_heads=1, is_causal=True, bias=False, rotary_base=10_000.0)
    )
    assert list(fitted) == list(old)
    for name, module in fitted.items():
        for ours, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj"), ("output", "o_proj")):
            getattr(module.attention, ours).load_state_dict(getattr(old[name], theirs).state_dict())
    torch.testing.assert_close(model(ids()).logits, own)


@pytest.mark.parametrize("name", CAUSAL)
def test_generates_with_its_cache_what_it_does_without(model, name):
    torch.manual_seed(0)
    fitted = fit_attention(model, lambda _: LAYERS[name].build(is_causal=True))
    assert all(isinstance(each, FittedAttention) for each in fitted.values())
    model.eval()
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with_cache = model.generate(ids(), **options, use_cache=True)
    assert with_cache.shape == (2, 15)
    assert torch.equal(with_cache, model.generate(ids(), **options, use_cache=False))


def test_padding_on_the_left_makes_no_difference(model):
    torch.manual_seed(0)
    fit_attention(model, lambda _: LinearAttention(WIDTH, 3, is_causal=True, rotary_base=10_000.0))
    tokens = ids(1)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), tokens], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :3] = 0
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(tokens, **options)[:, 9:]
    assert torch.equal(model.generate(padded, attention_mask=mask, **options)[:, 12:], expected)


@pytest.mark.parametrize("make", [SelfAttention, LinearAttention])
def test_generates_with_beams(model, make):
    torch.manual_seed(0)
    fit_attention(model, lambda _: make(WIDTH, 3, is_causal=True))
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    with_cache = model.generate(ids(), **options, use_cache=True)
    assert torch.equal(with_cache, model.generate(ids(), **options, use_cache=False))


def test_trains_and_loads(model):
    torch.manual_seed(0)
    make = partial(LinearAttention, WIDTH, 3, is_causal=True)
    fitted = fit_attention(model, lambda _: make())
    model(input_ids=ids(), labels=ids()).loss.backward()
    for module in fitted.values():
        assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in module.parameters())
    other = type(model)(model.config)
    fit_attention(other, lambda _: make())
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other.eval()(ids()).logits, model.eval()(ids()).logits)


def test_rejects_what_cannot_be_fitted():
    with pytest.raises(ValueError, match="BertForMaskedLM has no attention layers called self_attn"):
        fit_attention(bert(), lambda _: SelfAttention(16, 2, is_causal=True))
    with pytest.raises(ValueError, match="causal attention of width 24, got SelfAttention with width=8"):
        fit_attention(llama(), lambda _: SelfAttention(8, 2, is_causal=True))
    with pytest.raises(ValueError, match="width=24, is_causal=False"):
        fit_attention(llama(), lambda _: SelfAttention(WIDTH, 2))
    with pytest.raises(ValueError, match="got Linear with width=None"):
        fit_attention(llama(), lambda _: torch.nn.Linear(WIDTH, WIDTH))
    model = llama()
    with pytest.raises(ValueError, match="got Linear"):
        fit_attention(model, lambda index: torch.nn.Linear(2, 2) if index else SelfAttention(WIDTH, 3, is_causal=True))
    assert not any(isinstance(module, FittedAttention) for module in model.modules())


def test_a_cache_of_another_layer_is_refused():
    model = llama()
    cache = model(ids(), use_cache=True).past_key_values
    fit_attention(model, lambda _: SelfAttention(WIDTH, 3, is_causal=True))
    with pytest.raises(ValueError, match="made by another attention layer"):
        model(ids(2, 1), past_key_values=cache)
