"""Experts: routers that assign tokens to them, and the layer that lets them work."""

from postern.experts.consistency import (
    ConsistencyLoss,
    ensemble_log_probs,
    expert_agreement,
    symmetric_kl,
    thor_step,
    two_passes,
)
from postern.experts.dense_to_sparse_router import (
    DenseToSparseRouter,
    LinearTemperatureSchedule,
    TemperatureGate,
    gumbel_noise,
    set_temperature,
)
from postern.experts.expert_conversion import StochasticFeedForward, convert_ffn_to_experts
from postern.experts.feedforward import Experts, FeedForwardExperts, ModuleExperts
from postern.experts.fixed_routers import HashRouter, RandomRouter
from postern.experts.fluctuation import RoutingRecorder, routing_fluctuation
from postern.experts.graph_router import Graph, GraphOptions, TokenGraph, TokenGraphRouter
from postern.experts.grouped import grouped_mm
from postern.experts.hugging_face import patch_router
from postern.experts.mixture import Capacity, Dispatch, MixtureOfExperts, dispatch, evaluate_densely
from postern.experts.propagation import propagate, propagate_with_sdpa, related_tokens, sharpest_head
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

__all__ = [
    "Capacity",
    "ConsistencyLoss",
    "DenseToSparseRouter",
    "Dispatch",
    "Experts",
    "FeedForwardExperts",
    "Graph",
    "GraphOptions",
    "HashRouter",
    "LinearTemperatureSchedule",
    "MixtureOfExperts",
    "ModuleExperts",
    "RandomRouter",
    "Router",
    "Routing",
    "RoutingContext",
    "RoutingRecorder",
    "Similarity",
    "SoftmaxRouter",
    "StochasticFeedForward",
    "StochasticRouter",
    "TemperatureGate",
    "TokenGraph",
    "TokenGraphRouter",
    "balance_loss",
    "convert_ffn_to_experts",
    "dispatch",
    "ensemble_log_probs",
    "entropy_bounds",
    "evaluate_densely",
    "expert_agreement",
    "expert_draws",
    "expert_shares",
    "grouped_mm",
    "gumbel_noise",
    "load_entropy",
    "patch_router",
    "propagate",
    "propagate_with_sdpa",
    "related_tokens",
    "router_z_loss",
    "routing_fluctuation",
    "selection_entropy",
    "set_temperature",
    "sharpest_head",
    "similarity_matrix",
    "symmetric_kl",
    "thor_step",
    "two_passes",
]
