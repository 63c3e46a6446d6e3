"""The range of a model's logits: quantiles of the histogram against sorted logits, and models that are watched."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from postern.attention import (
    ClippedSoftmaxAttention,
    SelfAttention,
    SplitDecodingAttention,
    UnifiedMaxCalibrator,
    attention_logits,
    calibrate_unified_max,
)


@given(
    scale=st.floats(1e-3, 1e4),
    shift=st.floats(-100, 100),
    coverage=st.sampled_from([0.5, 0.9, 0.99, 1.0]),
    parts=st.integers(1, 4),
)
def test_the_range_holds_what_was_asked_and_little_more(scale, shift, coverage, parts):
    x = shift + scale * torch.randn(2000, generator=torch.Generator().manual_seed(parts))
    calibrator = UnifiedMaxCalibrator()
    # smallest first, so that the histogram has to grow
    for part in x[x.abs().argsort()].chunk(parts):
        calibrator.update(part)
    unified = calibrator.finalize(coverage)
    low, high = unified.phi + unified.a, unified.phi + unified.b
    inside = ((x > low) & (x < high)).double().mean().item()
    assert inside >= coverage
    resolution = 4 / 8192 * max(4.0, x.abs().max().item())
    left_out = int((1 - coverage) / 2 * 2000)
    ordered = x.sort().values
    assert low >= ordered[left_out].item() - 2 * resolution - 1e-6
    assert high <= ordered[-1 - left_out].item() + 2 * resolution + 1e-6
    assert (calibrator.low, calibrator.high, calibrator.count) == (ordered[0].item(), ordered[-1].item(), 2000)
    assert unified.a == pytest.approx(-unified.b)


def test_wide_ranges_are_disabled():
    # the published ranges of Llama2-7B and of OPT-6.7B
    for low, high, enabled in ((-16.8, 6.5, True), (-496.8, 363.5, False)):
        calibrator = UnifiedMaxCalibrator()
        calibrator.update(torch.tensor([low, high]))
        unified = calibrator.finalize(1.0)
        assert unified.enabled is enabled
        assert unified.phi == pytest.approx((low + high) / 2, abs=0.3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_masked_entries_do_not_count(dtype):
    calibrator = UnifiedMaxCalibrator()
    lowest = torch.finfo(dtype).min
    calibrator.update(torch.tensor([[1.0, -math.inf], [lowest, 2.0]], dtype=dtype))
    calibrator.update(torch.full((3,), -math.inf, dtype=dtype))
    assert (calibrator.low, calibrator.high, calibrator.count) == (1.0, 2.0, 2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: UnifiedMaxCalibrator(6), "multiple of 4, got 6"),
        (lambda: UnifiedMaxCalibrator().update(torch.tensor([1.0, math.nan])), "finite.*nan"),
        (lambda: UnifiedMaxCalibrator().update(torch.tensor([1.0, math.inf])), "finite.*inf"),
        (lambda: UnifiedMaxCalibrator().update(torch.tensor([1])), r"floating-point, got torch\.int64"),
        (lambda: UnifiedMaxCalibrator().finalize(), "needs logits"),
        (lambda: UnifiedMaxCalibrator().finalize(0.0), r"\(0, 1\], got 0.0"),
        (lambda: calibrate_unified_max(nn.Linear(2, 2), [torch.zeros(1, 2)]), "Linear has no SelfAttention layers"),
        (lambda: calibrate_unified_max(SelfAttention(8, 2), []), "needs logits"),
        (
            lambda: calibrate_unified_max(ClippedSoftmaxAttention(8, 2, alpha=1.0, length=4), []),
            "has no SelfAttention layers with softmax",
        ),
    ],
)
def test_rejects_impossible_calibrations(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("kind", [SelfAttention, SplitDecodingAttention])
def test_watches_the_layers_of_a_model_and_leaves_them_as_they_were(kind):
    torch.manual_seed(0)
    layer = kind(16, 4, num_kv_heads=2, is_causal=True, rotary_base=100.0, dropout=0.5)
    model = nn.Sequential(layer)
    x = 5 * torch.randn(2, 6, 16)
    before = model.eval()(x)
    model.train()
    unified = calibrate_unified_max(model, [x[:1], x[1:]], coverage=1.0)
    assert model.training
    torch.testing.assert_close(model.eval()(x), before, rtol=0, atol=0)
    query, key, _ = layer.project(x)
    logits = attention_logits(query, key.repeat_interleave(2, 1))
    seen = logits[torch.ones(6, 6, dtype=torch.bool).tril().expand_as(logits)]
    resolution = 4 / 8192 * max(4.0, seen.abs().max().item())
    assert unified.phi + unified.a == pytest.approx(seen.min().item(), abs=2 * resolution)
    assert unified.phi + unified.b == pytest.approx(seen.max().item(), abs=2 * resolution)


def test_watches_a_model_of_transformers():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.5,
        attn_implementation="sdpa",
    )
    model = transformers.LlamaForCausalLM(config)
    ids = torch.randint(30, (2, 8))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    before = model.eval()(ids, attention_mask=mask).logits
    unified = calibrate_unified_max(model, [{"input_ids": ids, "attention_mask": mask}], coverage=1.0)
    assert model.config._attn_implementation == "sdpa"
    torch.testing.assert_close(model(ids, attention_mask=mask).logits, before, rtol=0, atol=0)
    # Logits of the first layer, from Llama's own parts.
    rotary = model.model.rotary_emb(model.model.embed_tokens(ids), torch.arange(8)[None])
    layer = model.model.layers[0]
    hidden = layer.input_layernorm(model.model.embed_tokens(ids[1:]))
    query, key = (
        projection(hidden).view(1, 8, -1, 8).transpose(1, 2)
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj)
    )
    query, key = transformers.models.llama.modeling_llama.apply_rotary_pos_emb(query, key, *rotary)
    logits = attention_logits(query, key)[torch.ones(1, 2, 8, 8, dtype=torch.bool).tril()]
    assert unified.phi + unified.a < logits.min().item()
    assert unified.phi + unified.b > logits.max().item()
    assert unified.b - unified.a < 20 * (logits.max() - logits.min()).item()
