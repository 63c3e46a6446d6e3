"""Experts: routers that assign tokens to them, and the layer that lets them work."""

from postern.experts.dense_to_sparse_router import (
    DenseToSparseRouter,
    LinearTemperatureSchedule,
    TemperatureGate,
    gumbel_noise,
    set_temperature,
)
from postern.experts.feedforward import Experts, FeedForwardExperts, ModuleExperts
from postern.experts.fixed_routers import HashRouter, RandomRouter
from postern.experts.grouped import grouped_mm
from postern.experts.mixture import Capacity, Dispatch, MixtureOfExperts, dispatch, evaluate_densely
from postern.experts.routing import (
    Router,
    Routing,
    RoutingContext,
    balance_loss,
    expert_shares,
    router_z_loss,
)
from postern.experts.softmax_router import SoftmaxRouter

__all__ = [
    "Capacity",
    "DenseToSparseRouter",
    "Dispatch",
    "Experts",
    "FeedForwardExperts",
    "HashRouter",
    "LinearTemperatureSchedule",
    "MixtureOfExperts",
    "ModuleExperts",
    "RandomRouter",
    "Router",
    "Routing",
    "RoutingContext",
    "SoftmaxRouter",
    "TemperatureGate",
    "balance_loss",
    "dispatch",
    "evaluate_densely",
    "expert_shares",
    "grouped_mm",
    "gumbel_noise",
    "router_z_loss",
    "set_temperature",
]
