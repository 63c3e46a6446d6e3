"""Self-attention: layers ``(x, mask=None, cache=None) -> [batch, time, width]``, decoding, and other models."""

from postern.attention.add_gates import add_attention_gates, add_gates, add_per_head_gates
from postern.attention.attach_gates import attach_gates
from postern.attention.attn_gate import AttnGate, pool_blocks
from postern.attention.block_selection import (
    BLOCK_SCORERS,
    BlockScorer,
    ScorerInput,
    block_density,
    mean_pooled_scores,
    minference_block_scores,
    oracle_scores,
    quest_scores,
    random_scores,
    select_blocks,
    streaming_scores,
)
from postern.attention.block_sparse import block_sparse_attention
from postern.attention.block_target import gate_distillation_loss, pooled_attention_target
from postern.attention.clipped_softmax import ClippedSoftmaxAttention
from postern.attention.decay import DecayKind, decay_slopes
from postern.attention.entropy import attention_entropy, entropy_by_norm, norm_entropy_correlation
from postern.attention.feature_maps import FEATURE_MAPS, Features, relu_features
from postern.attention.fit import FittedAttention, fit_attention
from postern.attention.flat_linear import FlatLinear, flat_linear, pack_weight, unpack_weight
from postern.attention.framed import FramedLinearAttention, FramedSoftmaxAttention
from postern.attention.gate_distillation import distil_gates
from postern.attention.gated import AttentionGate, GatedAttention, HeadNonlinearity, split_query_and_gate
from postern.attention.gated_linear import GatedLinearAttention, GatedLinearState
from postern.attention.gemm_dispatch import GemmDispatcher
from postern.attention.hugging_face import (
    register_attention,
    register_clipped_softmax,
    register_linear_attention,
    register_split_decoding,
)
from postern.attention.lightning import LightningForm, lightning_attention
from postern.attention.linear import (
    LinearAttention,
    LinearState,
    elu_features,
    linear_attention,
    linear_attention_weights,
)
from postern.attention.lrpe import LRPE
from postern.attention.norm_aware import (
    NormAwareLinearAttention,
    norm_aware_key_features,
    norm_aware_query_features,
    norm_exponent,
)
from postern.attention.normalized import NormalizedAttention, normalized_attention
from postern.attention.per_head_gate import PerHeadGate, PerHeadGatedAttention
from postern.attention.protocol import Attention, Cache
from postern.attention.rotary import grid_angles, rotary_angles, rotate
from postern.attention.seer_attention import BlockSparsity, SeerAttention, block_sparsities, distilling, gate_loss
from postern.attention.self_attention import KeyValueCache, SelfAttention, attend, attention_logits, attention_weights
from postern.attention.sglu import SGLU
from postern.attention.simple_rms_norm import SimpleRMSNorm, simple_rms_norm
from postern.attention.sinks import LayerSinks, SinkProbe, first_token_share, first_value_ratio
from postern.attention.split_decoding import SplitDecodingAttention, decode_attention, unified_decode_attention
from postern.attention.unified_calibration import UnifiedMaxCalibrator, calibrate_unified_max
from postern.attention.unified_softmax import UnifiedMax, unified_softmax

__all__ = [
    "BLOCK_SCORERS",
    "FEATURE_MAPS",
    "LRPE",
    "SGLU",
    "Attention",
    "AttentionGate",
    "AttnGate",
    "BlockScorer",
    "BlockSparsity",
    "Cache",
    "ClippedSoftmaxAttention",
    "DecayKind",
    "Features",
    "FittedAttention",
    "FlatLinear",
    "FramedLinearAttention",
    "FramedSoftmaxAttention",
    "GatedAttention",
    "GatedLinearAttention",
    "GatedLinearState",
    "GemmDispatcher",
    "HeadNonlinearity",
    "KeyValueCache",
    "LayerSinks",
    "LightningForm",
    "LinearAttention",
    "LinearState",
    "NormAwareLinearAttention",
    "NormalizedAttention",
    "PerHeadGate",
    "PerHeadGatedAttention",
    "ScorerInput",
    "SeerAttention",
    "SelfAttention",
    "SimpleRMSNorm",
    "SinkProbe",
    "SplitDecodingAttention",
    "UnifiedMax",
    "UnifiedMaxCalibrator",
    "add_attention_gates",
    "add_gates",
    "add_per_head_gates",
    "attach_gates",
    "attend",
    "attention_entropy",
    "attention_logits",
    "attention_weights",
    "block_density",
    "block_sparse_attention",
    "block_sparsities",
    "calibrate_unified_max",
    "decay_slopes",
    "decode_attention",
    "distil_gates",
    "distilling",
    "elu_features",
    "entropy_by_norm",
    "first_token_share",
    "first_value_ratio",
    "fit_attention",
    "flat_linear",
    "gate_distillation_loss",
    "gate_loss",
    "grid_angles",
    "lightning_attention",
    "linear_attention",
    "linear_attention_weights",
    "mean_pooled_scores",
    "minference_block_scores",
    "norm_aware_key_features",
    "norm_aware_query_features",
    "norm_entropy_correlation",
    "norm_exponent",
    "normalized_attention",
    "oracle_scores",
    "pack_weight",
    "pool_blocks",
    "pooled_attention_target",
    "quest_scores",
    "random_scores",
    "register_attention",
    "register_clipped_softmax",
    "register_linear_attention",
    "register_split_decoding",
    "relu_features",
    "rotary_angles",
    "rotate",
    "select_blocks",
    "simple_rms_norm",
    "split_query_and_gate",
    "streaming_scores",
    "unified_decode_attention",
    "unified_softmax",
    "unpack_weight",
]
