"""Output layers: modules with ``logits(hidden)`` and ``loss(hidden, target)``."""

from postern.heads.cnn_svm import CNNSVMClassifier
from postern.heads.protocol import Head
from postern.heads.softmax import SoftmaxHead
from postern.heads.stablemax import StableMaxHead, StableMaxLoss, stablemax_cross_entropy
from postern.heads.svm import L2SVMLoss, SVMHead, one_vs_rest_hinge, svm_predict

__all__ = [
    "CNNSVMClassifier",
    "Head",
    "L2SVMLoss",
    "SVMHead",
    "SoftmaxHead",
    "StableMaxHead",
    "StableMaxLoss",
    "one_vs_rest_hinge",
    "stablemax_cross_entropy",
    "svm_predict",
]
