"""How far a fitted mixture of experts is from the true one: losses over Voronoi cells.

Papers: "Statistical Perspective of Top-K Sparse Softmax Gating Mixture of Experts" (arXiv 2309.13850) and, for gates
with a temperature, arXiv 2401.13875. Each fitted expert belongs to the true one that is nearest. With spare experts
several share a cell, and what converges slowly in them enters the loss with a high power, so that the loss itself
converges fast. It says little about single parameters: look at these too.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from postern.experts.gaussian_moe import MixtureParameters

LossKind = Literal["exact", "over"]

# r(m), the smallest degree at which a system of polynomials has no solution; from four copies on at least 7
CELL_EXPONENTS: Mapping[int, float] = MappingProxyType({2: 4.0, 3: 6.0})
_LARGER_CELLS = 7.0


def cell_exponent(size: int, exponents: Mapping[int, float] = CELL_EXPONENTS) -> float:
    """``r(m)`` of a cell of ``m`` fitted experts: 4 for two, 6 for three, 7 (a lower bound) for more; 1 for one.

    Raises:
        ValueError: a size below 1.
    """
    if size < 1:
        raise ValueError(f"a cell that is fitted has at least one expert, got {size}")
    return 1.0 if size == 1 else exponents.get(size, _LARGER_CELLS)


def voronoi_cells(fitted: MixtureParameters, truth: MixtureParameters) -> Int[Tensor, "*models experts"]:
    """The true expert that each fitted one is nearest to, by ``||(beta1, a, b, sigma) - (beta1, a, b, sigma)*||``.

    Align the gates first (`align_gate_translation`). Of equally near ones it is the first.

    Args:
        fitted: one mixture or several.
        truth: one mixture.

    Raises:
        ValueError: mixtures of inputs of different sizes, or several true ones.
    """
    _check(fitted, truth)
    distance: Tensor = torch.cdist(_atoms(fitted), _atoms(truth), compute_mode="donot_use_mm_for_euclid_dist")
    return distance.argmin(dim=-1)


def align_gate_translation(
    fitted: MixtureParameters, truth: MixtureParameters, reference: int = -1
) -> MixtureParameters:
    """The same fitted model, its gate moved so that one expert has the true slope and bias.

    A linear gate does not change when a vector is added to all slopes and a number to all biases. Here these are such
    that the fitted experts which are nearest to the true expert ``reference``, by their regressions and variances, have
    its slope on average (weighted by ``exp(beta0)``) and its mass ``exp(beta0)`` together. Not for gates with an
    activation, whose slopes mean something by themselves.

    Args:
        fitted: one mixture or several.
        truth: one mixture.
        reference: index of the true expert, whose row is 0 by the paper's convention: the last.

    Raises:
        ValueError: mixtures of inputs of different sizes, or several true ones.
    """
    _check(fitted, truth)
    distance = torch.cdist(_regressions(fitted), _regressions(truth), compute_mode="donot_use_mm_for_euclid_dist")
    reference %= truth.num_experts
    is_member = distance.argmin(dim=-1) == reference
    nearest = functional.one_hot(distance[..., reference].argmin(dim=-1), fitted.num_experts).bool()
    is_member = torch.where(is_member.any(dim=-1, keepdim=True), is_member, nearest)
    log_mass = fitted.gate_intercept.masked_fill(~is_member, float("-inf"))
    mean = (torch.softmax(log_mass, dim=-1).unsqueeze(-1) * fitted.gate_coef).sum(dim=-2, keepdim=True)
    total = torch.logsumexp(log_mass, dim=-1, keepdim=True)
    return MixtureParameters(
        fitted.gate_coef - mean + truth.gate_coef[reference],
        fitted.gate_intercept - total + truth.gate_intercept[reference],
        fitted.coef,
        fitted.intercept,
        fitted.variance,
        fitted.temperature,
    )


def voronoi_loss(
    fitted: MixtureParameters,
    truth: MixtureParameters,
    top_k: int,
    kind: LossKind = "exact",
    exponents: Mapping[int, float] = CELL_EXPONENTS,
) -> Float[Tensor, "*models"]:
    r"""``D1`` (exact) and ``D2`` (over-specified) of paper 2309.13850, for gates that are aligned.

    ::

        D = max_{l_1..l_K} sum_j { sum_{i in A_{l_j}} exp(beta0_i) dist_i + | sum_i exp(beta0_i) - exp(beta0*_{l_j}) | }
        dist_i = ||dbeta1|| + ||da|| + |db| + |dsigma|                    in D1, and in D2 for cells of one expert
        dist_i = ||dbeta1||^r + ||da||^{r/2} + |db|^r + |dsigma|^{r/2}    in D2 for cells of m > 1, r = r(m)

    The largest sum over K cells is the sum of the K largest terms.

    Args:
        fitted: one mixture or several.
        truth: one mixture.
        top_k: ``K``, how many experts the true gate keeps.
        kind: "exact" for ``D1``, "over" for ``D2``.
        exponents: ``r(m)`` by cell size; see `cell_exponent`.

    Raises:
        ValueError: mixtures that do not belong together, ``top_k`` out of range, or an unknown kind.
    """
    if kind not in get_args(LossKind):
        raise ValueError(f"kind must be 'exact' or 'over', got {kind!r}")
    if not 1 <= top_k <= truth.num_experts:
        raise ValueError(f"of {truth.num_experts} experts between 1 and as many are kept, got top_k={top_k}")
    cells = voronoi_cells(fitted, truth)
    slopes, coefs, intercepts, variances = _differences(fitted, truth, cells)
    if kind == "exact":
        distance = slopes + coefs + intercepts + variances
    else:
        sizes = functional.one_hot(cells, truth.num_experts).sum(dim=-2).gather(-1, cells)
        table = [1.0, *(cell_exponent(size, exponents) for size in range(1, fitted.num_experts + 1))]
        r = torch.tensor(table, dtype=slopes.dtype, device=slopes.device)[sizes]
        half = torch.where(sizes == 1, r, r / 2)
        distance = slopes**r + coefs**half + intercepts**r + variances**half
    terms = _cell_terms(fitted.gate_intercept.exp(), truth.gate_intercept.exp(), distance, cells)
    return terms.topk(top_k, dim=-1).values.sum(dim=-1)


def dense_to_sparse_loss(
    fitted: MixtureParameters, truth: MixtureParameters, exponent: float = 1.0
) -> Float[Tensor, "*models"]:
    r"""``D_{1,r}`` of paper 2401.13875, which counts the temperature among the parameters.

    ::

        sum_j | sum_{i in A_j} exp(beta0_i / tau) - exp(beta0*_j / tau*) |
            + sum_j sum_{i in A_j} exp(beta0_i / tau) (||dbeta1||^r + |dtau|^r + ||da||^r + |db|^r + |dnu|^r)

    Args:
        fitted: one mixture or several.
        truth: one mixture.
        exponent: ``r``, at least 1.

    Raises:
        ValueError: mixtures that do not belong together, or an exponent below 1.
    """
    if not exponent >= 1:
        raise ValueError(f"the exponent is at least 1, got {exponent}")
    cells = voronoi_cells(fitted, truth)
    temperature = (fitted.temperature - truth.temperature).abs().unsqueeze(-1)
    distance = torch.stack([part**exponent for part in _differences(fitted, truth, cells)]).sum(dim=0)
    distance = distance + temperature**exponent
    masses = [torch.exp(each.gate_intercept / each.temperature.unsqueeze(-1)) for each in (fitted, truth)]
    return _cell_terms(masses[0], masses[1], distance, cells).sum(dim=-1)


def _check(fitted: MixtureParameters, truth: MixtureParameters) -> None:
    if truth.variance.dim() != 1:
        raise ValueError(f"the truth is one mixture, got variances {list(truth.variance.shape)}")
    if fitted.num_features != truth.num_features:
        raise ValueError(
            f"both mixtures have inputs of one size, got {fitted.num_features} fitted and {truth.num_features} true"
        )


def _regressions(mixture: MixtureParameters) -> Tensor:
    return torch.cat([mixture.coef, mixture.intercept.unsqueeze(-1), mixture.variance.unsqueeze(-1)], dim=-1)


def _atoms(mixture: MixtureParameters) -> Tensor:
    return torch.cat([mixture.gate_coef, _regressions(mixture)], dim=-1)


def _differences(fitted: MixtureParameters, truth: MixtureParameters, cells: Tensor) -> tuple[Tensor, ...]:
    """Distances of each fitted expert to the one of its cell: gate slope, slope, intercept, variance."""
    return (
        (fitted.gate_coef - truth.gate_coef[cells]).norm(dim=-1),
        (fitted.coef - truth.coef[cells]).norm(dim=-1),
        (fitted.intercept - truth.intercept[cells]).abs(),
        (fitted.variance - truth.variance[cells]).abs(),
    )


def _cell_terms(mass: Tensor, true_mass: Tensor, distance: Tensor, cells: Tensor) -> Tensor:
    """``sum_i mass_i distance_i + |sum_i mass_i - mass*_j|`` of each cell."""
    is_member = functional.one_hot(cells, true_mass.shape[-1]).to(mass.dtype)
    moved = ((mass * distance).unsqueeze(-1) * is_member).sum(dim=-2)
    return moved + ((mass.unsqueeze(-1) * is_member).sum(dim=-2) - true_mass).abs()
