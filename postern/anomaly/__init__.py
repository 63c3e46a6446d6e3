"""Detectors of inputs that a trained network was not made for."""

from postern.anomaly.detector import OutlierDetector
from postern.anomaly.ensemble import LayerEnsemble
from postern.anomaly.gaussian import TiedGaussian, squared_distances, whitening_matrix
from postern.anomaly.local_dimension import LocalIntrinsicDimensionality, local_intrinsic_dimension
from postern.anomaly.mahalanobis import LayerDistances, MahalanobisDetector
from postern.anomaly.max_softmax import MaxSoftmax
from postern.anomaly.metrics import ood_metrics
from postern.anomaly.odin import ODIN
from postern.anomaly.taps import FeatureTaps, spatial_mean

__all__ = [
    "ODIN",
    "FeatureTaps",
    "LayerDistances",
    "LayerEnsemble",
    "LocalIntrinsicDimensionality",
    "MahalanobisDetector",
    "MaxSoftmax",
    "OutlierDetector",
    "TiedGaussian",
    "local_intrinsic_dimension",
    "ood_metrics",
    "spatial_mean",
    "squared_distances",
    "whitening_matrix",
]
