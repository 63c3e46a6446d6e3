"""What trained sequence models compute: attention that learns in context, and the theory that it is held against."""

from postern.dynamics.circuits import CircuitPattern, Circuits
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
from postern.dynamics.regression_prompts import InContextRegression, RegressionPrompts, autoregressive_covariance

__all__ = [
    "CircuitPattern",
    "Circuits",
    "GradientFlow",
    "InContextAttention",
    "InContextRegression",
    "RegressionPrompts",
    "approximate_loss",
    "approximate_loss_gradient",
    "autoregressive_covariance",
    "gradient_descent_predict",
    "gradient_descent_risk",
    "gradient_flow",
    "in_context_attention",
    "linear_mean",
    "linear_sum",
    "optimal_mu",
    "optimal_preconditioner",
    "optimal_single_head",
    "optimal_step_size",
    "preconditioned_risk",
    "reduced_attention",
    "ridge_predict",
]
