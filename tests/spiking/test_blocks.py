import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from postern.spiking import (
    LIF,
    ConvNorm,
    DWCMixer,
    Embed,
    EmbedMax,
    EmbedMaxFirst,
    EmbedMaxPlus,
    EmbedOneMax,
    EmbedOrig,
    EmbedOrigImageNet,
    EmbedOrigStrided,
    MaxEmbed,
    PoolMixer,
    QKTokenAttention,
    SpikingMLP,
    SpikingSelfAttention,
    at_each_step,
    spiking_attention,
)
from tests.modules import check_module

T, B = 2, 3


def membrane(channels, side=8, seed=0):
    return 3 * torch.randn(T, B, channels, side, side, generator=torch.Generator().manual_seed(seed))


def same_steps(layer, x):
    """Each step through a layer by itself."""
    return torch.stack([layer(step) for step in x])


BLOCKS = {
    "embed": lambda: Embed(8, 6, 3, 2),
    "max embed": lambda: MaxEmbed(8, 6, 3),
    "orig": lambda: EmbedOrig(8, 6),
    "orig ImageNet": lambda: EmbedOrigImageNet(8, 6),
    "orig strided": lambda: EmbedOrigStrided(8, 6),
    "max": lambda: EmbedMax(8, 6),
    "max first": lambda: EmbedMaxFirst(8, 6),
    "one max": lambda: EmbedOneMax(8, 6),
    "max plus": lambda: EmbedMaxPlus(8, 16),
    "dwc": lambda: DWCMixer(8, 5),
    "avg": lambda: PoolMixer("avg"),
    "max pool": lambda: PoolMixer("max"),
    "ssa": lambda: SpikingSelfAttention(8, 2),
    "qk": lambda: QKTokenAttention(8, 2),
    "mlp": lambda: SpikingMLP(8, 16),
}
HALVINGS = {
    "embed": 1,
    "max embed": 1,
    "orig ImageNet": 2,
    "orig strided": 1,
    "max": 1,
    "max first": 1,
    "one max": 1,
    "max plus": 3,
}


@pytest.mark.parametrize("name", BLOCKS)
def test_module(name):
    # Compiling takes seconds; between them these have all the parts.
    is_compiled = name in ("max", "ssa", "qk")
    check_module(lambda: BLOCKS[name]().eval(), membrane(8), tolerance=math.inf, compile=is_compiled)


@pytest.mark.parametrize("name", BLOCKS)
def test_resolution(name):
    side = 8 >> HALVINGS.get(name, 0)
    assert BLOCKS[name]()(membrane(8)).shape[3:] == (side, side)


def set_statistics(module):
    """Normalisations that are not the identity."""
    generator = torch.Generator().manual_seed(3)
    for each in module.modules():
        if isinstance(each, nn.BatchNorm2d):
            each.running_mean.copy_(torch.randn(each.num_features, generator=generator))
            each.running_var.copy_(torch.rand(each.num_features, generator=generator) + 0.5)
            nn.init.constant_(each.weight, 4)  # so that neurons behind it spike
    return module.eval()


def test_conv_norm_pools_real_numbers_after_the_normalisation():
    layer = set_statistics(ConvNorm(4, 6, 3, has_max_pool=True))
    x = (membrane(4) > 0).float()
    expected = same_steps(lambda step: F.max_pool2d(layer.norm(layer.conv(step)), 3, 2, 1), x)
    torch.testing.assert_close(layer(x), expected)
    assert not ((expected == 0) | (expected == 1)).any()


def test_embed_max_by_hand():
    """LIF, then conv, norm and pool in both paths, and another embedding in the main one."""
    embed = set_statistics(EmbedMax(4, 8))
    x = membrane(4)
    spikes = LIF()(x)
    first, second, shortcut = embed.main[0].projection, embed.main[1].projection, embed.shortcut.projection
    assert shortcut.conv.kernel_size == (1, 1)
    pooled = same_steps(lambda step: F.max_pool2d(first.norm(first.conv(step)), 3, 2, 1), spikes)
    main = same_steps(lambda step: second.norm(second.conv(step)), LIF()(pooled))
    short = same_steps(lambda step: F.max_pool2d(shortcut.norm(shortcut.conv(step)), 3, 2, 1), spikes)
    torch.testing.assert_close(embed(x), main + short)


def test_the_first_embed_max_is_embed_max_behind_a_convolution():
    embed = set_statistics(EmbedMaxFirst(3, 8))
    later = EmbedMax(4, 8).eval()
    later.load_state_dict(embed.body.state_dict())
    x = membrane(3)
    stem = same_steps(lambda step: embed.stem.norm(embed.stem.conv(step)), x)
    torch.testing.assert_close(embed(x), later(stem))


