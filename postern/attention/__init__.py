"""Self-attention: layers ``(x, mask=None, cache=None) -> [batch, time, width]``, and their place in other models."""

from postern.attention.add_gates import add_attention_gates, add_gates, add_per_head_gates
from postern.attention.clipped_softmax import ClippedSoftmaxAttention
from postern.attention.fit import FittedAttention, fit_attention
from postern.attention.gated import AttentionGate, GatedAttention, HeadNonlinearity, split_query_and_gate
from postern.attention.hugging_face import register_attention, register_clipped_softmax, register_linear_attention
from postern.attention.lightning import lightning_attention
from postern.attention.linear import LinearAttention, LinearState, elu_features, linear_attention
from postern.attention.per_head_gate import PerHeadGate, PerHeadGatedAttention
from postern.attention.protocol import Attention, Cache
from postern.attention.rotary import rotary_angles, rotate
from postern.attention.self_attention import KeyValueCache, SelfAttention, attend, attention_logits, attention_weights
from postern.attention.sinks import LayerSinks, SinkProbe, first_token_share, first_value_ratio

__all__ = [
    "Attention",
    "AttentionGate",
    "Cache",
    "ClippedSoftmaxAttention",
    "FittedAttention",
    "GatedAttention",
    "HeadNonlinearity",
    "KeyValueCache",
    "LayerSinks",
    "LinearAttention",
    "LinearState",
    "PerHeadGate",
    "PerHeadGatedAttention",
    "SelfAttention",
    "SinkProbe",
    "add_attention_gates",
    "add_gates",
    "add_per_head_gates",
    "attend",
    "attention_logits",
    "attention_weights",
    "elu_features",
    "first_token_share",
    "first_value_ratio",
    "fit_attention",
    "lightning_attention",
    "linear_attention",
    "register_attention",
    "register_clipped_softmax",
    "register_linear_attention",
    "rotary_angles",
    "rotate",
    "split_query_and_gate",
]
