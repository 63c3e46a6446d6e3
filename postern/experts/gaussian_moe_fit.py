"""Maximum likelihood for Gaussian mixtures of experts: EM for all starts at once, or L-BFGS for each.

Papers: arXiv 2309.13850 and 2401.13875, whose estimator is the maximum of the likelihood. EM takes closed-form steps
for the experts and, as the gate has none, a damped Newton step for the gate:

    r_i(x, y) = w_i(x) f_i(y|x) / p(y|x)
    (a_i, b_i) = least squares with weights r_i;  sigma_i = sum r_i e_i^2 / sum r_i, also over i if it is tied
    gate <- gate + (F + damping diag F)^-1 g,  g and F: gradient and Fisher information of sum_n sum_i r_i log w_i

A step is taken only if the likelihood of the samples does not fall, else damped more, and in the end taken for the
experts alone, which never lowers it. Top-K selection makes the likelihood jump where a sample changes its experts, so
this guard is not optional. The same pass over the samples evaluates a step and prepares the next.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.optimize import minimize
from torch import Tensor

from postern.experts._likelihood import Coordinates, Likelihood, Statistics
from postern.experts.gaussian_moe import Covariance, MixtureParameters, SoftmaxGate, check_covariance
from postern.experts.temperature_gate import GREATEST_TEMPERATURE, LEAST_TEMPERATURE

Solver = Literal["em", "lbfgs"]

_RIDGE = 1e-8  # on the normal equations of an expert, relative to its share of the samples
_FIRST_DAMPING, _LAST_DAMPING = 1e-3, 1e8


@dataclass(frozen=True)
class MixtureFit:
    """What a solver found, one entry a start.

    Attributes:
        parameters: the mixtures, with a leading axis for the starts if these had one.
        log_likelihood: mean of ``log p(y|x)`` over the samples, without the penalty.
        num_iterations: iterations taken.
        has_converged: whether the gain fell below the tolerance before ``max_iter``.
    """

    parameters: MixtureParameters
    log_likelihood: Float[Tensor, "*starts"]
    num_iterations: Int[Tensor, "*starts"]
    has_converged: Bool[Tensor, "*starts"]

    def best(self) -> MixtureFit:
        """The start of highest likelihood alone, without the axis of starts."""
        index = self.log_likelihood.argmax()
        return MixtureFit(
            self.parameters[index],
            self.log_likelihood[index],
            self.num_iterations[index],
            self.has_converged[index],
        )


def fit_mixture(
    x: Float[Tensor, "samples features"],
    y: Float[Tensor, " samples"],
    start: MixtureParameters,
    gate: SoftmaxGate = SoftmaxGate(),  # frozen
    *,
    solver: Solver = "em",
    learns_temperature: bool = False,
    covariance: Covariance = "per-expert",
    max_iter: int = 2000,
    tol: float = 1e-6,
    gate_penalty: float = 0.0,
    min_variance: float = 1e-6,
    chunk_size: int | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> MixtureFit:
    """Maximise the likelihood from one start or from several.

    The gate's slope and intercept of the last expert stay where they start: with linear scores this only fixes a
    translation that does not change the model. All is float64, on the device of ``x``. Beside the samples, memory is
    that of a chunk of them.

    Args:
        x: inputs.
        y: outputs.
        start: where to begin; with one leading axis for several starts.
        gate: how experts are weighed.
        solver: "em": the starts advance together and drop out as they converge. "lbfgs": one after the other by
            SciPy's L-BFGS-B on exact gradients; needs fewer passes where EM creeps, as with spare experts.
        learns_temperature: whether ``log tau`` is free, in the range of temperatures, [0.01, 100].
        covariance: "per-expert", or "tied" for one variance of all experts; starts of different ones begin at their
            geometric mean. It keeps an expert from shrinking onto a few samples, where nothing but ``min_variance``
            bounds the likelihood.
        max_iter: largest number of iterations of a start.
        tol: a start has converged when an iteration gains less in the mean log-likelihood.
        gate_penalty: ``lambda`` of ``lambda / 2`` times the sum of squares of the gate's free coordinates, taken from
            the mean log-likelihood.
        min_variance: smallest variance of an expert.
        chunk_size: samples at a time; chosen by the sizes if None.
        on_step: called with the iteration and the mean log-likelihoods of all starts, in EM.

    Raises:
        ValueError: samples that do not fit each other or the start, that are not finite or none; an unknown solver or
            covariance, or a setting out of range.
    """
    _check(x, y, start, gate, solver, max_iter=max_iter, tol=tol, gate_penalty=gate_penalty, min_variance=min_variance)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size is positive, got {chunk_size}")
    is_one = start.variance.dim() == 1
    held = start.to(device=x.device, dtype=torch.float64)
    if is_one:
        held = held[None]
    check_covariance(covariance)
    coordinates = Coordinates(start.num_experts, start.num_features, learns_temperature, covariance == "tied")
    likelihood = Likelihood(x.double(), y.double(), gate, coordinates, held, chunk_size)
    problem = _Problem(likelihood, coordinates, gate_penalty, min_variance)
    flat = problem.bounded(coordinates.flatten(held))
    found = _em(problem, flat, max_iter, tol, on_step) if solver == "em" else _lbfgs(problem, flat, max_iter, tol)
    fit = MixtureFit(coordinates.unflatten(found.flat, held), found.value, found.num_iterations, found.has_converged)
    return fit.best() if is_one else fit


def _check(x: Tensor, y: Tensor, start: MixtureParameters, gate: SoftmaxGate, solver: str, **settings: float) -> None:
    if x.dim() != 2 or x.shape[1] != start.num_features or y.shape != x.shape[:1]:
        raise ValueError(
            f"samples are x [samples, {start.num_features}] and y [samples], got {list(x.shape)} and {list(y.shape)}"
        )
    if not len(y):
        raise ValueError("a fit needs samples, got none")
    if not (torch.isfinite(x).all() and torch.isfinite(y).all()):
        raise ValueError("samples are finite, got NaN or infinity")
    if start.variance.dim() > 2:
        raise ValueError(f"several starts have one leading axis, got variances {list(start.variance.shape)}")
    if gate.top_k is not None and gate.top_k > start.num_experts:
        raise ValueError(f"of {start.num_experts} experts between 1 and as many can be kept, got top_k={gate.top_k}")
    if solver not in get_args(Solver):
        raise ValueError(f"solver must be one of {', '.join(get_args(Solver))}, got {solver!r}")
    for name, value in settings.items():
        least = 0 if name in ("gate_penalty", "tol") else None
        if not (value > 0 or value == least):
            raise ValueError(f"{name} is {'positive' if least is None else 'at least 0'}, got {value}")


@dataclass(frozen=True)
class _Found:
    flat: Tensor
    value: Tensor
    num_iterations: Tensor
    has_converged: Tensor


@dataclass(frozen=True)
class _Problem:
    """The penalised likelihood, and the bounds of its coordinates."""

    likelihood: Likelihood
    coordinates: Coordinates
    gate_penalty: float
    min_variance: float

    def limits(self) -> list[tuple[float | None, float | None]]:
        """(low, high) of each coordinate."""
        free = self.coordinates.num_gate + self.coordinates.num_expert
        limits: list[tuple[float | None, float | None]] = [(None, None)] * free
        limits += [(float(np.log(self.min_variance)), None)] * self.coordinates.num_variances
        if self.coordinates.learns_temperature:
            limits.append((float(np.log(LEAST_TEMPERATURE)), float(np.log(GREATEST_TEMPERATURE))))
        return limits

    def bounded(self, flat: Tensor) -> Tensor:
        """The nearest coordinates within the limits."""
        low, high = zip(*self.limits(), strict=True)
        infinite = float("inf")
        lowest = flat.new_tensor([-infinite if bound is None else bound for bound in low])
        highest = flat.new_tensor([infinite if bound is None else bound for bound in high])
        return torch.minimum(torch.maximum(flat, lowest), highest)

    def gate(self, flat: Tensor) -> Tensor:
        """The gate's coordinates, ``log tau`` last."""
        num_gate = self.coordinates.num_gate
        if not self.coordinates.learns_temperature:
            return flat[..., :num_gate]
        return torch.cat([flat[..., :num_gate], flat[..., -1:]], dim=-1)

    def penalty(self, flat: Tensor) -> Tensor:
        """What is taken from the mean log-likelihood."""
        return 0.5 * self.gate_penalty * self.gate(flat).square().sum(dim=-1)

    def em_step(self, flat: Tensor, statistics: Statistics, damping: Tensor) -> Tensor:
        """New coordinates from one pass; where the damping is past its limit the gate stays."""
        coordinates = self.coordinates
        _, expert, log_variance, _ = coordinates.split(flat)

        # regression of the residuals: the squares of what is left lose no digits to the mean
        mass = statistics.mass
        ridge = _RIDGE * mass.clamp_min(1e-12)[..., None, None]
        identity = torch.eye(expert.shape[-1], dtype=flat.dtype, device=flat.device)
        correction = torch.linalg.solve(statistics.gram + ridge * identity, statistics.moment)
        explained = 2 * (correction * statistics.moment).sum(dim=-1)
        explained = explained - (correction * (statistics.gram @ correction.unsqueeze(-1)).squeeze(-1)).sum(dim=-1)
        left = statistics.square - explained
        # an expert without samples stays as it is
        has_samples = mass > 1e-12
        expert = torch.where(has_samples.unsqueeze(-1), expert + correction, expert)
        if coordinates.shares_variance:
            log_variance = (left.sum(-1, keepdim=True) / mass.sum(-1, keepdim=True)).clamp_min(self.min_variance).log()
        else:
            log_variance = torch.where(has_samples, (left / mass).clamp_min(self.min_variance).log(), log_variance)

        values = self.gate(flat)
        gradient = statistics.gate_gradient - self.gate_penalty * values
        scale = statistics.gate_information.diagonal(dim1=-2, dim2=-1)
        diagonal = scale * damping.unsqueeze(-1) + self.gate_penalty + 1e-10
        step = torch.linalg.solve(statistics.gate_information + torch.diag_embed(diagonal), gradient)
        step = torch.where((damping < _LAST_DAMPING).unsqueeze(-1), step, torch.zeros_like(step))
        values = values + step
        num_gate = coordinates.num_gate
        parts = [values[..., :num_gate], expert.flatten(-2), log_variance, values[..., num_gate:]]
        return self.bounded(torch.cat(parts, dim=-1))


