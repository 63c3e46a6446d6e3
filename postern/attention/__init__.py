"""Self-attention: layers ``(x, mask=None, cache=None) -> [batch, time, width]``, decoding, and other models."""

from postern.attention.add_gates import add_attention_gates, add_gates, add_per_head_gates
from postern.attention.clipped_softmax import ClippedSoftmaxAttention
from postern.attention.fit import FittedAttention, fit_attention
from postern.attention.flat_linear import FlatLinear, flat_linear, pack_weight, unpack_weight
from postern.attention.gated import AttentionGate, GatedAttention, HeadNonlinearity, split_query_and_gate
from postern.attention.gemm_dispatch import GemmDispatcher
from postern.attention.hugging_face import (
    register_attention,
    register_clipped_softmax,
    register_linear_attention,
    register_split_decoding,
)
from postern.attention.lightning import lightning_attention
from postern.attention.linear import LinearAttention, LinearState, elu_features, linear_attention
from postern.attention.per_head_gate import PerHeadGate, PerHeadGatedAttention
from postern.attention.protocol import Attention, Cache
from postern.attention.rotary import rotary_angles, rotate
from postern.attention.self_attention import KeyValueCache, SelfAttention, attend, attention_logits, attention_weights
from postern.attention.sinks import LayerSinks, SinkProbe, first_token_share, first_value_ratio
from postern.attention.split_decoding import SplitDecodingAttention, decode_attention, unified_decode_attention
from postern.attention.unified_calibration import UnifiedMaxCalibrator, calibrate_unified_max
from postern.attention.unified_softmax import UnifiedMax, unified_softmax

__all__ = [
    "Attention",
    "AttentionGate",
    "Cache",
    "ClippedSoftmaxAttention",
    "FittedAttention",
    "FlatLinear",
    "GatedAttention",
    "GemmDispatcher",
    "HeadNonlinearity",
    "KeyValueCache",
    "LayerSinks",
    "LinearAttention",
    "LinearState",
    "PerHeadGate",
    "PerHeadGatedAttention",
    "SelfAttention",
    "SinkProbe",
    "SplitDecodingAttention",
    "UnifiedMax",
    "UnifiedMaxCalibrator",
    "add_attention_gates",
    "add_gates",
    "add_per_head_gates",
    "attend",
    "attention_logits",
    "attention_weights",
    "calibrate_unified_max",
    "decode_attention",
    "elu_features",
    "first_token_share",
    "first_value_ratio",
    "fit_attention",
    "flat_linear",
    "lightning_attention",
    "linear_attention",
    "pack_weight",
    "register_attention",
    "register_clipped_softmax",
    "register_linear_attention",
    "register_split_decoding",
    "rotary_angles",
    "rotate",
    "split_query_and_gate",
    "unified_decode_attention",
    "unified_softmax",
    "unpack_weight",
]
