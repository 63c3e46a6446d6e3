"""Networks that compute less where the input is easy: early exits, their policies and gates, dynamic pruning."""

from postern.adaptive.calibration_error import Binning, expected_calibration_error
from postern.adaptive.cost import count_macs, counting_macs, seconds_per_sample
from postern.adaptive.cost_hull import Mixture, best_mixture
from postern.adaptive.dynamic_conv import BlockReport, DynamicConvBlock, Execution, Mode, can_be_dynamic
from postern.adaptive.dynamic_network import (
    DynamicNetwork,
    convert_to_dynamic,
    estimate_flops_reduction,
    measure_flops_reduction,
)
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
from postern.adaptive.exit_policy import (
    EntropyExit,
    ExitPolicy,
    MaxProbExit,
    PatienceExit,
    replay_exits,
    select_exits,
)
from postern.adaptive.exit_thresholds import calibrate_thresholds, geometric_exit_fractions
from postern.adaptive.ftwt import FTWTTrainer, mask_loss, milestone_schedule
from postern.adaptive.jei_dnn import (
    ExitLoss,
    JEIDNNTrainer,
    exit_losses,
    gate_loss,
    gate_targets,
    im_loss,
    positive_weights,
)
from postern.adaptive.mask_predictor import MaskPredictor
from postern.adaptive.mass_mask import heatmap_mass_mask, topk_uniform_mask
from postern.adaptive.slim import largest_filters, slim_conv_net

__all__ = [
    "Binning",
    "BlockReport",
    "DynamicConvBlock",
    "DynamicNetwork",
    "DynamicOutput",
    "EarlyExitModel",
    "EntropyExit",
    "Execution",
    "ExitConformal",
    "ExitFeatures",
    "ExitGate",
    "ExitLoss",
    "ExitPolicy",
    "FTWTTrainer",
    "GateExit",
    "JEIDNNTrainer",
    "MaskPredictor",
    "MaxProbExit",
    "Mixture",
    "Mode",
    "PatienceExit",
    "best_mixture",
    "cache_exit_features",
    "calibrate_thresholds",
    "can_be_dynamic",
    "conformal_quantile",
    "conformal_scores",
    "convert_to_dynamic",
    "count_macs",
    "counting_macs",
    "estimate_flops_reduction",
    "exit_costs",
    "exit_decision",
    "exit_losses",
    "exit_probabilities",
    "expected_calibration_error",
    "gate_loss",
    "gate_operations",
    "gate_targets",
    "geometric_exit_fractions",
    "heatmap_mass_mask",
    "im_loss",
    "largest_filters",
    "mask_loss",
    "measure_flops_reduction",
    "milestone_schedule",
    "positive_weights",
    "replay_exits",
    "seconds_per_sample",
    "select_exits",
    "slim_conv_net",
    "topk_uniform_mask",
    "uncertainty_features",
]