def _em(
    problem: _Problem,
    flat: Tensor,
    max_iter: int,
    tol: float,
    on_step: Callable[[int, Tensor], None] | None,
) -> _Found:
    """All starts together. ``active`` holds the indices of those that have not converged."""
    likelihood = problem.likelihood
    statistics = likelihood.em_statistics(flat)
    value = statistics.log_likelihood - problem.penalty(flat)
    damping = torch.full_like(value, _FIRST_DAMPING)
    num_iterations = torch.zeros(len(flat), dtype=torch.long, device=flat.device)
    has_converged = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
    final, final_value = flat.clone(), value.clone()
    active = torch.arange(len(flat), device=flat.device)
    for iteration in range(1, max_iter + 1):
        candidate = problem.em_step(flat, statistics, damping)
        tried = likelihood.em_statistics(candidate)
        tried_value = tried.log_likelihood - problem.penalty(candidate)
        gain = tried_value - value
        # also false for NaN, after a step out of all bounds
        is_better = gain >= 0
        gate_stays = damping >= _LAST_DAMPING
        # a rounding error below zero with the gate at rest is the end, not a reason to damp more
        is_done = (is_better & (gain < tol)) | (~is_better & gate_stays)
        flat = torch.where(is_better.unsqueeze(-1), candidate, flat)
        value = torch.where(is_better, tried_value, value)
        statistics = Statistics(
            *(
                torch.where(is_better.view(-1, *[1] * (new.dim() - 1)), new, old)
                for new, old in zip(tried, statistics, strict=True)
            )
        )
        damping = torch.where(is_better, (damping / 5).clamp_min(1e-9), damping * 10)
        damping = torch.where(is_better & gate_stays, torch.full_like(damping, _FIRST_DAMPING), damping)
        final[active], final_value[active] = flat, value
        num_iterations[active] = iteration
        if on_step is not None:
            on_step(iteration, final_value + problem.penalty(final))
        if is_done.any():
            has_converged[active[is_done]] = True
            left = ~is_done
            active = active[left]
            if not len(active):
                break
            flat, value, damping = flat[left], value[left], damping[left]
            statistics = Statistics(*(each[left] for each in statistics))
            likelihood = problem.likelihood.take(active)
    return _Found(final, final_value + problem.penalty(final), num_iterations, has_converged)


