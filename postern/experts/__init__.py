"""Experts: routers that assign tokens to them, the layer that lets them work, and Gaussian mixtures of experts."""

from postern.experts.consistency import (
    ConsistencyLoss,
    ensemble_log_probs,
    expert_agreement,
    symmetric_kl,
    thor_step,
    two_passes,
)
from postern.experts.cosine_router import CosineRouter
from postern.experts.dense_to_sparse_router import DenseToSparseRouter, gumbel_noise
from postern.experts.expert_conversion import StochasticFeedForward, convert_ffn_to_experts
from postern.experts.feedforward import Experts, FeedForwardExperts, ModuleExperts, in_order
from postern.experts.fluctuation import RoutingRecorder, routing_fluctuation
from postern.experts.gate_activation import ACTIVATIONS, Activation, resolve_activation, value_and_derivative
from postern.experts.gaussian_moe import Covariance, GaussianMixtureOfExperts, MixtureParameters, SoftmaxGate
from postern.experts.gaussian_moe_fit import MixtureFit, Solver, fit_mixture
from postern.experts.gaussian_moe_regressor import GaussianMoERegressor
from postern.experts.graph_router import Graph, GraphOptions, TokenGraph, TokenGraphRouter
from postern.experts.grouped import grouped_mm
from postern.experts.hash_router import HashRouter
from postern.experts.hugging_face import patch_router
from postern.experts.identifiability import (
    IdentifiabilityReport,
    IndependenceRank,
    activation_independence_rank,
    fisher_information,
    identifiability_report,
)
from postern.experts.mixture import Capacity, Dispatch, MixtureOfExperts, dispatch, evaluate_densely
from postern.experts.propagation import propagate, propagate_with_sdpa, related_tokens, sharpest_head
from postern.experts.random_router import RandomRouter
from postern.experts.rates import GateKind, Rate, fit_rate, hellinger_1d, theorem_exponents
from postern.experts.routing import (
    Router,
    Routing,
    RoutingContext,
    balance_loss,
    expert_shares,
    router_z_loss,
)
from postern.experts.selection_entropy import entropy_bounds, load_entropy, selection_entropy
from postern.experts.similarity import Similarity, similarity_matrix
from postern.experts.softmax_router import SoftmaxRouter
from postern.experts.stochastic_router import StochasticRouter, expert_draws
from postern.experts.temperature_gate import GateScore, LinearTemperatureSchedule, TemperatureGate, set_temperature
from postern.experts.temperature_softmax import temperature_softmax_gate
from postern.experts.topk_softmax import SelectOn, topk_indices, topk_mask, topk_softmax_gate
from postern.experts.voronoi import (
    CELL_EXPONENTS,
    LossKind,
    align_gate_translation,
    cell_exponent,
    dense_to_sparse_loss,
    voronoi_cells,
    voronoi_loss,
)

__all__ = [
    "ACTIVATIONS",
    "CELL_EXPONENTS",
    "Activation",
    "Capacity",
    "ConsistencyLoss",
    "CosineRouter",
    "Covariance",
    "DenseToSparseRouter",
    "Dispatch",
    "Experts",
    "FeedForwardExperts",
    "GateKind",
    "GateScore",
    "GaussianMixtureOfExperts",
    "GaussianMoERegressor",
    "Graph",
    "GraphOptions",
    "HashRouter",
    "IdentifiabilityReport",
    "IndependenceRank",
    "LinearTemperatureSchedule",
    "LossKind",
    "MixtureFit",
    "MixtureOfExperts",
    "MixtureParameters",
    "ModuleExperts",
    "RandomRouter",
    "Rate",
    "Router",
    "Routing",
    "RoutingContext",
    "RoutingRecorder",
    "SelectOn",
    "Similarity",
    "SoftmaxGate",
    "SoftmaxRouter",
    "Solver",
    "StochasticFeedForward",
    "StochasticRouter",
    "TemperatureGate",
    "TokenGraph",
    "TokenGraphRouter",
    "activation_independence_rank",
    "align_gate_translation",
    "balance_loss",
    "cell_exponent",
    "convert_ffn_to_experts",
    "dense_to_sparse_loss",
    "dispatch",
    "ensemble_log_probs",
    "entropy_bounds",
    "evaluate_densely",
    "expert_agreement",
    "expert_draws",
    "expert_shares",
    "fisher_information",
    "fit_mixture",
    "fit_rate",
    "grouped_mm",
    "gumbel_noise",
    "hellinger_1d",
    "identifiability_report",
    "in_order",
    "load_entropy",
    "patch_router",
    "propagate",
    "propagate_with_sdpa",
    "related_tokens",
    "resolve_activation",
    "router_z_loss",
    "routing_fluctuation",
    "selection_entropy",
    "set_temperature",
    "sharpest_head",
    "similarity_matrix",
    "symmetric_kl",
    "temperature_softmax_gate",
    "theorem_exponents",
    "thor_step",
    "topk_indices",
    "topk_mask",
    "topk_softmax_gate",
    "two_passes",
    "value_and_derivative",
    "voronoi_cells",
    "voronoi_loss",
]
