"""What in-context linear regression costs on average: exactly for gradient descent, approximately for attention.

Paper: "In-Context Linear Regression Demystified: Training Dynamics and Mechanistic Interpretability of Multi-Head
Softmax Attention", arXiv 2503.12734, for the approximate loss of `reduced_attention` and its gradient flow. The exact
risks follow from the first two moments of Wishart matrices; they are not in the paper.

Throughout ``d`` is the inputs' dimension, ``L`` the number of examples, ``s2`` the variance of the noise, coefficients
are drawn from ``N(0, I / d)``, and the target is noisy too, so that no loss is below ``s2``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy.integrate import solve_ivp
from torch import Tensor


def approximate_loss(
    omega: Float[Tensor, "*batch heads"],
    mu: Float[Tensor, "*batch heads"],
    dim: int,
    length: int,
    noise_variance: float,
) -> Float[Tensor, "*batch"]:
    """``1 + s2 - 2 mu.omega + mu^T A mu``, ``A = omega omega^T + ((1 + s2) / L) exp(d omega omega^T)`` by entry.

    The mean of inputs under the tilt of softmax is ``omega x_q``, which gives the signal; the sum of the squared
    weights is about ``exp(d omega^2) / L``, which gives the variance. It holds where ``L`` is far above that
    exponential, and is otherwise too low: by a tenth at L = 40.

    Args:
        omega: see `reduced_attention`.
        mu: likewise.
        dim: ``d``.
        length: ``L``.
        noise_variance: ``s2``.

    Raises:
        ValueError: shapes that differ, or an impossible setting.
    """
    _check_heads(omega, mu)
    signal = (mu * omega).sum(-1)
    variance = torch.einsum("...h,...hk,...k->...", mu, _variance(omega, dim, length, noise_variance), mu)
    return 1 + noise_variance - 2 * signal + signal.square() + variance


def approximate_loss_gradient(
    omega: Float[Tensor, "*batch heads"],
    mu: Float[Tensor, "*batch heads"],
    dim: int,
    length: int,
    noise_variance: float,
) -> tuple[Float[Tensor, "*batch heads"], Float[Tensor, "*batch heads"]]:
    """Return the gradients of `approximate_loss` with respect to omega and mu.

        d omega = -2 mu + 2 (mu.omega) mu + 2 d (V * mu mu^T) omega,    d mu = -2 omega + 2 (mu.omega) omega + 2 V mu

    with ``V = ((1 + s2) / L) exp(d omega omega^T)``. The arguments are those of `approximate_loss`.
    """
    _check_heads(omega, mu)
    variance = _variance(omega, dim, length, noise_variance)
    left = 2 * ((mu * omega).sum(-1, keepdim=True) - 1)
    of_omega = left * mu + 2 * dim * mu * torch.einsum("...hk,...k->...h", variance, mu * omega)
    of_mu = left * omega + 2 * torch.einsum("...hk,...k->...h", variance, mu)
    return of_omega, of_mu


def optimal_mu(
    omega: Float[Tensor, "*batch heads"], dim: int, length: int, noise_variance: float
) -> Float[Tensor, "*batch heads"]:
    """``A^-1 omega``: the mu of the least `approximate_loss`; heads of equal omega share what is theirs.

    The arguments are those of `approximate_loss`.
    """
    signal = omega[..., :, None] * omega[..., None, :]
    matrix = signal + _variance(omega, dim, length, noise_variance)
    # equal heads make the matrix singular; the pseudo-inverse divides their part evenly
    solution: Tensor = (torch.linalg.pinv(matrix, hermitian=True) @ omega[..., None])[..., 0]
    return solution


def optimal_single_head(dim: int, length: int, noise_variance: float) -> tuple[float, float, float]:
    """Return omega, mu and the `approximate_loss` of the best single head, a kernel smoother.

        omega = 1 / sqrt(d),    mu = sqrt(d) / (1 + (1 + s2) d e / L),    loss = 1 + s2 - 1 / (1 + (1 + s2) d e / L)

    Raises:
        ValueError: an impossible setting.
    """
    _check_setting(dim, length, noise_variance)
    shrinkage = 1 / (1 + (1 + noise_variance) * dim * math.e / length)
    return dim**-0.5, dim**0.5 * shrinkage, 1 + noise_variance - shrinkage


@dataclass(frozen=True)
class GradientFlow:
    """A solution of ``d omega / dt = -dL / d omega`` and ``d mu / dt = -dL / d mu``, with `approximate_loss` as L.

    Attributes:
        time: the points in time, from 0.
        omega: at these points.
        mu: at these points.
        loss: at these points.
    """

    time: Float[Tensor, " points"]
    omega: Float[Tensor, "points heads"]
    mu: Float[Tensor, "points heads"]
    loss: Float[Tensor, " points"]


def gradient_flow(
    omega: Float[Tensor, " heads"],
    mu: Float[Tensor, " heads"],
    dim: int,
    length: int,
    noise_variance: float,
    *,
    duration: float,
    points: int = 200,
) -> GradientFlow:
    """Follow the gradient of `approximate_loss` downwards, by LSODA of SciPy with relative errors of 1e-8.

    Args:
        omega: where it starts.
        mu: likewise.
        dim: ``d``.
        length: ``L``.
        noise_variance: ``s2``.
        duration: how long, in units of time.
        points: how many points in time are returned, at equal distances.

    Raises:
        ValueError: shapes that differ, an impossible setting, no duration or points, or a start so far out that the
            gradient is not finite.
        RuntimeError: the solver fails.
    """
    _check_heads(omega, mu)
    _check_setting(dim, length, noise_variance)
    if omega.dim() != 1 or not 0 < duration < math.inf or points < 2:
        raise ValueError(
            "a flow starts at one vector a parameter, lasts, and has at least two points; got "
            f"omega of {list(omega.shape)}, duration={duration} and points={points}"
        )
    heads = len(omega)

    def slope(_: float, state: np.ndarray) -> np.ndarray:
        if not np.isfinite(state).all():
            raise RuntimeError("the gradient flow left the range of floating-point numbers")  # LSODA would go on
        both = torch.from_numpy(np.asarray(state))
        gradients = approximate_loss_gradient(both[:heads], both[heads:], dim, length, noise_variance)
        return -torch.cat(gradients).numpy()

    start = torch.cat([omega, mu]).detach().double().cpu().numpy()
    if not np.isfinite(start).all() or not np.isfinite(slope(0, start)).all():
        raise ValueError(f"a flow starts where the loss has a finite gradient, got omega={omega} and mu={mu}")
    times = np.linspace(0, duration, points)
    solution = solve_ivp(slope, (0, duration), start, method="LSODA", t_eval=times, rtol=1e-8, atol=1e-10)
    if not solution.success:
        raise RuntimeError(f"the gradient flow could not be followed: {solution.message}")
    path = torch.from_numpy(solution.y.T.copy())
    found_omega, found_mu = path[:, :heads], path[:, heads:]
    loss = approximate_loss(found_omega, found_mu, dim, length, noise_variance)
    return GradientFlow(torch.from_numpy(times), found_omega, found_mu, loss)


def gradient_descent_risk(
    step_size: float, dim: int, length: int, noise_variance: float, *, is_debiased: bool = False
) -> float:
    """Return the exact mean squared error of `gradient_descent_predict` for standard normal inputs.

    With ``D = d (1 + s2)`` it is ``1 + s2 - 2 eta + eta^2 (L + 1 + D) / L``, and for the debiased step
    ``1 + s2 - 2 eta (L - 1) / L + eta^2 (L - 1) (L + D) / L^2``.

    Args:
        step_size: ``eta``.
        dim: ``d``.
        length: ``L``.
        noise_variance: ``s2``.
        is_debiased: whether the inputs' mean is subtracted.

    Raises:
        ValueError: an impossible setting.
    """
    _check_setting(dim, length, noise_variance)
    freedom = length - is_debiased
    spread = (freedom + 1 + dim * (1 + noise_variance)) / length
    return 1 + noise_variance + freedom / length * (step_size**2 * spread - 2 * step_size)


def optimal_step_size(dim: int, length: int, noise_variance: float, *, is_debiased: bool = False) -> float:
    """``L / (L + 1 + D)``, or ``L / (L + D)`` debiased: the step size of the least `gradient_descent_risk`.

    Raises:
        ValueError: an impossible setting.
    """
    _check_setting(dim, length, noise_variance)
    return length / (length - is_debiased + 1 + dim * (1 + noise_variance))


def preconditioned_risk(
    preconditioner: Float[Tensor, "dim dim"],
    covariance: Float[Tensor, "dim dim"],
    length: int,
    noise_variance: float,
    *,
    is_debiased: bool = False,
) -> float:
    """Return the exact mean squared error of `gradient_descent_predict` with a matrix, for inputs from ``N(0, S)``.

    With ``n = L``, or ``L - 1`` debiased, and ``M = (n / L^2) ((n + 1) S^2 + (tr S + d s2) S)`` it is
    ``s2 + (1 / d) (tr S - 2 (n / L) tr(S P S) + tr(S P M P^T))``.

    Args:
        preconditioner: ``P``.
        covariance: ``S``.
        length: ``L``.
        noise_variance: ``s2``.
        is_debiased: whether the inputs' mean is subtracted.

    Raises:
        ValueError: matrices that are not square and of one size, or an impossible setting.
    """
    dim = _check_covariance(covariance, length, noise_variance)
    if preconditioner.shape != covariance.shape:
        raise ValueError(f"the preconditioner is {list(covariance.shape)}, got {list(preconditioner.shape)}")
    p, s = preconditioner.double(), covariance.double()
    freedom = length - is_debiased
    moment = freedom / length**2 * ((freedom + 1) * s @ s + (s.trace() + dim * noise_variance) * s)
    error = s.trace() - 2 * freedom / length * (s @ p @ s).trace() + (s @ p @ moment @ p.T).trace()
    return noise_variance + error.item() / dim


def optimal_preconditioner(
    covariance: Float[Tensor, "dim dim"], length: int, noise_variance: float, *, is_debiased: bool = False
) -> Float[Tensor, "dim dim"]:
    """``L ((n + 1) S + (tr S + d s2) I)^-1``, with ``n`` as in `preconditioned_risk`, which it makes least.

    Args:
        covariance: ``S``.
        length: ``L``.
        noise_variance: ``s2``.
        is_debiased: whether the inputs' mean is subtracted.

    Raises:
        ValueError: a covariance that is not square, or an impossible setting.
    """
    dim = _check_covariance(covariance, length, noise_variance)
    identity = torch.eye(dim, dtype=covariance.dtype, device=covariance.device)
    inner = (length - is_debiased + 1) * covariance + (covariance.trace() + dim * noise_variance) * identity
    inverse: Tensor = torch.linalg.inv(inner)
    return length * inverse


def _variance(omega: Tensor, dim: int, length: int, noise_variance: float) -> Tensor:
    _check_setting(dim, length, noise_variance)
    return (1 + noise_variance) / length * torch.exp(dim * omega[..., :, None] * omega[..., None, :])


def _check_setting(dim: int, length: int, noise_variance: float) -> None:
    if dim < 1 or length < 1 or not 0 <= noise_variance < math.inf:
        raise ValueError(
            "the setting needs dim and length of at least 1 and a noise variance of at least 0, got "
            f"{dim}, {length} and {noise_variance}"
        )


def _check_heads(omega: Tensor, mu: Tensor) -> None:
    if omega.shape != mu.shape or not omega.dim():
        raise ValueError(f"omega and mu have one entry a head, got {list(omega.shape)} and {list(mu.shape)}")


def _check_covariance(covariance: Tensor, length: int, noise_variance: float) -> int:
    if covariance.dim() != 2 or covariance.shape[0] != covariance.shape[1]:
        raise ValueError(f"a covariance is square, got {list(covariance.shape)}")
    _check_setting(len(covariance), length, noise_variance)
    return len(covariance)
