"""The recurrence that overflows, the arms of the experiments, and where curves of time cross."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from postern.attention import GatedLinearAttention, SelfAttention, SimpleRMSNorm, lightning_attention
from postern.claims import Run
from postern.papers import transnormer as paper


@pytest.fixture(scope="module")
def features():
    return paper._features(400, 3, 16, Run(seed=0, scale="smoke"))


def test_the_original_recurrence_breaks_where_theory_says_and_the_robust_one_does_not(features):
    slopes = torch.tensor([0.5, 1 / 16, 1 / 256])
    single = [x.float() for x in features]
    assert math.log(torch.finfo(torch.float32).max) / 0.5 == pytest.approx(177.4, abs=0.1)
    first, *others = paper._original_failures(single, slopes)
    assert abs(first - 177) <= 3
    assert others == [None, None]
    half, sixteenth, last = paper._original_failures([x.half() for x in features], slopes.half())
    assert 15 <= half <= 22
    assert 130 <= sixteenth <= 177
    assert last is None
    robust, _ = lightning_attention(*single, slopes, implementation="recurrent")
    exact, _ = lightning_attention(*features, slopes.double(), implementation="naive")
    assert torch.isfinite(robust).all()
    assert (robust - exact).norm() / exact.norm() < 1e-5


def test_until_it_breaks_the_original_recurrence_is_the_same(features):
    """Its first failure is of the numbers, not of the formula."""
    assert paper._original_failures(features, torch.tensor([0.5, 1 / 16, 1 / 256]).double()) == [None, None, None]
    query, key, value = (x[:, :, :100] for x in features)
    slopes = torch.tensor([0.5, 1 / 16, 1 / 256], dtype=torch.float64)
    steps = torch.arange(100, dtype=torch.float64)
    growth = torch.exp(slopes[:, None] * steps)[..., None]
    state = (key * growth)[..., None] * value[..., None, :]
    original = ((query / growth)[..., None, :] @ state.cumsum(2))[..., 0, :]
    torch.testing.assert_close(original, lightning_attention(query, key, value, slopes)[0])


def test_the_exact_outputs_in_strips(features):
    slopes = torch.tensor([0.5, 1 / 16, 0.0], dtype=torch.float64)
    found = paper._exact(*features, slopes, Run(seed=0, scale="smoke"), rows=70)
    torch.testing.assert_close(found, lightning_attention(*features, slopes, implementation="naive")[0])


def test_a_state_in_16_bits_is_what_the_robust_recurrence_must_not_have(features):
    slopes = torch.tensor([0.5, 1 / 16, 1 / 256], dtype=torch.float64)
    exact = paper._exact(*features, slopes, Run(seed=0, scale="smoke"))
    torch.testing.assert_close(paper._robust_with_state_in(torch.float64, *features, slopes), exact)
    lower = paper._robust_with_state_in(torch.bfloat16, *features, slopes)
    assert paper._relative(lower[:, 2], exact[:, 2]) > 0.05


@pytest.mark.parametrize("width", [16, 64, 96, 1024])
def test_llamas_layers_have_as_many_parameters(width):
    config = paper.replace(paper.SMOKE, width=width, layers=1, heads=2)
    with torch.device("meta"):
        sizes = {
            arm: sum(p.numel() for p in paper.build_model(arm, config, 60).parameters()) - 60 * width
            for arm in paper.ARMS
        }
    assert sizes["llama"] == pytest.approx(sizes["transnormer"], rel=0.02)
    assert sizes["swiglu"] == sizes["transnormer"]
    assert sizes["no_gate"] == sizes["transnormer"] - width**2
    assert sizes["rms_norm"] == sizes["transnormer"] + 4 * width
    assert sizes["learned_positions"] == sizes["transnormer"] + (config.context - 1) * width


def test_arms_are_what_they_are_called():
    models = {arm: paper.build_model(arm, paper.SMOKE, 60) for arm in paper.ARMS}
    turned = {
        arm: [getattr(layer.attention, "lrpe", None) is not None for layer in model.layers]
        for arm, model in models.items()
    }
    fading = {
        arm: all((layer.attention.slopes > 0).all() for layer in model.layers)
        for arm, model in models.items()
        if arm != "llama"
    }
    assert turned["transnormer"] == [True, False]
    assert turned["no_decay"] == [True, True]
    assert turned["learned_positions"] == [False, False]
    assert not fading.pop("no_decay")
    assert not fading.pop("learned_positions")
    assert all(fading.values())
    assert [arm for arm, model in models.items() if model.position is not None] == ["learned_positions"]
    for arm, model in models.items():
        first = model.layers[0]
        norms = [module for module in model.modules() if isinstance(module, SimpleRMSNorm | nn.RMSNorm)]
        expected = nn.RMSNorm if arm in ("llama", "rms_norm") else SimpleRMSNorm
        assert all(isinstance(norm, expected) for norm in norms)
        assert len(norms) == 2 * 2 + 1 + (0 if arm == "llama" else 2)
        assert isinstance(first.attention, SelfAttention if arm == "llama" else GatedLinearAttention)
        assert first.feedforward.activation is (F.silu if arm in ("llama", "swiglu") else None)
        if arm == "llama":
            assert first.attention.rotary_base == 10_000
        else:
            assert first.attention.is_gated is (arm != "no_gate")


def test_crossings_are_interpolated_on_logarithmic_axes():
    lengths = (512, 1024, 2048)
    linear = {n: 3.0 * n for n in (*lengths, 4096)}
    assert paper.crossover(linear, {n: n**2 / 500 for n in lengths}) == pytest.approx(1500)
    assert paper.crossover(linear, {n: n**2 / 1000 for n in lengths}) == pytest.approx(3000)
    assert paper.crossover(linear, {n: 9.0 * n for n in lengths}) == 512
    assert paper.crossover(linear, {n: 2.0 * n for n in lengths}) == 1e9


def test_decoders_continue_their_texts():
    torch.manual_seed(0)
    config, run = paper.LayerTimes(16, 2), Run(seed=0, scale="smoke")
    x = torch.randn(1, 9, 16)
    for layer, decoder in zip(paper._layers(config, run), (paper._gated_decoder, paper._softmax_decoder), strict=True):
        with torch.no_grad():
            decode = decoder(layer, x)
            for _ in range(2):  # each call decodes the same token
                torch.testing.assert_close(decode(), layer(x)[:, -1:])


def test_what_autograd_keeps_is_counted_once():
    x = torch.randn(1000, requires_grad=True)
    assert paper._kept(lambda: x * x) == 4000
    assert paper._kept(lambda: x.exp().exp()) == 8000
