"""Clipped softmax by name, in models of Transformers that are built from a configuration."""

import copy
import os
import subprocess
import sys

import pytest
import torch

from postern.attention import elu_features, register_attention, register_clipped_softmax, register_linear_attention
from postern.softmax import clipped_softmax

transformers = pytest.importorskip("transformers")
NAME = "postern/clipped_softmax"
SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
}


def opt(**options):
    config = transformers.OPTConfig(**SMALL, ffn_dim=32, word_embed_proj_dim=16, init_std=0.3, dropout=0.0, **options)
    return build(transformers.OPTForCausalLM, config)


def bert(**options):
    config = transformers.BertConfig(
        **SMALL, intermediate_size=32, initializer_range=0.3, attention_probs_dropout_prob=0.0, **options
    )
    return build(transformers.BertForMaskedLM, config)


def llama(**options):
    config = transformers.LlamaConfig(
        **SMALL, intermediate_size=32, initializer_range=0.3, num_key_value_heads=1, **options
    )
    return build(transformers.LlamaForCausalLM, config)


def vit(**options):
    config = transformers.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=8,
        patch_size=2,
        num_channels=1,
        initializer_range=0.3,
        **options,
    )
    return build(transformers.ViTForImageClassification, config)


def build(model, config):
    torch.manual_seed(0)
    return model(config).eval()


def text():
    """Token ids, and a mask that pads the first sequence on the left and the second on the right."""
    ids = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3], mask[1, 6:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def image():
    return {"pixel_values": torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))}


MODELS = {"opt": (opt, text), "bert": (bert, text), "llama": (llama, text), "vit": (vit, image)}


@pytest.fixture(autouse=True)
def _registered():
    register_clipped_softmax()


@pytest.fixture(params=MODELS.values(), ids=MODELS.keys())
def model_and_inputs(request):
    make, inputs = request.param
    return make, inputs()


def real_tokens(model, inputs):
    logits = model(**inputs).logits
    return logits[inputs["attention_mask"].bool()] if "attention_mask" in inputs else logits


def test_is_softmax_when_nothing_is_stretched(model_and_inputs):
    make, inputs = model_and_inputs
    ours = make(attn_implementation=NAME, clipped_softmax={"gamma": 0.0, "zeta": 1.0})
    eager = make(attn_implementation="eager")
    found, expected = real_tokens(ours, inputs), real_tokens(eager, inputs)
    torch.testing.assert_close(found, expected)
    found.square().mean().backward()
    expected.square().mean().backward()
    for (name, parameter), other in zip(ours.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad, other.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_clips_in_every_layer(model_and_inputs):
    make, inputs = model_and_inputs
    eager = make(attn_implementation="eager")
    ours = make(attn_implementation=NAME, clipped_softmax={"gamma": -0.1, "zeta": 1.1})
    kept = eager(**inputs, output_attentions=True).attentions
    clipped = ours(**inputs, output_attentions=True).attentions
    assert len(clipped) == 2
    rows = slice(None)
    if "attention_mask" in inputs:
        rows = inputs["attention_mask"].bool()
    # the first layer sees the same input in both models
    expected = (kept[0] * 1.2 - 0.1).clamp(0, 1).transpose(1, 2)[rows]
    torch.testing.assert_close(clipped[0].transpose(1, 2)[rows], expected)
    assert (clipped[1] == 0).float().mean() > (kept[1] == 0).float().mean() + 0.1


def test_padding_changes_nothing():
    inputs = text()
    for make in (opt, bert, llama):
        model = make(attn_implementation=NAME, clipped_softmax={"gamma": -0.05})
        alone = model(input_ids=inputs["input_ids"][1:, :6], attention_mask=torch.ones(1, 6)).logits
        torch.testing.assert_close(model(**inputs).logits[1, :6], alone[0])


@pytest.mark.parametrize("make", [opt, llama])
def test_decoding_with_a_cache_equals_the_whole(make):
    model = make(attn_implementation=NAME, clipped_softmax={"alpha": 1.0})
    ids = text()["input_ids"]
    whole = model(ids).logits
    first = model(ids[:, :5], use_cache=True)
    rest = model(ids[:, 5:], past_key_values=first.past_key_values, use_cache=True).logits
    torch.testing.assert_close(torch.cat([first.logits, rest], dim=1), whole)


def test_the_name_may_be_set_on_the_configuration_or_later():
    config = transformers.BertConfig(**SMALL, intermediate_size=32)
    config._attn_implementation = NAME
    config.clipped_softmax = {"gamma": -0.2}
    early = build(transformers.BertModel, config)
    late = build(transformers.BertModel, transformers.BertConfig(**SMALL, intermediate_size=32))
    late.set_attn_implementation(NAME)
    late.config.clipped_softmax = {"gamma": -0.2}
    plain = build(transformers.BertModel, transformers.BertConfig(**SMALL, intermediate_size=32))
    inputs = text()
    torch.testing.assert_close(early(**inputs).last_hidden_state, late(**inputs).last_hidden_state)
    assert (early(**inputs).last_hidden_state - plain(**inputs).last_hidden_state).abs().max() > 1e-3


def test_settings_come_from_the_configuration_then_from_the_registration():
    inputs = text()
    with torch.no_grad():
        explicit = opt(attn_implementation=NAME, clipped_softmax={"gamma": -2.0 / 16})(**inputs).logits
        by_alpha = opt(attn_implementation=NAME, clipped_softmax={"alpha": 2.0})(**inputs).logits
        by_length = opt(attn_implementation=NAME, clipped_softmax={"alpha": 4.0, "length": 32})(**inputs).logits
        paper = opt(attn_implementation=NAME)(**inputs).logits
        register_clipped_softmax(alpha=2.0)
        registered = opt(attn_implementation=NAME)(**inputs).logits
        register_clipped_softmax("mine", gamma=-0.03)
        named = opt(attn_implementation="mine")(**inputs).logits
    torch.testing.assert_close(by_alpha, explicit)
    torch.testing.assert_close(by_length, explicit)
    torch.testing.assert_close(registered, explicit)
    torch.testing.assert_close(named, paper)
    assert (paper - explicit).abs().max() > 1e-3


def test_dropout_acts_on_clipped_weights_in_training_alone():
    inputs = text()
    model = opt(attn_implementation=NAME, attention_dropout=0.9)
    torch.testing.assert_close(model(**inputs).logits, model(**inputs).logits, rtol=0, atol=0)
    model.train()
    assert (model(**inputs).logits - model(**inputs).logits).abs().max() > 1e-3


def test_survives_copying_saving_and_compiling(tmp_path):
    inputs = text()
    model = opt(attn_implementation=NAME, clipped_softmax={"alpha": 1.0})
    expected = model(**inputs).logits
    torch.testing.assert_close(copy.deepcopy(model)(**inputs).logits, expected)
    model.save_pretrained(tmp_path)
    loaded = transformers.OPTForCausalLM.from_pretrained(tmp_path, attn_implementation=NAME).eval()
    assert loaded.config.clipped_softmax == {"alpha": 1.0}
    torch.testing.assert_close(loaded(**inputs).logits, expected)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs).logits, expected)


