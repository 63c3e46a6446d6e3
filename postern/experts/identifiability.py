"""Which parameters of a mixture of experts data can tell: Fisher information, and independence of activations.

Paper: "Is Temperature Sample Efficient for Softmax Gaussian Mixture of Experts?", arXiv 2401.13875. With linear scores
``c (beta1, beta0, tau)`` is the same gate for every ``c > 0``, so the information is singular at every parameter. The
same holds, with other powers of ``c``, for every activation that is positively homogeneous.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from postern.experts._likelihood import Coordinates, Likelihood
from postern.experts.gate_activation import Activation, value_and_derivative
from postern.experts.gaussian_moe import GaussianMixtureOfExperts


def fisher_information(
    model: GaussianMixtureOfExperts,
    x: Float[Tensor, "samples features"],
    y: Float[Tensor, " samples"],
    chunk_size: int = 4096,
) -> Float[Tensor, "coordinates coordinates"]:
    """``1/n sum g g^T`` with ``g = grad log p(y|x)``: the Fisher information where ``y`` comes from the model itself.

    Coordinates are, in this order, slope and bias of the gate for each expert but the last (whose row is held), slope
    and intercept of each expert, logarithms of the variances (one if tied) and, if the model learns it, of the
    temperature; `identifiability_report` names them. Memory is that of a chunk of gradients.

    Args:
        model: one model.
        x: inputs.
        y: outputs, drawn by ``model.sample(x)`` for the information at the model's own parameters.
        chunk_size: samples at a time.

    Raises:
        ValueError: several models, or samples that do not fit.
    """
    coordinates, flat, likelihood = _likelihood_of(model, x, y, chunk_size)
    total = flat.new_zeros(len(coordinates), len(coordinates))
    for scores in likelihood.per_sample_scores(flat):
        total.addmm_(scores.T, scores)
    return total / len(y)


@dataclass(frozen=True)
class IdentifiabilityReport:
    """What the Fisher information says.

    Attributes:
        names: of the coordinates.
        eigenvalues: ascending.
        rank: how many exceed the tolerance.
        null_space: directions that the data say nothing about, one column each, in the order of the names.
    """

    names: tuple[str, ...]
    eigenvalues: Float[Tensor, " coordinates"]
    rank: int
    null_space: Float[Tensor, "coordinates nullity"]

    @property
    def is_identifiable(self) -> bool:
        """Whether every direction of the coordinates shows in the data."""
        return self.rank == len(self.names)

    def directions(self, threshold: float = 1e-6) -> list[dict[str, float]]:
        """The columns of ``null_space`` by name, without entries below the threshold."""
        return [
            {name: value for name, value in zip(self.names, column.tolist(), strict=True) if abs(value) > threshold}
            for column in self.null_space.T
        ]


def identifiability_report(
    model: GaussianMixtureOfExperts,
    x: Float[Tensor, "samples features"],
    y: Float[Tensor, " samples"],
    tolerance: float = 1e-10,
) -> IdentifiabilityReport:
    """Eigenvalues, rank and null space of `fisher_information`.

    Args:
        model: one model.
        x: inputs.
        y: outputs, drawn from the model.
        tolerance: eigenvalues up to this share of the largest count as zero.

    Raises:
        ValueError: several models, samples that do not fit, or a tolerance outside (0, 1).
    """
    if not 0 < tolerance < 1:
        raise ValueError(f"the tolerance lies between 0 and 1, got {tolerance}")
    eigenvalues, vectors = torch.linalg.eigh(fisher_information(model, x, y))
    is_null = eigenvalues <= tolerance * eigenvalues[-1]
    names = _coordinates_of(model).names
    return IdentifiabilityReport(names, eigenvalues, int((~is_null).sum()), vectors[:, is_null])


class IndependenceRank(NamedTuple):
    """Rank of a set of functions on a sample.

    Attributes:
        rank: how many are linearly independent.
        num_functions: how many there are.
        smallest_singular_value: of the functions as columns of norm one; zero if they are dependent.
    """

    rank: int
    num_functions: int
    smallest_singular_value: float


def activation_independence_rank(
    phi: str | Activation | None,
    slopes: Float[Tensor, "experts features"],
    x: Float[Tensor, "samples features"],
    order: int = 1,
    tolerance: float = 1e-8,
) -> IndependenceRank:
    r"""Whether an activation meets the independence conditions under which rates are polynomial.

    With ``z_i = beta_i . x`` the functions of ``x`` are

    - order 1: ``1``, and for each expert ``phi(z_i)`` and ``x_u phi'(z_i)``;
    - order 2: also ``phi^2``, ``x_u phi phi'``, ``x_u x_v phi''`` and ``x_u x_v phi'^2`` at each ``z_i``.

    The conditions hold if all are linearly independent, which full rank on a sample shows.

    Args:
        phi: the activation, a name in ``ACTIVATIONS`` or an elementwise function.
        slopes: ``beta_i``, distinct and not zero (the held row of the gate is left out: its ``phi`` is constant).
        x: more samples than functions, spread over the inputs.
        order: 1 for models with the right number of experts, 2 for those with too many.
        tolerance: singular values up to this share of the largest count as zero.

    Raises:
        ValueError: another order, shapes that do not fit, or fewer samples than functions.
    """
    if order not in (1, 2):
        raise ValueError(f"order is 1 or 2, got {order}")
    if slopes.dim() != 2 or x.dim() != 2 or slopes.shape[1] != x.shape[1]:
        raise ValueError(
            f"slopes are [experts, features] and x [samples, features], got {list(slopes.shape)} and {list(x.shape)}"
        )
    x = x.double()

    def derivative(z: Tensor) -> Tensor:
        return value_and_derivative(phi, z)[1]

    columns = [torch.ones(len(x), 1, dtype=x.dtype, device=x.device)]
    pairs = list(combinations_with_replacement(range(x.shape[1]), 2))
    products = torch.stack([x[:, u] * x[:, v] for u, v in pairs], dim=1)
    for slope in slopes.double():
        z = x @ slope
        first, second = value_and_derivative(derivative, z)
        value = value_and_derivative(phi, z)[0]
        columns += [value[:, None], x * first[:, None]]
        if order == 2:
            columns += [value.square()[:, None], x * (value * first)[:, None]]
            columns += [products * second[:, None], products * first.square()[:, None]]
    design = torch.cat(columns, dim=1)
    if len(design) < design.shape[1]:
        raise ValueError(f"{design.shape[1]} functions need at least as many samples, got {len(design)}")
    norms = design.norm(dim=0)
    singular = torch.linalg.svdvals(design / torch.where(norms > 0, norms, 1.0))
    return IndependenceRank(int((singular > tolerance * singular[0]).sum()), design.shape[1], float(singular[-1]))


def _coordinates_of(model: GaussianMixtureOfExperts) -> Coordinates:
    if model.coef.dim() != 2:
        raise ValueError(f"the information is that of one model, got {len(model.coef)}")
    num_experts, num_features = model.coef.shape
    return Coordinates(
        num_experts, num_features, model.log_temperature.requires_grad, shares_variance=model.covariance == "tied"
    )


def _likelihood_of(
    model: GaussianMixtureOfExperts, x: Tensor, y: Tensor, chunk_size: int
) -> tuple[Coordinates, Tensor, Likelihood]:
    coordinates = _coordinates_of(model)
    if x.dim() != 2 or x.shape[1] != coordinates.num_features or y.shape != x.shape[:1] or not len(y):
        raise ValueError(
            f"samples are x [samples, {coordinates.num_features}] and y [samples], got {list(x.shape)} and "
            f"{list(y.shape)}"
        )
    mixture = model.mixture.to(torch.float64)
    likelihood = Likelihood(x.double(), y.double(), model.gate, coordinates, mixture[None], chunk_size)
    return coordinates, coordinates.flatten(mixture), likelihood
