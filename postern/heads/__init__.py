"""Output layers: modules with ``logits(hidden)`` and ``loss(hidden, target)``."""

from postern.heads.adaptive_softmax import AdaptiveSoftmaxHead
from postern.heads.cnn_svm import CNNSVMClassifier
from postern.heads.factored import FactoredLinear, FactoredSphericalHead, ScoreStatistics
from postern.heads.hugging_face import replace_lm_head
from postern.heads.low_rank import LowRankHead
from postern.heads.protocol import Head
from postern.heads.softmax import SoftmaxHead
from postern.heads.spherical import (
    SphericalHead,
    SphericalLoss,
    SphericalSoftmaxHead,
    SphericalSoftmaxLoss,
    SquaredErrorLoss,
    TaylorSoftmaxHead,
    TaylorSoftmaxLoss,
    log_taylor_softmax,
)
from postern.heads.stablemax import StableMaxHead, StableMaxLoss, stablemax_cross_entropy
from postern.heads.svm import L2SVMLoss, SVMHead, one_vs_rest_hinge, svm_predict
from postern.heads.token_mapping import (
    Clusters,
    frequency_kmeans_mapping,
    frequency_mapping,
    kmeans,
    random_mapping,
    unigram_bias,
)
from postern.heads.vq_cost import HeadCost, head_cost, projection_bound, tie_log_probs, tying_floor
from postern.heads.vq_logits import VQLogitsHead, scatter_logits, vq_cross_entropy
from postern.heads.vq_straight_through import StraightThroughVQHead
from postern.heads.z_loss import ZLoss, ZLossHead, z_loss

__all__ = [
    "AdaptiveSoftmaxHead",
    "CNNSVMClassifier",
    "Clusters",
    "FactoredLinear",
    "FactoredSphericalHead",
    "Head",
    "HeadCost",
    "L2SVMLoss",
    "LowRankHead",
    "SVMHead",
    "ScoreStatistics",
    "SoftmaxHead",
    "SphericalHead",
    "SphericalLoss",
    "SphericalSoftmaxHead",
    "SphericalSoftmaxLoss",
    "SquaredErrorLoss",
    "StableMaxHead",
    "StableMaxLoss",
    "StraightThroughVQHead",
    "TaylorSoftmaxHead",
    "TaylorSoftmaxLoss",
    "VQLogitsHead",
    "ZLoss",
    "ZLossHead",
    "frequency_kmeans_mapping",
    "frequency_mapping",
    "head_cost",
    "kmeans",
    "log_taylor_softmax",
    "one_vs_rest_hinge",
    "projection_bound",
    "random_mapping",
    "replace_lm_head",
    "scatter_logits",
    "stablemax_cross_entropy",
    "svm_predict",
    "tie_log_probs",
    "tying_floor",
    "unigram_bias",
    "vq_cross_entropy",
    "z_loss",
]
