"""The log-likelihood of Gaussian mixtures of experts and its derivatives, in one pass over the samples in chunks.

Everything is written out, since autograd would keep every intermediate of every sample. Experts come before samples
(``[models, experts, samples]``), so that sums over few experts run along the samples. Experts that a sparse gate drops
cost the gradient their rows of two matrix products, and little more. The sums of EM, of normal equations and of the
gate's information, run over all experts, with zeros where one is dropped. Coordinates of a model:

    gate[i] = (beta1_i, beta0_i) for all experts but the last, whose row is held;  expert[i] = (a_i, b_i);
    log sigma_i, or one for all;  log tau if it is learnt.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from postern.experts.gate_activation import value_and_derivative
from postern.experts.gaussian_moe import LOG_2_PI, MixtureParameters, SoftmaxGate
from postern.experts.topk_softmax import topk_indices, topk_mask

# numbers that a chunk of one intermediate holds: they stay in the cache of a core
CHUNK_NUMBERS = 2**15


@dataclass(frozen=True)
class Coordinates:
    """Which numbers of a mixture are free, and in what order.

    Args:
        num_experts: ``k``.
        num_features: ``d``.
        learns_temperature: whether ``log tau`` is among them.
        shares_variance: whether one variance is that of all experts.
    """

    num_experts: int
    num_features: int
    learns_temperature: bool
    shares_variance: bool = False

    @property
    def num_gate(self) -> int:
        """Coordinates of the gate, without the temperature."""
        return (self.num_experts - 1) * (self.num_features + 1)

    @property
    def num_expert(self) -> int:
        """Coordinates of all regressions."""
        return self.num_experts * (self.num_features + 1)

    @property
    def num_variances(self) -> int:
        """Coordinates of all variances."""
        return 1 if self.shares_variance else self.num_experts

    def __len__(self) -> int:
        return self.num_gate + self.num_expert + self.num_variances + self.learns_temperature

    @cached_property
    def names(self) -> tuple[str, ...]:
        """One name a coordinate."""
        names = []
        for kind, experts in (("gate_", self.num_experts - 1), ("", self.num_experts)):
            for i in range(experts):
                names += [f"{kind}coef[{i}, {j}]" for j in range(self.num_features)] + [f"{kind}intercept[{i}]"]
        names += ["log_variance"] if self.shares_variance else [f"log_variance[{i}]" for i in range(self.num_experts)]
        return (*names, *(["log_temperature"] if self.learns_temperature else []))

    def flatten(self, parameters: MixtureParameters) -> Float[Tensor, "*models coordinates"]:
        """The free numbers; a variance that is shared is the geometric mean."""
        gate = torch.cat([parameters.gate_coef, parameters.gate_intercept.unsqueeze(-1)], dim=-1)[..., :-1, :]
        expert = torch.cat([parameters.coef, parameters.intercept.unsqueeze(-1)], dim=-1)
        log_variance = parameters.variance.log()
        if self.shares_variance:
            log_variance = log_variance.mean(dim=-1, keepdim=True)
        parts = [gate.flatten(-2), expert.flatten(-2), log_variance]
        if self.learns_temperature:
            parts.append(parameters.temperature.log().unsqueeze(-1))
        return torch.cat(parts, dim=-1)

    def split(self, flat: Float[Tensor, "*models coordinates"]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Gate ``[.., k - 1, d + 1]``, experts ``[.., k, d + 1]``, log variances ``[.., k]``, ``log tau`` if learnt."""
        sizes = [self.num_gate, self.num_expert, self.num_variances, int(self.learns_temperature)]
        gate, expert, log_variance, log_temperature = torch.split(flat, sizes, dim=-1)
        width = self.num_features + 1
        return (
            gate.reshape(*flat.shape[:-1], self.num_experts - 1, width),
            expert.reshape(*flat.shape[:-1], self.num_experts, width),
            log_variance.expand(*flat.shape[:-1], self.num_experts),
            log_temperature,
        )

    def pooled(self, by_expert: Tensor, dim: int) -> Tensor:
        """Derivatives in the log variance of each expert as those in the coordinates."""
        return by_expert.sum(dim=dim, keepdim=True) if self.shares_variance else by_expert

    def unflatten(self, flat: Float[Tensor, "*models coordinates"], held: MixtureParameters) -> MixtureParameters:
        """The mixtures of free numbers; what is not free is taken from ``held``."""
        gate, expert, log_variance, log_temperature = self.split(flat)
        last = torch.cat([held.gate_coef, held.gate_intercept.unsqueeze(-1)], dim=-1)[..., -1:, :]
        gate = torch.cat([gate, last.expand(*gate.shape[:-2], 1, gate.shape[-1])], dim=-2)
        return MixtureParameters(
            gate[..., :-1].clone(),
            gate[..., -1].clone(),
            expert[..., :-1].clone(),
            expert[..., -1].clone(),
            log_variance.exp(),
            log_temperature.squeeze(-1).exp() if self.learns_temperature else held.temperature.clone(),
        )


