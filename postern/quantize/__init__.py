"""Quantisation: ``quantize(model, calibration) -> model``, its grids, and the outliers that stand in its way."""

from postern.quantize.affine import (
    Grid,
    RunningRange,
    asymmetric_grid,
    fake_quantize,
    min_max_weight_grid,
    mse_weight_grid,
    symmetric_grid,
)
from postern.quantize.outliers import OutlierStatistics, infinity_norm, kurtosis
from postern.quantize.simulated import SimulatedQuantization, simulate_quantization

__all__ = [
    "Grid",
    "OutlierStatistics",
    "RunningRange",
    "SimulatedQuantization",
    "asymmetric_grid",
    "fake_quantize",
    "infinity_norm",
    "kurtosis",
    "min_max_weight_grid",
    "mse_weight_grid",
    "simulate_quantization",
    "symmetric_grid",
]
