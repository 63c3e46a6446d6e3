"""Simulated quantisation against the same network rounded by hand."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from postern.attention import ClippedSoftmaxAttention, PerHeadGatedAttention, SelfAttention
from postern.quantize import (
    asymmetric_grid,
    fake_quantize,
    min_max_weight_grid,
    mse_weight_grid,
    simulate_quantization,
)
from tests.modules import check_module

WIDTH = 8


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + F.relu(self.linear(self.norm(x)))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def rounded(x, bits, reference=None):
    reference = x if reference is None else reference
    return fake_quantize(x, asymmetric_grid(reference.min(), reference.max(), bits))


@pytest.mark.parametrize("bits", [4, 8])
def test_rounds_weights_norms_products_activations_and_residuals(bits):
    block, x = Block(), torch.randn(5, WIDTH)
    quantized = simulate_quantization(block, [x], weight_bits=bits, activation_bits=bits)
    with torch.no_grad():
        weight, gain = (
            fake_quantize(w, min_max_weight_grid(w, bits)) for w in (block.linear.weight, block.norm.weight)
        )
        # ranges come from activations that are not rounded, behind rounded weights
        norm = F.layer_norm(x, (WIDTH,), gain, block.norm.bias)
        product = F.linear(norm, weight, block.linear.bias)
        ranges = [norm, product, product.relu(), x + product.relu()]
        hidden = rounded(norm, bits)
        hidden = rounded(F.linear(hidden, weight, block.linear.bias), bits, ranges[1])
        hidden = rounded(hidden.relu(), bits, ranges[2])
        expected = rounded(x + hidden, bits, ranges[3])
        torch.testing.assert_close(quantized(x), expected)
    assert quantized.ranges == {
        name: pytest.approx((part.min().item(), part.max().item()))
        for name, part in zip(
            ["norm: layer_norm 1", "linear: linear 1", "the network: relu 1", "the network: add 1"], ranges, strict=True
        )
    }


def test_rounds_every_step_of_attention():
    layer = SelfAttention(WIDTH, 2, is_causal=True)
    x = torch.randn(2, 5, WIDTH)
    for normalise, name in ((None, "softmax"), (torch.softmax, "softmax")):
        layer.normalise = normalise
        quantized = simulate_quantization(layer, [x])
        assert list(quantized.ranges) == [
            "query: linear 1",
            "key: linear 1",
            "value: linear 1",
            "the network: matmul 1",
            f"the network: {name} 1",
            "the network: matmul 2",
            "output: linear 1",
        ]
    clipped = simulate_quantization(ClippedSoftmaxAttention(WIDTH, 2, alpha=1.0, length=8), [x])
    assert "the network: clipped_softmax 1" in clipped.ranges
    assert not any("softmax 1" in name and "clipped" not in name for name in clipped.ranges)
    gated = simulate_quantization(PerHeadGatedAttention(WIDTH, 2), [x])
    assert {"gate: einsum 1", "gate: add 1", "gate: sigmoid 1", "gate: mul 1"} <= gated.ranges.keys()


def test_fused_and_explicit_attention_are_rounded_alike():
    x = torch.randn(2, 6, WIDTH)
    padding = torch.ones(2, 6, dtype=torch.bool)
    padding[0, 4:] = False
    for is_causal in (False, True):
        for mask in (None, padding):
            layer = SelfAttention(WIDTH, 2, is_causal=is_causal)
            fused = simulate_quantization(layer, [(x, mask)], activation_bits=6)
            layer.normalise = torch.softmax
            explicit = simulate_quantization(layer, [(x, mask)], activation_bits=6)
            torch.testing.assert_close(fused(x, mask), explicit(x, mask))


def test_takes_fused_attention_apart_exactly():
    query = torch.randn(2, 4, 5, 8)
    key, value = torch.randn(2, 2, 2, 7, 8)
    arguments = [
        {"is_causal": True, "scale": 0.3, "enable_gqa": True},
        {"attn_mask": torch.rand(2, 1, 5, 7) > 0.3, "enable_gqa": True},
        {"attn_mask": torch.randn(5, 7), "enable_gqa": True},
    ]
    for options in arguments:

        class Attention(nn.Module):
            def forward(self, q, k, v, options=options):
                return F.scaled_dot_product_attention(q, k, v, **options)

        quantized = simulate_quantization(Attention(), [(query, key, value)], activation_bits=16)
        expected = F.scaled_dot_product_attention(query, key, value, **options)
        torch.testing.assert_close(quantized(query, key, value), expected, atol=2e-3, rtol=0)


def test_many_bits_change_little_and_few_bits_much():
    block, x = Block(), torch.randn(64, WIDTH)
    exact = block(x)
    quantized = simulate_quantization(block, [x], weight_bits=None, activation_bits=16)
    errors = {}
    for bits in (16, 8, 6, 4, 2):
        quantized.activation_bits = bits
        errors[bits] = (quantized(x) - exact).abs().mean().item()
    assert errors[16] < 1e-4
    assert sorted(errors.values()) == list(errors.values())
    quantized.activation_bits = None
    torch.testing.assert_close(quantized(x), exact)


def test_one_outlier_costs_the_others_their_resolution():
    block = Block()
    x = torch.randn(64, WIDTH)
    spoilt = x.clone()
    spoilt[0, 0] = 300.0
    clean = simulate_quantization(block, [x])
    coarse = simulate_quantization(block, [spoilt])
    error, spoilt_error = ((model(x) - block(x)).abs().mean() for model in (clean, coarse))
    assert spoilt_error > 10 * error
    trimmed = simulate_quantization(block, [spoilt], percentile=99.0)
    assert (trimmed(x[1:]) - block(x[1:])).abs().mean() < 0.3 * (coarse(x[1:]) - block(x[1:])).abs().mean()


def test_leaves_the_network_as_it_was():
    block, x = Block().train(), torch.randn(4, WIDTH)
    before = copy.deepcopy(block.state_dict())
    expected = block(x)
    simulate_quantization(block, [x], weight_bits=2)
    assert block.training
    assert not block._forward_hooks
    torch.testing.assert_close(block(x), expected)
    for name, value in before.items():
        assert torch.equal(block.state_dict()[name], value)


def test_the_best_weight_grid_is_chosen():
    linear = nn.Linear(50, 50)
    with torch.no_grad():
        linear.weight[0, 0] = 3.0
    x = torch.randn(9, 50)
    for name, grid in (("min-max", min_max_weight_grid), ("mse", mse_weight_grid)):
        quantized = simulate_quantization(linear, [x], weight_bits=4, weight_range=name)
        torch.testing.assert_close(quantized.model.weight, fake_quantize(linear.weight, grid(linear.weight, 4)))
        assert torch.equal(quantized.model.bias, linear.bias)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, WIDTH)
        self.block = Block()
        self.head = nn.Linear(WIDTH, 20, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.block(self.embedding(tokens)))


def test_skipped_modules_keep_their_precision():
    model, tokens = Tied(), torch.randint(0, 20, (3, 7))
    quantized = simulate_quantization(model, [tokens], weight_bits=3, activation_bits=3, skip=["head"])
    assert torch.equal(quantized.model.head.weight, model.embedding.weight)
    assert len(quantized.model.embedding.weight.unique()) <= 8
    assert not any(name.startswith("head") for name in quantized.ranges)
    assert len(quantized(tokens).unique()) > 100
    tied = simulate_quantization(model, [tokens], weight_bits=3)
    assert tied.model.head.weight is tied.model.embedding.weight
    inner = simulate_quantization(model, [tokens], weight_bits=3, skip=["block"])
    assert torch.equal(inner.model.block.linear.weight, model.block.linear.weight)
    assert not any(name.startswith("block") for name in inner.ranges)


def test_calibration_takes_tensors_tuples_and_mappings_and_stops_in_time():
    block, x = Block(), torch.randn(5, WIDTH)
    expected = simulate_quantization(block, [x]).ranges
    assert simulate_quantization(block, [(x,)]).ranges == expected
    assert simulate_quantization(block, [{"x": x}]).ranges == expected
    assert simulate_quantization(block, (batch for batch in [x, 100 * x]), max_batches=1).ranges == expected
    two = simulate_quantization(block, [x, 3 * x], momentum=0.5).ranges
    low, high = two["the network: add 1"]
    outputs = [simulate_quantization(block, [batch]).ranges["the network: add 1"] for batch in (x, 3 * x)]
    assert (low, high) == pytest.approx([sum(pair) / 2 for pair in zip(*outputs, strict=True)])


def test_gradients_reach_the_parameters():
    block, x = Block(), torch.randn(5, WIDTH)
    quantized = simulate_quantization(block, [x])
    quantized(x).square().sum().backward()
    reference = copy.deepcopy(block)
    reference(x).square().sum().backward()
    found = quantized.model.linear.weight.grad
    assert F.cosine_similarity(found.flatten(), reference.linear.weight.grad.flatten(), dim=0) > 0.99


@pytest.mark.parametrize("layer", [SelfAttention, PerHeadGatedAttention, None])
def test_survives(layer):
    x = torch.randn(2, 5, WIDTH)

    def build():
        model = Block() if layer is None else layer(WIDTH, 2, is_causal=True)
        return simulate_quantization(model, [x], activation_bits=12)

    check_module(build, x, tolerance=0.2)


def test_rounds_models_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.OPTConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        ffn_dim=32,
        word_embed_proj_dim=16,
        init_std=0.3,
    )
    ids = torch.randint(3, 40, (4, 9))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    real = mask.bool()
    for attention in ("eager", "sdpa"):
        config._attn_implementation = attention
        torch.manual_seed(0)
        model = transformers.OPTForCausalLM(config).eval()
        with torch.no_grad():
            exact = model(**batch).logits[real]
            quantized = simulate_quantization(model, [batch], skip=["lm_head"])
            fine, ranges = quantized(**batch).logits[real], quantized.ranges
            quantized.activation_bits = 3
            coarse = quantized(**batch).logits[real]
        scale = exact.abs().mean()
        assert 0 < (fine - exact).abs().mean() < 0.05 * scale
        assert (coarse - exact).abs().mean() > 0.3 * scale
        layer = "model.decoder.layers.0"
        assert {f"{layer}.self_attn: softmax 1", f"{layer}: add 1", f"{layer}: add 2", f"{layer}.fc1: linear 1"} <= set(
            ranges
        )
        low, _ = ranges[f"{layer}.self_attn: matmul 1"]
        assert low > -1e4  # the mask is no activation


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibration": []}, "at least one batch, got none"),
        ({"weight_bits": 1}, r"bits lie in 2\.\.16, got 1"),
        ({"activation_bits": 20}, r"bits lie in 2\.\.16, got 20"),
        ({"weight_range": "max"}, "got 'max'"),
        ({"momentum": -0.1}, "got -0.1"),
        ({"percentile": 10}, "got 10"),
        ({"max_batches": 0}, "at least 1, got 0"),
        ({"skip": ["head"]}, "fits 'head'"),
        ({"calibration": [torch.full((2, WIDTH), torch.nan)]}, "finite activations"),
    ],
)
def test_rejects_what_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        simulate_quantization(Block(), **{"calibration": [torch.randn(2, WIDTH)]} | options)


def test_refuses_operations_that_hide_or_were_not_calibrated():
    hiding = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
    x = torch.randn(2, 3, WIDTH)
    with pytest.raises(ValueError, match="multi_head_attention_forward hides its activations"):
        simulate_quantization(hiding, [(x, x, x)])

    class Fickle(nn.Module):
        def forward(self, x, twice=False):
            return torch.tanh(x) + x if twice else torch.tanh(x)

    with pytest.raises(ValueError, match="the network: add 1 was not met in calibration"):
        simulate_quantization(Fickle(), [x])(x, twice=True)


def test_an_error_within_the_network_does_not_confuse_the_next_call():
    block, x = Block(), torch.randn(5, WIDTH)
    quantized = simulate_quantization(block, [x])
    expected = quantized(x)
    with pytest.raises(RuntimeError):
        quantized(torch.randn(5, WIDTH + 1))
    torch.testing.assert_close(quantized(x), expected)