class _Terms(NamedTuple):
    """What one chunk of samples gives: ``[models, experts, samples]`` but for the last two."""

    slope: Tensor | None  # phi'(scores); None for the identity
    logits: Tensor
    weights: Tensor
    responsibilities: Tensor
    residual: Tensor
    features: Tensor  # [features + 1, samples], the last row of ones
    log_likelihood: Tensor  # [models, samples]


class Statistics(NamedTuple):
    """Means over the samples: all that an iteration of EM needs.

    Attributes:
        log_likelihood: ``[models]``.
        gate_gradient: ascent direction in the gate's coordinates, ``log tau`` last, ``[models, gate]``.
        gate_information: Fisher information of the gate given the responsibilities, ``[models, gate, gate]``.
        mass: share of the samples of each expert, ``[models, experts]``.
        gram: ``E[r z z^T]`` with ``z = (x, 1)``, ``[models, experts, d + 1, d + 1]``.
        moment: ``E[r e z]`` with the residual ``e``, ``[models, experts, d + 1]``.
        square: ``E[r e^2]``, ``[models, experts]``.
    """

    log_likelihood: Tensor
    gate_gradient: Tensor
    gate_information: Tensor
    mass: Tensor
    gram: Tensor
    moment: Tensor
    square: Tensor


class Likelihood:
    """The likelihood of samples as a function of the coordinates of several models.

    Memory is that of the samples and of a chunk, whatever their number.

    Args:
        x: inputs, on the device where all is computed.
        y: outputs.
        gate: how experts are weighed.
        coordinates: what is free.
        held: what is not: the gate's last row, and the temperature unless it is learnt; of one model, or of as many as
            are evaluated.
        chunk_size: samples at a time; chosen by the sizes if None.
    """

    def __init__(
        self,
        x: Float[Tensor, "samples features"],
        y: Float[Tensor, " samples"],
        gate: SoftmaxGate,
        coordinates: Coordinates,
        held: MixtureParameters,
        chunk_size: int | None = None,
    ) -> None:
        self.x = x
        self.y = y
        self.gate = gate
        self.coordinates = coordinates
        last = torch.cat([held.gate_coef, held.gate_intercept.unsqueeze(-1)], dim=-1)[..., -1:, :]
        self.last_row = last.reshape(-1, 1, last.shape[-1])
        self.temperature = held.temperature.reshape(-1, 1)
        self.chunk_size = chunk_size

    def take(self, index: Tensor) -> Likelihood:
        """The same for some of the models."""
        likelihood = object.__new__(Likelihood)
        likelihood.__dict__.update(self.__dict__)
        if len(self.last_row) > 1:
            likelihood.last_row = self.last_row[index]
            likelihood.temperature = self.temperature[index]
        return likelihood

    def value_and_gradient(
        self, flat: Float[Tensor, "models coordinates"]
    ) -> tuple[Float[Tensor, " models"], Float[Tensor, "models coordinates"]]:
        """Mean log-likelihood and its gradient."""
        total = flat.new_zeros(len(flat))
        gradient = torch.zeros_like(flat)
        for terms in self._chunks(flat):
            total += terms.log_likelihood.sum(dim=-1)
            gradient += torch.cat(self._score_sums(terms, flat), dim=-1)
        return total / len(self.y), gradient / len(self.y)

    def per_sample_scores(self, flat: Float[Tensor, " coordinates"]) -> Iterator[Float[Tensor, "chunk coordinates"]]:
        """Gradients of the log-likelihood of each sample, chunk by chunk, for one model."""
        num_features = self.coordinates.num_features
        for terms in self._chunks(flat[None]):
            temperature, inverse_variance = self._scales(flat[None])
            d_logits = (terms.weights.neg() + terms.responsibilities)[0] / temperature
            d_gate = d_logits[:-1, None] * terms.features
            if terms.slope is not None:
                d_gate[:, :num_features] *= terms.slope[0, :-1, None]
            weighted = terms.responsibilities[0] * terms.residual[0] * inverse_variance[0, :, None]
            d_expert = weighted[:, None] * terms.features
            d_log_variance = self.coordinates.pooled(
                0.5 * (weighted * terms.residual[0] - terms.responsibilities[0]), dim=0
            )
            parts = [d_gate.flatten(0, 1), d_expert.flatten(0, 1), d_log_variance]
            if self.coordinates.learns_temperature:
                # logits are already over the temperature, of which d_logits has one factor too many
                parts.append(-(d_logits * temperature * terms.logits[0]).sum(dim=0, keepdim=True))
            yield torch.cat(parts).T

    def em_statistics(self, flat: Float[Tensor, "models coordinates"]) -> Statistics:
        """What an iteration of EM needs."""
        coordinates = self.coordinates
        models, k, width = len(flat), coordinates.num_experts, coordinates.num_features + 1
        learns = coordinates.learns_temperature
        num_gate = coordinates.num_gate
        log_likelihood = flat.new_zeros(models)
        gradient = flat.new_zeros(models, num_gate + learns)
        information = flat.new_zeros(models, num_gate + learns, num_gate + learns)
        mass, square = flat.new_zeros(2, models, k)
        gram = flat.new_zeros(models, k, width, width)
        moment = flat.new_zeros(models, k, width)
        temperature, _ = self._scales(flat)
        for terms in self._chunks(flat):
            r, z = terms.responsibilities, terms.features
            log_likelihood += terms.log_likelihood.sum(dim=-1)
            mass += r.sum(dim=-1)
            gram += (r.unsqueeze(-2) * z) @ z.T
            weighted = r * terms.residual
            moment += weighted @ z.T
            square += (weighted * terms.residual).sum(dim=-1)

            # J_i: derivatives of the logit of expert i in its own row and in log tau
            jacobian = (z / temperature[..., None, None]).expand(models, k, width, -1)
            if terms.slope is not None:
                jacobian = torch.cat([jacobian[..., :-1, :] * terms.slope.unsqueeze(-2), jacobian[..., -1:, :]], dim=-2)
            if learns:
                jacobian = torch.cat([jacobian, -terms.logits.unsqueeze(-2)], dim=-2)
            d_logits = (r - terms.weights).unsqueeze(-2)
            gradient += self._assembled((d_logits * jacobian).sum(dim=-1, keepdim=True)).squeeze(-1)
            weighted_jacobian = terms.weights.unsqueeze(-2) * jacobian
            blocks = weighted_jacobian @ jacobian.mT
            rows = self._assembled(weighted_jacobian)
            information += self._block_diagonal(blocks) - rows @ rows.mT
        n = len(self.y)
        sums = (log_likelihood, gradient, information, mass, gram, moment, square)
        return Statistics(*(total / n for total in sums))

    def _assembled(self, by_expert: Tensor) -> Tensor:
        """``[models, k, rows, samples]`` as ``[models, gate + learnt temperature, samples]``."""
        width = self.coordinates.num_features + 1
        own = by_expert[:, :-1, :width].flatten(1, 2)
        if not self.coordinates.learns_temperature:
            return own
        return torch.cat([own, by_expert[:, :, width].sum(dim=1, keepdim=True)], dim=1)

    def _block_diagonal(self, blocks: Tensor) -> Tensor:
        """``[models, k, rows, rows]`` as a matrix in the gate's coordinates, of which ``log tau`` is shared."""
        k, width = self.coordinates.num_experts, self.coordinates.num_features + 1
        num_gate, learns = self.coordinates.num_gate, self.coordinates.learns_temperature
        matrix = blocks.new_zeros(len(blocks), num_gate + learns, num_gate + learns)
        for i in range(k - 1):
            own = slice(i * width, (i + 1) * width)
            matrix[:, own, own] = blocks[:, i, :width, :width]
            if learns:
                matrix[:, own, -1] = matrix[:, -1, own] = blocks[:, i, :width, width]
        if learns:
            matrix[:, -1, -1] = blocks[:, :, width, width].sum(dim=1)
        return matrix

    def _scales(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Temperatures ``[models, 1]`` and inverse variances ``[models, experts]``."""
        _, _, log_variance, log_temperature = self.coordinates.split(flat)
        learns = self.coordinates.learns_temperature
        return log_temperature.exp() if learns else self.temperature, torch.exp(-log_variance)

    def _score_sums(self, terms: _Terms, flat: Tensor) -> list[Tensor]:
        """Sums of the scores over a chunk, in the order of the coordinates."""
        temperature, inverse_variance = self._scales(flat)
        r, z = terms.responsibilities, terms.features
        d_logits = r - terms.weights
        parts = []
        if self.coordinates.learns_temperature:
            parts.append(-(d_logits * terms.logits).sum(dim=(-1, -2)).unsqueeze(-1))
        d_logits = d_logits[:, :-1]
        d_intercept = d_logits.sum(dim=-1, keepdim=True)
        d_scores = d_logits if terms.slope is None else d_logits * terms.slope[:, :-1]
        d_gate = torch.cat([d_scores @ z[:-1].T, d_intercept], dim=-1) / temperature.unsqueeze(-1)
        weighted = r * terms.residual
        d_expert = (weighted @ z.T) * inverse_variance.unsqueeze(-1)
        square = (weighted * terms.residual).sum(dim=-1)
        d_log_variance = self.coordinates.pooled(0.5 * (square * inverse_variance - r.sum(dim=-1)), dim=-1)
        return [d_gate.flatten(1), d_expert.flatten(1), d_log_variance, *parts]

    def _chunks(self, flat: Tensor) -> Iterator[_Terms]:
        coordinates, gate = self.coordinates, self.gate
        rows, expert, log_variance, _ = coordinates.split(flat)
        rows = torch.cat([rows, self.last_row.expand(len(flat), -1, -1)], dim=-2)
        temperature, inverse_variance = self._scales(flat)
        has_temperature = coordinates.learns_temperature or bool((temperature != 1).any())
        half_log_variance = 0.5 * log_variance.unsqueeze(-1)
        half_precision = 0.5 * inverse_variance.unsqueeze(-1)
        size = self.chunk_size or max(1024, CHUNK_NUMBERS // (len(flat) * coordinates.num_experts))
        for start in range(0, len(self.y), size):
            x, y = self.x[start : start + size], self.y[start : start + size]
            z = torch.cat([x.T, x.new_ones(1, len(x))])
            slope, intercept = None, rows[..., -1:]
            if gate.activation is None:
                activated = rows[..., :-1] @ z[:-1]
            else:
                activated, slope = value_and_derivative(gate.activation, rows[..., :-1] @ z[:-1])
            logits = activated + intercept
            selected = activated if gate.select_on == "score" else logits
            if has_temperature:
                logits = logits / temperature.unsqueeze(-1)
            residual = y - expert @ z
            kept, cost = logits, residual.square().mul_(half_precision).add_(half_log_variance)
            index = mask = None
            if gate.keeps_fewer_than(coordinates.num_experts):
                assert gate.top_k is not None
                # one pass over the experts finds one that is kept, or one that is dropped
                if 2 * gate.top_k <= coordinates.num_experts:
                    index = topk_indices(selected, gate.top_k, dim=-2)
                    kept, cost = kept.gather(-2, index), cost.gather(-2, index)
                else:
                    mask = topk_mask(selected, gate.top_k, dim=-2)
            # both softmaxes from their largest terms; the likelihood is the ratio of their sums
            weights, weight_sum, largest_logit = _exponentials(kept, mask)
            responsibilities, joint_sum, largest_joint = _exponentials(kept - cost, mask)
            log_likelihood = (joint_sum / weight_sum).log_().add_(largest_joint).sub_(largest_logit).squeeze(-2)
            weights.div_(weight_sum)
            responsibilities.div_(joint_sum)
            if index is not None:
                weights = torch.zeros_like(logits).scatter_(-2, index, weights)
                responsibilities = torch.zeros_like(logits).scatter_(-2, index, responsibilities)
            log_likelihood -= 0.5 * LOG_2_PI
            yield _Terms(slope, logits, weights, responsibilities, residual, z, log_likelihood)


def _exponentials(logits: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """``exp(l - max l)`` over experts, zero off the mask; their sum, and the maximum."""
    if mask is None:
        largest = logits.amax(-2, keepdim=True)
        exponentials = (logits - largest).exp_()
    else:  # exponentials of -inf are slow
        largest = logits.masked_fill(~mask, float("-inf")).amax(-2, keepdim=True)
        exponentials = (logits - largest).clamp_max_(0).exp_().mul_(mask)
    return exponentials, exponentials.sum(-2, keepdim=True), largest
