"""Networks that compute less where the input is easy: early exits, their policies and gates, dynamic pruning."""

from postern.adaptive.calibration_error import Binning, expected_calibration_error
from postern.adaptive.cost import count_macs, counting_macs, seconds_per_sample
from postern.adaptive.early_exit import DynamicOutput, EarlyExitModel, exit_costs
from postern.adaptive.exit_conformal import ExitConformal, conformal_quantile, conformal_scores
from postern.adaptive.exit_features import ExitFeatures, cache_exit_features
from postern.adaptive.exit_gates import (
    ExitGate,
    GateExit,
    exit_decision,
    exit_probabilities,
    gate_operations,
    uncertainty_features,
)
from postern.adaptive.exit_policy import ExitPolicy, MaxProbExit, PatienceExit, replay_exits, select_exits
from postern.adaptive.exit_thresholds import calibrate_thresholds, geometric_exit_fractions
from postern.adaptive.jei_dnn import (
    ExitLoss,
    JEIDNNTrainer,
    exit_losses,
    gate_loss,
    gate_targets,
    im_loss,
    positive_weights,
)

__all__ = [
    "Binning",
    "DynamicOutput",
    "EarlyExitModel",
    "ExitConformal",
    "ExitFeatures",
    "ExitGate",
    "ExitLoss",
    "ExitPolicy",
    "GateExit",
    "JEIDNNTrainer",
    "MaxProbExit",
    "PatienceExit",
    "cache_exit_features",
    "calibrate_thresholds",
    "conformal_quantile",
    "conformal_scores",
    "count_macs",
    "counting_macs",
    "exit_costs",
    "exit_decision",
    "exit_losses",
    "exit_probabilities",
    "expected_calibration_error",
    "gate_loss",
    "gate_operations",
    "gate_targets",
    "geometric_exit_fractions",
    "im_loss",
    "positive_weights",
    "replay_exits",
    "seconds_per_sample",
    "select_exits",
    "uncertainty_features",
]
