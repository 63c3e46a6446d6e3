"""Output layers: modules with ``logits(hidden)`` and ``loss(hidden, target)``; dual encoders; decoding rules."""

from postern.heads.adaptive_softmax import AdaptiveSoftmaxHead
from postern.heads.cnn_svm import CNNSVMClassifier
from postern.heads.decoding import Hypotheses, beam_search, greedy_search, hamming_similarity, mbr_decode, sample
from postern.heads.dual_encoder import DualEncoder, top_labels
from postern.heads.factored import FactoredLinear, FactoredSphericalHead, ScoreStatistics
from postern.heads.grad_cache import GradCache
from postern.heads.hard_negatives import HardNegativeSampler, LabelPool
from postern.heads.hugging_face import replace_lm_head
from postern.heads.label_sets import LabelSets
from postern.heads.low_rank import LowRankHead
from postern.heads.multilabel import (
    DecoupledSoftmaxLoss,
    MultiLabelSoftmaxLoss,
    OneVersusAllLoss,
    decoupled_softmax_loss,
    multilabel_softmax_loss,
    ova_bce_loss,
)
from postern.heads.protocol import Head
from postern.heads.soft_topk import SoftTopKLoss, log_soft_topk, soft_topk, soft_topk_loss, soft_topk_shift
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
from postern.heads.streaming_softmax import streaming_decoupled_softmax_loss, streaming_multilabel_softmax_loss
from postern.heads.svm import L2SVMLoss, SVMHead, one_vs_rest_hinge, svm_predict
from postern.heads.token_mapping import (
    Clusters,
    frequency_kmeans_mapping,
    frequency_mapping,
    kmeans,
    random_mapping,
    unigram_bias,
)
from postern.heads.truncation import TopKTransform, TopPTransform
from postern.heads.utility import (
    UtilityView,
    class_utility,
    margin_monotonicity,
    ordinal_agreement,
    preference_gradient,
    sampled_preference_gradient,
    sequence_lengths,
    sequence_utility,
)
from postern.heads.utility_processor import utility_logits_processor
from postern.heads.utility_transforms import (
    CandidateSetTransform,
    DesmoothTransform,
    PowerTransform,
    RankTransform,
    UtilityTransform,
    mean_log_likelihood,
    repeats,
)
from postern.heads.vq_cost import HeadCost, head_cost, projection_bound, tie_log_probs, tying_floor
from postern.heads.vq_logits import VQLogitsHead, scatter_logits, vq_cross_entropy
from postern.heads.vq_straight_through import StraightThroughVQHead
from postern.heads.xmc_metrics import label_propensities, xmc_metrics
from postern.heads.z_loss import ZLoss, ZLossHead, z_loss

__all__ = [
    "AdaptiveSoftmaxHead",
    "CNNSVMClassifier",
    "CandidateSetTransform",
    "Clusters",
    "DecoupledSoftmaxLoss",
    "DesmoothTransform",
    "DualEncoder",
    "FactoredLinear",
    "FactoredSphericalHead",
    "GradCache",
    "HardNegativeSampler",
    "Head",
    "HeadCost",
    "Hypotheses",
    "L2SVMLoss",
    "LabelPool",
    "LabelSets",
    "LowRankHead",
    "MultiLabelSoftmaxLoss",
    "OneVersusAllLoss",
    "PowerTransform",
    "RankTransform",
    "SVMHead",
    "ScoreStatistics",
    "SoftTopKLoss",
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
    "TopKTransform",
    "TopPTransform",
    "UtilityTransform",
    "UtilityView",
    "VQLogitsHead",
    "ZLoss",
    "ZLossHead",
    "beam_search",
    "class_utility",
    "decoupled_softmax_loss",
    "frequency_kmeans_mapping",
    "frequency_mapping",
    "greedy_search",
    "hamming_similarity",
    "head_cost",
    "kmeans",
    "label_propensities",
    "log_soft_topk",
    "log_taylor_softmax",
    "margin_monotonicity",
    "mbr_decode",
    "mean_log_likelihood",
    "multilabel_softmax_loss",
    "one_vs_rest_hinge",
    "ordinal_agreement",
    "ova_bce_loss",
    "preference_gradient",
    "projection_bound",
    "random_mapping",
    "repeats",
    "replace_lm_head",
    "sample",
    "sampled_preference_gradient",
    "scatter_logits",
    "sequence_lengths",
    "sequence_utility",
    "soft_topk",
    "soft_topk_loss",
    "soft_topk_shift",
    "stablemax_cross_entropy",
    "streaming_decoupled_softmax_loss",
    "streaming_multilabel_softmax_loss",
    "svm_predict",
    "tie_log_probs",
    "top_labels",
    "tying_floor",
    "unigram_bias",
    "utility_logits_processor",
    "vq_cross_entropy",
    "xmc_metrics",
    "z_loss",
]
