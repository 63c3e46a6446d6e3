"""The attention layers that follow the protocol: each is put through `test_layers` by its entry here."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from postern.attention import (
    ClippedSoftmaxAttention,
    FramedSoftmaxAttention,
    GatedAttention,
    GatedLinearAttention,
    HeadNonlinearity,
    LinearAttention,
    NormalizedAttention,
    NormAwareLinearAttention,
    PerHeadGatedAttention,
    SeerAttention,
    SelfAttention,
    SplitDecodingAttention,
    UnifiedMax,
)
from postern.dynamics import QLSTM, S6Mixer, SSDMixer
from postern.softmax import softmax_off_by_one

WIDTH, HEADS, TIME = 24, 3, 7


@dataclass(frozen=True)
class Layer:
    """How a layer is made and what may be asked of it.

    Attributes:
        build: ``build(is_causal=...)``, of width `WIDTH`.
        directions: values of ``is_causal`` that it has.
        knows_positions: whether its output changes with the order of the tokens.
        has_any_mask: whether it takes masks by query and head.
        compile: whether it compiles to one graph.
        bfloat16: whether it runs under autocast.
        tolerance: see `tests.modules.check_module`.
    """

    build: Callable[..., nn.Module]
    directions: tuple[bool, ...] = (False, True)
    knows_positions: bool = False
    has_any_mask: bool = True
    compile: bool = True
    bfloat16: bool = True
    tolerance: float = 0.1


def gated_linear(*, is_causal: bool, **options: object) -> nn.Module:
    assert is_causal, "it has no other direction"
    return GatedLinearAttention(WIDTH, HEADS, **options)


LAYERS = {
    "softmax": Layer(partial(SelfAttention, WIDTH, HEADS)),
    "explicit-softmax": Layer(partial(SelfAttention, WIDTH, HEADS, normalise=torch.softmax)),
    "off-by-one": Layer(partial(SelfAttention, WIDTH, HEADS, normalise=softmax_off_by_one, bias=False)),
    "grouped": Layer(partial(SelfAttention, WIDTH, 6, num_kv_heads=2)),
    "grouped-explicit": Layer(partial(SelfAttention, WIDTH, 6, num_kv_heads=2, normalise=torch.softmax)),
    "rotary": Layer(
        partial(SelfAttention, WIDTH, 6, num_kv_heads=3, rotary_base=100.0, has_qk_norm=True), knows_positions=True
    ),
    "clipped": Layer(partial(ClippedSoftmaxAttention, WIDTH, HEADS, alpha=1.0, length=16)),
    "per-head-gate": Layer(partial(PerHeadGatedAttention, WIDTH, HEADS)),
    "per-head-gate-mlp": Layer(
        partial(PerHeadGatedAttention, WIDTH, HEADS, kind="mlp", rotary_base=100.0), knows_positions=True
    ),
    "gated": Layer(partial(GatedAttention, WIDTH, 6, num_kv_heads=2)),
    "gated-by-head": Layer(
        partial(GatedAttention, WIDTH, 6, num_kv_heads=2, granularity="head", rotary_base=100.0, has_qk_norm=True),
        knows_positions=True,
    ),
    "gated-values": Layer(partial(GatedAttention, WIDTH, 6, num_kv_heads=2, gate_position="value")),
    "gated-keys": Layer(
        partial(GatedAttention, WIDTH, 6, num_kv_heads=2, gate_position="key", rotary_base=100.0), knows_positions=True
    ),
    "gated-queries": Layer(
        partial(GatedAttention, WIDTH, 6, num_kv_heads=2, gate_position="query", rotary_base=100.0, has_qk_norm=True),
        knows_positions=True,
    ),
    "gated-output": Layer(partial(GatedAttention, WIDTH, 6, num_kv_heads=2, gate_position="output")),
    "gated-by-addition": Layer(partial(GatedAttention, WIDTH, 6, num_kv_heads=2, is_additive=True, bias=False)),
    "gated-alike": Layer(partial(GatedAttention, WIDTH, 6, num_kv_heads=2, is_shared=True, head_dim=8)),
    "gated-without-input": Layer(partial(GatedAttention, WIDTH, HEADS, is_input_dependent=False)),
    "normalised-heads": Layer(
        lambda **options: SelfAttention(WIDTH, HEADS, gate=HeadNonlinearity(WIDTH // HEADS), **options)
    ),
    "split-decoding": Layer(partial(SplitDecodingAttention, WIDTH, HEADS, num_splits=2)),
    "split-decoding-unified": Layer(
        partial(
            SplitDecodingAttention,
            WIDTH,
            6,
            num_kv_heads=2,
            rotary_base=100.0,
            has_qk_norm=True,
            unified=UnifiedMax(1.0),
            num_splits=3,
        ),
        knows_positions=True,
    ),
    "linear": Layer(partial(LinearAttention, WIDTH, HEADS), has_any_mask=False),
    "linear-rotary": Layer(
        partial(LinearAttention, WIDTH, 6, num_kv_heads=2, rotary_base=100.0), knows_positions=True, has_any_mask=False
    ),
    "norm-aware": Layer(partial(NormAwareLinearAttention, WIDTH, HEADS), has_any_mask=False),
    "norm-aware-rotary": Layer(
        partial(NormAwareLinearAttention, WIDTH, 6, num_kv_heads=2, phase="soft", rotary="1d", rotary_base=100.0),
        knows_positions=True,
        has_any_mask=False,
    ),
    "framed-softmax": Layer(
        partial(FramedSoftmaxAttention, WIDTH, 6, num_kv_heads=2, rotary="1d", rotary_base=100.0),
        knows_positions=True,
        has_any_mask=False,
    ),
    "gated-linear": Layer(gated_linear, directions=(True,), knows_positions=True, has_any_mask=False),
    "gated-linear-plain": Layer(
        partial(gated_linear, layer=2, num_layers=4, decay="paper", is_gated=False),
        directions=(True,),
        knows_positions=True,
        has_any_mask=False,
    ),
    "linear-wide-keys": Layer(partial(LinearAttention, WIDTH, 6, num_kv_heads=2, key_dim=7), has_any_mask=False),
    "normalized": Layer(partial(NormalizedAttention, WIDTH, HEADS), has_any_mask=False),
    "normalized-softplus": Layer(
        partial(NormalizedAttention, WIDTH, HEADS, key_dim=5, normaliser="softplus", bias=False), has_any_mask=False
    ),
    "s6": Layer(partial(S6Mixer, WIDTH, 4), directions=(True,), knows_positions=True, has_any_mask=False),
    "s6-alone": Layer(
        partial(S6Mixer, WIDTH, 4, conv_width=None, is_gated=False, bias=True),
        directions=(True,),
        knows_positions=True,
        has_any_mask=False,
    ),
    "ssd": Layer(partial(SSDMixer, WIDTH, HEADS, 8), directions=(True,), knows_positions=True, has_any_mask=False),
    "ssd-alone": Layer(
        partial(SSDMixer, WIDTH, HEADS, 8, conv_width=None, is_gated=False, bias=True),
        directions=(True,),
        knows_positions=True,
        has_any_mask=False,
    ),
    "qlstm": Layer(partial(QLSTM, WIDTH), directions=(True,), knows_positions=True, has_any_mask=False),
    "qlstm-sigmoid": Layer(
        partial(QLSTM, WIDTH, conv_width=None, has_reversed_gate=False),
        directions=(True,),
        knows_positions=True,
        has_any_mask=False,
    ),
    "seer": Layer(
        partial(SeerAttention, WIDTH, 6, num_kv_heads=3, rotary_base=100.0, block=2, density=1.0),
        directions=(True,),
        knows_positions=True,
        has_any_mask=False,
    ),
}
