"""Rates of convergence: the error of a density, the exponent of a power law, and the exponents that theorems give.

Papers: arXiv 2309.13850 (top-K gates) and 2401.13875 (gates with a temperature).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from scipy.special import stdtrit
from torch import Tensor

from postern.experts.gaussian_moe import LOG_2_PI, GaussianMixtureOfExperts
from postern.experts.voronoi import cell_exponent

GateKind = Literal["linear", "activated"]


@torch.no_grad()
def hellinger_1d(
    model_p: GaussianMixtureOfExperts,
    model_q: GaussianMixtureOfExperts,
    x_grid: Float[Tensor, "inputs features"],
    y_grid: Float[Tensor, " outputs"],
) -> Float[Tensor, "*models"]:
    r"""``E_x[ h(p(.|x), q(.|x)) ]`` with ``h^2(p, q) = 1/2 int (sqrt p(y) - sqrt q(y))^2 dy``, between 0 and 1.

    The mean is over the inputs given, the integral a trapezoidal rule. That is exact to many digits as long as the grid
    covers both densities in steps of half the smallest standard deviation.

    Args:
        model_p: one model or several.
        model_q: one model or as many.
        x_grid: inputs to average over; off the boundaries of a sparse gate, where it jumps.
        y_grid: equally spaced and increasing, at least two.

    Raises:
        ValueError: inputs that are not samples by features, none of them, or a grid that is not equally spaced.
    """
    if x_grid.dim() != 2 or not len(x_grid):
        raise ValueError(f"x_grid holds inputs [inputs, features], got shape {list(x_grid.shape)}")
    steps = y_grid.diff()
    if y_grid.dim() != 1 or not len(steps) or not (steps > 0).all() or (steps.max() - steps.min()) > 1e-4 * steps.max():
        raise ValueError("y_grid is a vector of at least two increasing, equally spaced numbers")
    weights = torch.full_like(y_grid, float(steps.mean()))
    weights[[0, -1]] /= 2
    roots = [(0.5 * _log_density_table(model, x_grid, y_grid)).exp_() for model in (model_p, model_q)]
    squared = 0.5 * ((roots[0] - roots[1]).square_() @ weights)
    return squared.sqrt().mean(dim=-1)


def _log_density_table(model: GaussianMixtureOfExperts, x: Tensor, y: Tensor) -> Tensor:
    """``log p(y|x)`` of all pairs ``[.., x, y]``, expert by expert."""
    log_weights, means = model.log_weights(x), model.means(x)
    log_variance = model.log_variances
    table = torch.full((*means.shape[:-1], len(y)), float("-inf"), dtype=means.dtype, device=means.device)
    for i in range(means.shape[-1]):
        log_v = log_variance[..., i, None, None]
        squares = (y - means[..., i, None]).square_().mul_(torch.exp(-log_v))
        joint = log_weights[..., i, None] - 0.5 * squares.add_(log_v).add_(LOG_2_PI)
        table = torch.logaddexp(table, joint)
    return table


@dataclass(frozen=True)
class Rate:
    """A power law ``error ~ n^slope`` as it was fitted.

    Attributes:
        slope: the exponent.
        stderr: its standard error, from resampling the replicates; NaN for a single one.
        interval: 95 % interval (low, high).
    """

    slope: float
    stderr: float
    interval: tuple[float, float]

    def agrees_with(self, exponent: float) -> bool:
        """Whether the interval holds a theorem's exponent."""
        return self.interval[0] <= exponent <= self.interval[1]


def fit_rate(
    sample_sizes: Sequence[int],
    errors: Float[np.ndarray, "replicates sizes"],
    *,
    num_resamples: int = 2000,
    random_state: int | None = 0,
) -> Rate:
    """Least-squares slope of ``log median error`` against ``log n``, with an interval by bootstrap over replicates.

    Args:
        sample_sizes: ``n``, at least two different ones.
        errors: positive numbers; one row a replicate, whose data sets are independent of other rows.
        num_resamples: sets of replicates that are drawn with replacement.
        random_state: seed of these draws.

    Returns:
        The slope with its standard error, and the Student interval of ``replicates - 1`` degrees of freedom.

    Raises:
        ValueError: fewer than two sizes, or errors that are not positive, not finite, or not one for each size.
    """
    sizes, table = np.asarray(sample_sizes, dtype=np.float64), np.atleast_2d(np.asarray(errors, dtype=np.float64))
    if sizes.ndim != 1 or len(np.unique(sizes)) < 2 or (sizes <= 0).any():
        raise ValueError(f"a rate needs at least two positive sample sizes, got {list(sample_sizes)}")
    if table.ndim != 2 or table.shape[1] != len(sizes) or not len(table):
        raise ValueError(f"errors are [replicates, {len(sizes)}], got shape {list(np.shape(errors))}")
    if not (np.isfinite(table).all() and (table > 0).all()):
        raise ValueError("errors are positive and finite: a power law has no other")
    centred = np.log(sizes) - np.log(sizes).mean()
    weights = centred / (centred @ centred)
    slope = float(np.log(np.median(table, axis=0)) @ weights)
    replicates = len(table)
    if replicates == 1:
        return Rate(slope, float("nan"), (float("-inf"), float("inf")))
    drawn = np.random.default_rng(random_state).integers(replicates, size=(num_resamples, replicates))
    slopes = np.log(np.median(table[drawn], axis=1)) @ weights
    stderr = float(slopes.std(ddof=1))
    half = float(stdtrit(replicates - 1, 0.975)) * stderr
    return Rate(slope, stderr, (slope - half, slope + half))


def theorem_exponents(cell_size: int, gate: GateKind = "linear") -> dict[str, float]:
    """Exponents of ``n`` at which the parameters of a true expert are found that ``cell_size`` fitted ones share.

    A single one is found at ``n^-1/2``. Of several, with ``r = r(m)`` of `cell_exponent`: for a linear gate, also with
    top-K, the gate's slope and the intercept at ``n^(-1/(2r))``, the slope and the variance at ``n^(-1/r)``. For a gate
    with an activation that is independent to the second order, the gate's slope and the slope at ``n^-1/4``.

    Args:
        cell_size: ``m``.
        gate: "linear", or "activated".

    Returns:
        By "gate_coef", "coef", "intercept" and "variance".

    Raises:
        ValueError: a size below 1, or an unknown gate.
    """
    if gate not in get_args(GateKind):
        raise ValueError(f"gate must be 'linear' or 'activated', got {gate!r}")
    r = cell_exponent(cell_size)
    names = ("gate_coef", "coef", "intercept", "variance")
    if cell_size == 1:
        return dict.fromkeys(names, -0.5)
    slow, fast = -1 / (2 * r), -1 / r
    slopes = (slow, fast) if gate == "linear" else (-0.25, -0.25)
    return dict(zip(names, (*slopes, slow, fast), strict=True))