def _lbfgs(problem: _Problem, flat: Tensor, max_iter: int, tol: float) -> _Found:
    """One start after the other; a start whose line search fails ends without having converged."""
    coordinates, device = problem.coordinates, flat.device
    is_gate = problem.gate_penalty * torch.cat(
        [
            flat.new_ones(coordinates.num_gate),
            flat.new_zeros(coordinates.num_expert + coordinates.num_variances),
            flat.new_ones(int(coordinates.learns_temperature)),
        ]
    )
    ends, values, iterations, converged = [], [], [], []
    for index in range(len(flat)):
        likelihood = problem.likelihood.take(torch.tensor([index], device=device))

        def negative(theta: np.ndarray, likelihood: Likelihood = likelihood) -> tuple[float, np.ndarray]:
            point = torch.from_numpy(theta).to(device)[None]
            value, gradient = likelihood.value_and_gradient(point)
            gradient = gradient - is_gate * point
            return -(value - problem.penalty(point)).item(), -gradient[0].cpu().numpy()

        found = minimize(
            negative,
            flat[index].cpu().numpy(),
            jac=True,
            method="L-BFGS-B",
            bounds=problem.limits(),
            options={"maxiter": max_iter, "maxfun": 4 * max_iter, "ftol": tol, "gtol": 1e-9, "maxcor": 20},
        )
        end = torch.from_numpy(found.x).to(device)
        ends.append(end)
        values.append(-found.fun + problem.penalty(end).item())
        iterations.append(found.nit)
        converged.append(found.status == 0)
    return _Found(
        torch.stack(ends),
        flat.new_tensor(values),
        torch.tensor(iterations, device=device),
        torch.tensor(converged, device=device),
    )
