"""Detectors of inputs that a trained network was not made for, and gates between what it knows and what it does not."""

from postern.anomaly.calibrated_stacking import CalibratedStacking
from postern.anomaly.confidence_gate import ConfidenceGate, Gate, MaxProbGate, soften, sorted_confidences
from postern.anomaly.cosmo import (
    GATE_TEMPERATURES,
    COSMOClassifier,
    Mode,
    critical_thresholds,
    gate_training_rows,
    gzsl_combine,
    unseen_probability,
)
from postern.anomaly.detector import OutlierDetector
from postern.anomaly.ensemble import LayerEnsemble
from postern.anomaly.eszsl import ESZSL
from postern.anomaly.expert_predictions import (
    ExpertPredictions,
    load_expert_predictions,
    predict_with_experts,
    save_expert_predictions,
)
from postern.anomaly.gaussian import TiedGaussian, squared_distances, whitening_matrix
from postern.anomaly.generalized_zero_shot import GeneralizedZeroShotClassifier
from postern.anomaly.gzsl_combiner import DomainBest, GZSLCombiner, domain_best
from postern.anomaly.gzsl_split import GZSLPhase, GZSLSplit, gzsl_split
from postern.anomaly.local_dimension import LocalIntrinsicDimensionality, local_intrinsic_dimension
from postern.anomaly.mahalanobis import LayerDistances, MahalanobisDetector
from postern.anomaly.max_softmax import MaxSoftmax
from postern.anomaly.metrics import ood_metrics
from postern.anomaly.odin import ODIN
from postern.anomaly.seen_unseen_curve import SeenUnseenCurve, ausuc, gzsl_scores, seen_unseen_curve
from postern.anomaly.taps import FeatureTaps, spatial_mean

__all__ = [
    "ESZSL",
    "GATE_TEMPERATURES",
    "ODIN",
    "COSMOClassifier",
    "CalibratedStacking",
    "ConfidenceGate",
    "DomainBest",
    "ExpertPredictions",
    "FeatureTaps",
    "GZSLCombiner",
    "GZSLPhase",
    "GZSLSplit",
    "Gate",
    "GeneralizedZeroShotClassifier",
    "LayerDistances",
    "LayerEnsemble",
    "LocalIntrinsicDimensionality",
    "MahalanobisDetector",
    "MaxProbGate",
    "MaxSoftmax",
    "Mode",
    "OutlierDetector",
    "SeenUnseenCurve",
    "TiedGaussian",
    "ausuc",
    "critical_thresholds",
    "domain_best",
    "gate_training_rows",
    "gzsl_combine",
    "gzsl_scores",
    "gzsl_split",
    "load_expert_predictions",
    "local_intrinsic_dimension",
    "ood_metrics",
    "predict_with_experts",
    "save_expert_predictions",
    "seen_unseen_curve",
    "soften",
    "sorted_confidences",
    "spatial_mean",
    "squared_distances",
    "unseen_probability",
    "whitening_matrix",
]
