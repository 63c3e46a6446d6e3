"""Decoding over split keys by name in models of Transformers, against their own "sdpa"."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch

from postern.attention import UnifiedMax, calibrate_unified_max, register_split_decoding

transformers = pytest.importorskip("transformers")
NAME = "postern/split_decoding"
SMALL = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}


@pytest.fixture(autouse=True)
def _registered():
    register_split_decoding()


def llama(**options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=2, **options)
    return transformers.LlamaForCausalLM(config).eval()


def text():
    """Token ids, the first sequence padded on the left."""
    ids = torch.randint(3, 40, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generated(model, **options):
    found = model.generate(
        **text(),
        max_new_tokens=8,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    return found.sequences, torch.stack(found.logits) if found.logits is not None else None


@pytest.mark.parametrize(
    "settings",
    [None, {"phi": 0.5, "num_splits": 3}, dataclasses.asdict(UnifiedMax(900.0)), {"num_splits": 2}],
    ids=["synchronised", "unified", "always recomputed", "chunks"],
)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}], ids=str)
def test_generates_what_sdpa_generates(settings, options):
    chosen = {} if settings is None else {"split_decoding": settings}
    expected, expected_logits = generated(llama(attn_implementation="sdpa"), **options)
    found, logits = generated(llama(attn_implementation=NAME, **chosen), **options)
    assert torch.equal(found, expected)
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-4)


def test_opt_and_settings_of_the_registration():
    torch.manual_seed(0)
    config = {key: value for key, value in SMALL.items() if key not in ("intermediate_size", "initializer_range")}
    model = transformers.OPTForCausalLM(
        transformers.OPTConfig(**config, ffn_dim=32, word_embed_proj_dim=32, attn_implementation="sdpa")
    ).eval()
    expected, _ = generated(model)
    register_split_decoding("mine", unified=UnifiedMax(0.0), num_splits=2)
    model.set_attn_implementation("mine")
    assert torch.equal(generated(model)[0], expected)


def test_a_calibrated_constant_is_saved_with_the_model(tmp_path):
    model = llama(attn_implementation=NAME)
    expected, _ = generated(model)
    model.config.split_decoding = dataclasses.asdict(calibrate_unified_max(model, [text()], coverage=1.0))
    model.save_pretrained(tmp_path)
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation=NAME).eval()
    assert loaded.config.split_decoding == model.config.split_decoding
    assert torch.equal(generated(loaded)[0], expected)


def test_trains_with_dropout_as_sdpa_does():
    for length in (7, 1):
        losses = []
        for name in ("sdpa", NAME):
            model = llama(attn_implementation=name, attention_dropout=0.5).train()
            torch.manual_seed(1)
            logits = model(input_ids=text()["input_ids"][:, :length]).logits
            logits.square().mean().backward()
            losses.append((logits.detach(), model.lm_head.weight.grad))
        torch.testing.assert_close(losses[0], losses[1])


def test_a_step_compiles():
    model = llama(attn_implementation=NAME, split_decoding={"phi": 0.5})
    ids = text()["input_ids"]
    with torch.no_grad():
        expected = model(ids).logits[:, -1:]
        cache = transformers.StaticCache(config=model.config, max_cache_len=16)
        model(ids[:, :6], past_key_values=cache, use_cache=True)
        step = torch.compile(model, fullgraph=True, backend="aot_eager")
        found = step(ids[:, 6:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def decode_with(settings):
    llama(attn_implementation=NAME, split_decoding=settings)(torch.ones(1, 1, dtype=torch.long))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: register_split_decoding(num_splits=0), "at least 1, got 0"),
        (lambda: register_split_decoding(""), "an empty one"),
        (lambda: decode_with(3), "a mapping with phi.*got 3"),
        (lambda: decode_with({"psi": 3}), "got {'psi': 3}"),
        (lambda: decode_with({"phi": 0.0, "a": 2.0, "b": 1.0}), "a lies below b"),
        (lambda: decode_with({"num_splits": 0}), "at least 1, got 0"),
    ],
)
def test_rejects_impossible_settings(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_rejects_models_that_change_their_logits():
    config = transformers.Gemma2Config(**SMALL, head_dim=8, num_key_value_heads=2, attn_implementation=NAME)
    with pytest.raises(ValueError, match="Gemma2Attention caps its logits"):
        transformers.Gemma2ForCausalLM(config)(torch.ones(1, 1, dtype=torch.long))


def test_names_the_extra_where_transformers_is_missing():
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "from postern.attention import register_split_decoding\n"
        "try:\n    register_split_decoding()\n"
        "except ImportError as error:\n    print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True)
    assert done.stdout.startswith("MissingExtra")
    assert "pip install 'postern[transformers]'" in done.stdout
