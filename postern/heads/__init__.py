"""Output layers: modules with ``logits(hidden)`` and ``loss(hidden, target)``."""

from postern.heads.cnn_svm import CNNSVMClassifier
from postern.heads.factored import FactoredLinear, FactoredSphericalHead, ScoreStatistics
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
from postern.heads.z_loss import ZLoss, ZLossHead, z_loss

__all__ = [
    "CNNSVMClassifier",
    "FactoredLinear",
    "FactoredSphericalHead",
    "Head",
    "L2SVMLoss",
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
    "TaylorSoftmaxHead",
    "TaylorSoftmaxLoss",
    "ZLoss",
    "ZLossHead",
    "log_taylor_softmax",
    "one_vs_rest_hinge",
    "stablemax_cross_entropy",
    "svm_predict",
    "z_loss",
]