def test_embed_orig_by_hand():
    embed = set_statistics(EmbedOrig(3, 8))
    x = membrane(3)
    stem, main, shortcut = embed.stem, embed.body.main[0].projection, embed.body.shortcut.projection
    spikes = LIF()(same_steps(lambda step: stem.norm(stem.conv(step)), x))
    expected = same_steps(lambda step: main.norm(main.conv(step)) + shortcut.norm(shortcut.conv(step)), spikes)
    torch.testing.assert_close(embed(x), expected)


def test_pools():
    x = membrane(2)
    windows = F.pad(x.flatten(0, 1), [1] * 4, value=math.nan).unfold(2, 3, 1).unfold(3, 3, 1).flatten(4)
    torch.testing.assert_close(PoolMixer("avg")(x), windows.nanmean(-1).view_as(x))
    torch.testing.assert_close(PoolMixer("max")(x), windows.nan_to_num(-math.inf).amax(-1).view_as(x))


def test_residual_blocks_without_weights_are_the_identity():
    x = membrane(8)
    for block in (DWCMixer(8), SpikingSelfAttention(8, 2), QKTokenAttention(8, 2), SpikingMLP(8, 16)):
        last = [module for module in block.modules() if isinstance(module, nn.BatchNorm2d)][-1]
        nn.init.zeros_(last.weight)
        torch.testing.assert_close(block(x), x)


def test_a_depth_wise_convolution_mixes_no_channels():
    x, other = membrane(4), membrane(4)
    other[:, :, 1:] = membrane(4, seed=1)[:, :, 1:]
    mixer = DWCMixer(4, 5).eval()
    torch.testing.assert_close(mixer(x)[:, :, 0], mixer(other)[:, :, 0])


@given(st.integers(0, 10), st.integers(1, 9), st.integers(1, 5))
def test_attention_without_softmax_is_associative(seed, tokens, dim):
    query, key, value = (torch.rand(3, 2, tokens, dim, generator=torch.Generator().manual_seed(seed)) < 0.5).double()
    expected = 0.125 * (query @ key.transpose(-1, -2)) @ value
    torch.testing.assert_close(spiking_attention(query, key, value), expected)


def test_self_attention_head_by_head_and_step_by_step():
    attention = set_statistics(SpikingSelfAttention(8, 2))
    x = membrane(8, side=3)
    spikes = LIF()(x)
    query, key, value = (layer(spikes) for layer in (attention.query, attention.key, attention.value))
    assert query.any()
    assert key.any()
    product = torch.zeros_like(query)
    for t in range(T):
        for b in range(B):
            for head in (slice(0, 4), slice(4, 8)):
                q, k, v = (each[t, b, head].flatten(1).T for each in (query, key, value))
                product[t, b, head] = (0.125 * (q @ k.T) @ v).T.reshape(4, 3, 3)
    expected = x + attention.projection(LIF(threshold=0.5)(product))
    torch.testing.assert_close(attention(x), expected)


def test_qk_attention_masks_positions_by_head():
    attention = set_statistics(QKTokenAttention(8, 2))
    x = membrane(8, side=3)
    spikes = LIF()(x)
    query, key = attention.query(spikes), attention.key(spikes)
    masks = LIF(threshold=0.5)(torch.stack([query[:, :, :4].sum(2), query[:, :, 4:].sum(2)], 2))
    assert masks.any()
    assert not masks.all()
    expected = x + attention.projection(masks.repeat_interleave(4, 2) * key)
    torch.testing.assert_close(attention(x), expected)


def test_all_steps_together_are_each_step():
    x = torch.rand(T, B, 4)
    layer = nn.Linear(4, 5)
    torch.testing.assert_close(at_each_step(layer, x), layer(x))


def test_bad_sizes():
    with pytest.raises(ValueError, match="kernel_size=2"):
        Embed(4, 4, 2)
    with pytest.raises(ValueError, match="multiple of 2, got 5"):
        EmbedOrig(3, 5)
    with pytest.raises(ValueError, match="multiple of 2, got 7"):
        EmbedMaxFirst(3, 7)
    with pytest.raises(ValueError, match="multiple of 8, got 12"):
        EmbedMaxPlus(3, 12)
    with pytest.raises(ValueError, match="dim=8 and num_heads=3"):
        SpikingSelfAttention(8, 3)
    with pytest.raises(ValueError, match="dim=8 and num_heads=0"):
        QKTokenAttention(8, 0)
    with pytest.raises(ValueError, match="avg, max, got 'min'"):
        PoolMixer("min")
