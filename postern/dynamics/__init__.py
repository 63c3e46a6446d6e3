"""What sequence models compute: layers as one linear recurrence, and attention that learns in context."""

from postern.dynamics.circuits import CircuitPattern, Circuits
from postern.dynamics.conversion import linear_vs_ssd_gap, to_state_space
from postern.dynamics.coupling import CouplingResiduals, couple, coupling_residuals
from postern.dynamics.in_context_attention import InContextAttention, in_context_attention, linear_mean, linear_sum
from postern.dynamics.in_context_predictors import gradient_descent_predict, reduced_attention, ridge_predict
from postern.dynamics.in_context_theory import (
    GradientFlow,
    approximate_loss,
    approximate_loss_gradient,
    gradient_descent_risk,
    gradient_flow,
    optimal_mu,
    optimal_preconditioner,
    optimal_single_head,
    optimal_step_size,
    preconditioned_risk,
)
from postern.dynamics.qlstm import QLSTM, reversed_sigmoid
from postern.dynamics.recurrent_state import RecurrentState
from postern.dynamics.regression_prompts import InContextRegression, RegressionPrompts, autoregressive_covariance
from postern.dynamics.s6 import S6Mixer, selective_scan
from postern.dynamics.scan import diagonal_scan
from postern.dynamics.short_convolution import ShortConvolution
from postern.dynamics.ssd import SSDMixer, decaying_attention
from postern.dynamics.state_space import LinearTimeVarying
from postern.dynamics.taylor_softmax import (
    required_taylor_order,
    taylor_exp,
    taylor_exp_error_bound,
    taylor_feature_count,
    taylor_softmax_error_bound,
    taylor_softmax_features,
)
from postern.dynamics.tied_recurrence import (
    AttentionForm,
    SSDForm,
    TiedRecurrence,
    linear_attention_form,
    tie,
    to_linear_attention,
    to_normalized_attention,
    to_ssd,
)

__all__ = [
    "QLSTM",
    "AttentionForm",
    "CircuitPattern",
    "Circuits",
    "CouplingResiduals",
    "GradientFlow",
    "InContextAttention",
    "InContextRegression",
    "LinearTimeVarying",
    "RecurrentState",
    "RegressionPrompts",
    "S6Mixer",
    "SSDForm",
    "SSDMixer",
    "ShortConvolution",
    "TiedRecurrence",
    "approximate_loss",
    "approximate_loss_gradient",
    "autoregressive_covariance",
    "couple",
    "coupling_residuals",
    "decaying_attention",
    "diagonal_scan",
    "gradient_descent_predict",
    "gradient_descent_risk",
    "gradient_flow",
    "in_context_attention",
    "linear_attention_form",
    "linear_mean",
    "linear_sum",
    "linear_vs_ssd_gap",
    "optimal_mu",
    "optimal_preconditioner",
    "optimal_single_head",
    "optimal_step_size",
    "preconditioned_risk",
    "reduced_attention",
    "required_taylor_order",
    "reversed_sigmoid",
    "ridge_predict",
    "selective_scan",
    "taylor_exp",
    "taylor_exp_error_bound",
    "taylor_feature_count",
    "taylor_softmax_error_bound",
    "taylor_softmax_features",
    "tie",
    "to_linear_attention",
    "to_normalized_attention",
    "to_ssd",
    "to_state_space",
]