def test_a_trained_layer_learns_through_it():
    model = bert(attn_implementation=NAME, clipped_softmax={"gamma": -0.02}).train()
    inputs = text()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_other_names_are_still_looked_for_on_the_hub():
    from transformers.modeling_utils import is_kernel

    assert not is_kernel(NAME)
    assert is_kernel("kernels-community/flash-attn2")
    with pytest.raises((ImportError, ValueError)):
        opt(attn_implementation="postern/not_registered")


def test_other_attention_functions_register_as_well():
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    register_attention("postern/sdpa-again", sdpa_attention_forward)
    inputs = text()
    found = real_tokens(opt(attn_implementation="postern/sdpa-again"), inputs)
    torch.testing.assert_close(found, real_tokens(opt(attn_implementation="sdpa"), inputs))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: register_clipped_softmax(gamma=0.1), "gamma must be at most 0, got 0.1"),
        (lambda: register_clipped_softmax(alpha=1.0, gamma=-0.1), "exclude each other"),
        (lambda: register_attention("", clipped_softmax), "an empty one"),
        (lambda: opt(attn_implementation=NAME, clipped_softmax=0.1)(**text()), "a mapping with alpha.*got 0.1"),
        (lambda: opt(attn_implementation=NAME, clipped_softmax={"gama": -0.1})(**text()), "got {'gama': -0.1}"),
        (lambda: opt(attn_implementation=NAME, clipped_softmax={"zeta": 0.5})(**text()), "zeta must be at least 1"),
    ],
)
def test_rejects_impossible_settings(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_rejects_models_with_a_softmax_of_their_own():
    config = transformers.Gemma2Config(
        **SMALL, intermediate_size=32, head_dim=8, num_key_value_heads=1, attn_implementation=NAME
    )
    with pytest.raises(ValueError, match="Gemma2Attention caps its logits"):
        build(transformers.Gemma2ForCausalLM, config)(**text())


def test_names_the_extra_where_transformers_is_missing():
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "from postern.attention import SelfAttention, register_clipped_softmax\n"
        "SelfAttention(8, 2)\n"
        "try:\n    register_clipped_softmax()\n"
        "except ImportError as error:\n    print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    assert done.stdout.startswith("MissingExtra")
    assert "pip install 'postern[transformers]'" in done.stdout


LINEAR = "postern/linear_attention"


def test_linear_attention_is_that_of_its_definition(model_and_inputs):
    """The same as attention whose weights are the normalised products of the features."""

    def products(query, key, value, allowed):
        weights = (elu_features(query) @ elu_features(key).mT) * allowed
        return (weights @ value) / (weights.sum(-1, keepdim=True) + 1e-6)

    def quadratic(module, query, key, value, attention_mask, **_):
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        allowed = 1 if attention_mask is None else (attention_mask > -1).to(query)
        return products(query, key, value, allowed).transpose(1, 2), None

    make, inputs = model_and_inputs
    register_linear_attention()
    register_attention("postern/quadratic", quadratic)
    found = real_tokens(make(attn_implementation=LINEAR), inputs)
    torch.testing.assert_close(found, real_tokens(make(attn_implementation="postern/quadratic"), inputs))


@pytest.mark.parametrize("make", [opt, llama])
def test_linear_attention_decodes_with_the_models_cache(make):
    register_linear_attention()
    model, inputs = make(attn_implementation=LINEAR), text()
    inputs["attention_mask"][1] = 1  # padded on the left alone
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(**inputs, **options, use_cache=True)
    assert torch.equal(cached, model.generate(**inputs, **options, use_cache=False))


def test_linear_attention_has_no_weights_to_drop():
    register_linear_attention()
    model = llama(attn_implementation=LINEAR, attention_dropout=0.5).train()
    with pytest.raises(ValueError, match="no weights to be dropped"):
        model(**text())
