"""Self-attention: layers ``(x, mask=None, cache=None) -> [batch, time, width]``, and their place in other models."""

from postern.attention.add_gates import add_per_head_gates
from postern.attention.clipped_softmax import ClippedSoftmaxAttention
from postern.attention.hugging_face import register_attention, register_clipped_softmax
from postern.attention.per_head_gate import PerHeadGate, PerHeadGatedAttention
from postern.attention.protocol import Attention
from postern.attention.self_attention import (
    KeyValueCache,
    SelfAttention,
    attend,
    attention_logits,
    attention_weights,
)

__all__ = [
    "Attention",
    "ClippedSoftmaxAttention",
    "KeyValueCache",
    "PerHeadGate",
    "PerHeadGatedAttention",
    "SelfAttention",
    "add_per_head_gates",
    "attend",
    "attention_logits",
    "attention_weights",
    "register_attention",
    "register_clipped_softmax",
]
