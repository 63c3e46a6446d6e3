"""A Gaussian mixture of experts: linear regressions with Gaussian noise, mixed by a softmax gate.

Papers: "Statistical Perspective of Top-K Sparse Softmax Gating Mixture of Experts" (arXiv 2309.13850) and "Is
Temperature Sample Efficient for Softmax Gaussian Mixture of Experts?" (arXiv 2401.13875). One model holds both gates:
top-K selection, a temperature and an activation can be combined.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from postern.experts.gate_activation import Activation, resolve_activation
from postern.experts.topk_softmax import SelectOn, check_select_on, topk_mask
from postern.precision import without_autocast

Covariance = Literal["per-expert", "tied"]

Values = Tensor | np.ndarray | Sequence[Any] | float

LOG_2_PI = math.log(2 * math.pi)


@dataclass(frozen=True)
class SoftmaxGate:
    """How experts are weighed: ``softmax(TopK((phi(v) + u) / tau))`` of scores ``v_i = beta1_i . x``.

    Args:
        top_k: how many experts are kept; all if None.
        activation: ``phi``: a name in ``ACTIVATIONS`` or an elementwise function; the identity if None.
        select_on: whether the largest ``phi(v_i)`` are kept ("score", as in the paper) or the largest
            ``phi(v_i) + u_i`` ("score+bias").

    Raises:
        ValueError: an unknown activation or ``select_on``, or ``top_k`` below 1.
    """

    top_k: int | None = None
    activation: str | Activation | None = None
    select_on: SelectOn = "score"

    def __post_init__(self) -> None:
        check_select_on(self.select_on)
        resolve_activation(self.activation)
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"a gate keeps at least one expert, got top_k={self.top_k}")

    def log_weights(
        self, scores: Float[Tensor, "*shape experts"], bias: Float[Tensor, "*experts"], temperature: Tensor
    ) -> Float[Tensor, "*shape experts"]:
        """Logarithms of the weights, ``-inf`` for experts that are not kept.

        Args:
            scores: ``v``.
            bias: ``u``, broadcast against the scores.
            temperature: ``tau``, broadcast against the scores.
        """
        activated = resolve_activation(self.activation)(scores)
        biased = activated + bias
        logits = biased / temperature  # before the mask: infinity has no gradient in the temperature
        if self.keeps_fewer_than(scores.shape[-1]):
            assert self.top_k is not None
            mask = topk_mask(activated if self.select_on == "score" else biased, self.top_k)
            logits = logits.masked_fill(~mask, float("-inf"))
        return torch.log_softmax(logits, dim=-1)

    def keeps_fewer_than(self, num_experts: int) -> bool:
        """Whether any expert is dropped."""
        return self.top_k is not None and self.top_k < num_experts


@dataclass(frozen=True, eq=False, init=False)
class MixtureParameters:
    """Parameters of one mixture or, with leading axes, of several. Numbers become tensors of float64.

    Args:
        gate_coef: ``beta1``, slopes of the gate.
        gate_intercept: ``beta0``.
        coef: ``a``, slopes of the experts.
        intercept: ``b``.
        variance: ``sigma`` of paper 2309.13850 and ``nu`` of 2401.13875, variances of the noise.
        temperature: ``tau``; 1 if None.

    Raises:
        ValueError: shapes that do not belong together, or variances or temperatures that are not positive.
    """

    gate_coef: Float[Tensor, "*models experts features"]
    gate_intercept: Float[Tensor, "*models experts"]
    coef: Float[Tensor, "*models experts features"]
    intercept: Float[Tensor, "*models experts"]
    variance: Float[Tensor, "*models experts"]
    temperature: Float[Tensor, "*models"]

    def __init__(
        self,
        gate_coef: Values,
        gate_intercept: Values,
        coef: Values,
        intercept: Values,
        variance: Values,
        temperature: Values | None = None,
    ) -> None:
        given = [gate_coef, gate_intercept, coef, intercept, variance]
        given += [] if temperature is None else [temperature]
        values = [
            value if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.float64) for value in given
        ]
        if temperature is None:
            values.append(values[-1].new_ones(values[-1].shape[:-1]))
        names = [field.name for field in fields(self)]
        *models, experts, features = values[2].shape if values[2].dim() >= 2 else (0, 0)
        vector, matrix = (*models, experts), (*models, experts, features)
        if tuple(tuple(value.shape) for value in values) != (matrix, vector, matrix, vector, vector, tuple(models)):
            raise ValueError(
                f"{', '.join(names)} have the shapes [.., experts, features] for coefficients, [.., experts] else and "
                f"[..] for the temperature, got {', '.join(str(list(value.shape)) for value in values)}"
            )
        for name, value in zip(names[-2:], values[-2:], strict=True):
            if not (value > 0).all():
                raise ValueError(f"each {name} is positive, got {value.tolist()}")
        for name, value in zip(names, values, strict=True):
            object.__setattr__(self, name, value)

    def __iter__(self) -> Iterator[Tensor]:
        return (getattr(self, field.name) for field in fields(self))

    @property
    def num_experts(self) -> int:
        """Experts of a mixture."""
        return self.variance.shape[-1]

    @property
    def num_features(self) -> int:
        """Entries of an input."""
        return self.coef.shape[-1]

    def __getitem__(self, index: Any) -> MixtureParameters:
        """Some of several mixtures."""
        return MixtureParameters(*(value[index] for value in self))

    def to(self, *args: Any, **kwargs: Any) -> MixtureParameters:
        """All tensors on another device or in another dtype, as `torch.Tensor.to`."""
        return MixtureParameters(*(value.to(*args, **kwargs) for value in self))


class GaussianMixtureOfExperts(nn.Module):
    r"""``p(y|x) = sum_i w_i(x) N(y; a_i . x + b_i, sigma_i)``, for one set of parameters or for several at once.

    ::

        w(x) = softmax(TopK((phi(beta1 . x) + beta0) / tau))

    `fit_mixture` and `GaussianMoERegressor` estimate the parameters; they may also be trained as those of any module,
    by ``-model(x, y).mean()``. All is computed in the dtype of the parameters, float64 by default, also under autocast:
    rates of convergence are measured where float32 has run out of digits.

    Args:
        num_features: entries of an input, ``d``.
        num_experts: ``k``.
        top_k: how many experts the gate keeps; all if None.
        activation: ``phi``; see `SoftmaxGate`.
        select_on: see `SoftmaxGate`.
        temperature: ``tau`` at first, positive.
        learns_temperature: whether ``tau`` is trained. With linear scores it cannot be told from their scale.
        covariance: "per-expert": each expert has a variance, as in the papers; "tied": all have the same. Outputs are
            numbers, for which full, diagonal and spherical covariances are one and the same.
        num_models: how many models of different initial values; None for one, without that axis.
        dtype: of the parameters.

    Attributes:
        gate: the `SoftmaxGate`.

    Raises:
        ValueError: sizes below 1, ``top_k`` above ``num_experts``, a temperature that is not positive, or an unknown
            covariance.
    """

    def __init__(
        self,
        num_features: int,
        num_experts: int,
        top_k: int | None = None,
        *,
        activation: str | Activation | None = None,
        select_on: SelectOn = "score",
        temperature: float = 1.0,
        learns_temperature: bool = False,
        covariance: Covariance = "per-expert",
        num_models: int | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__()
        sizes = {"num_features": num_features, "num_experts": num_experts}
        sizes |= {} if num_models is None else {"num_models": num_models}
        if min(sizes.values()) < 1:
            raise ValueError(f"sizes must be at least 1, got {sizes}")
        if top_k is not None and top_k > num_experts:
            raise ValueError(f"of {num_experts} experts between 1 and {num_experts} can be kept, got top_k={top_k}")
        if not temperature > 0:
            raise ValueError(f"a temperature is positive, got {temperature}")
        check_covariance(covariance)
        self.gate = SoftmaxGate(top_k, activation, select_on)
        self.covariance = covariance
        models = () if num_models is None else (num_models,)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*models, *shape, dtype=dtype))

        self.gate_coef = parameter(num_experts, num_features)
        self.gate_intercept = parameter(num_experts)
        self.coef = parameter(num_experts, num_features)
        self.intercept = parameter(num_experts)
        self.log_variance = parameter(num_experts if covariance == "per-expert" else 1)
        self.log_temperature = nn.Parameter(
            torch.full(models, math.log(temperature), dtype=dtype), requires_grad=learns_temperature
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw slopes and intercepts of gate and experts from N(0, 1); set variances to 1. The temperature stays."""
        with torch.no_grad():
            for values in (self.gate_coef, self.gate_intercept, self.coef, self.intercept):
                values.normal_()
            self.log_variance.zero_()

    @classmethod
    def from_parameters(
        cls,
        parameters: MixtureParameters,
        gate: SoftmaxGate = SoftmaxGate(),  # frozen
        *,
        learns_temperature: bool = False,
        covariance: Covariance = "per-expert",
    ) -> Self:
        """Make a model of given parameters.

        Raises:
            ValueError: more than one leading axis, a gate that keeps more experts than there are, or a tied covariance
                and variances that differ.
        """
        *models, num_experts, num_features = parameters.coef.shape
        variance = parameters.variance
        if covariance == "tied":
            if not torch.equal(variance, variance[..., :1].expand_as(variance)):
                raise ValueError(f"experts of a tied covariance have one variance, got {variance.tolist()}")
            variance = variance[..., :1]
        if len(models) > 1:
            raise ValueError(f"several models have one leading axis, got coefficients {list(parameters.coef.shape)}")
        model = cls(
            num_features,
            num_experts,
            gate.top_k,
            activation=gate.activation,
            select_on=gate.select_on,
            learns_temperature=learns_temperature,
            covariance=covariance,
            num_models=models[0] if models else None,
            dtype=parameters.coef.dtype,
        ).to(parameters.coef.device)
        with torch.no_grad():
            for name, value in zip(("gate_coef", "gate_intercept", "coef", "intercept"), parameters, strict=False):
                getattr(model, name).copy_(value)
            model.log_variance.copy_(variance.log())
            model.log_temperature.copy_(parameters.temperature.log())
        return model

    @property
    def mixture(self) -> MixtureParameters:
        """The parameters as they are, detached copies."""
        values = (self.gate_coef, self.gate_intercept, self.coef, self.intercept)
        copies = [value.detach().clone() for value in values]
        copies += [self.log_variances.detach().exp(), self.log_temperature.detach().exp()]
        return MixtureParameters(*copies)

    @property
    def log_variances(self) -> Float[Tensor, "*models experts"]:
        """``log sigma`` of each expert, also where they share one."""
        return self.log_variance.expand_as(self.intercept)

    def extra_repr(self) -> str:
        """Sizes and the gate."""
        *models, num_experts, num_features = self.coef.shape
        text = f"num_features={num_features}, num_experts={num_experts}, gate={self.gate}, covariance={self.covariance}"
        return text + (f", num_models={models[0]}" if models else "")

    def log_weights(self, x: Float[Tensor, "samples features"]) -> Float[Tensor, "*models samples experts"]:
        """``log w_i(x)``, ``-inf`` for experts that are not kept."""
        scores = self._products(x, self.gate_coef)
        temperature = self.log_temperature.exp()[..., None, None]
        return self.gate.log_weights(scores, self.gate_intercept.unsqueeze(-2), temperature)

    def means(self, x: Float[Tensor, "samples features"]) -> Float[Tensor, "*models samples experts"]:
        """``a_i . x + b_i``."""
        return self._products(x, self.coef) + self.intercept.unsqueeze(-2)

    def _log_joint(self, x: Tensor, y: Tensor) -> Tensor:
        """``log w_i(x) + log N(y; a_i . x + b_i, sigma_i)``."""
        if y.shape != x.shape[:-1]:
            raise ValueError(f"one y for each of {x.shape[0]} samples is a vector, got shape {list(y.shape)}")
        log_variance = self.log_variance.unsqueeze(-2)
        residual = y.to(self.coef.dtype).unsqueeze(-1) - self.means(x)
        log_density = -0.5 * (residual.square() * torch.exp(-log_variance) + log_variance + LOG_2_PI)
        return self.log_weights(x) + log_density

    def log_prob(
        self, x: Float[Tensor, "samples features"], y: Float[Tensor, " samples"]
    ) -> Float[Tensor, "*models samples"]:
        """``log p(y|x)``.

        Raises:
            ValueError: inputs that are not samples by features, or not one ``y`` a sample.
        """
        return torch.logsumexp(self._log_joint(x, y), dim=-1)

    forward = log_prob

    def posterior(
        self, x: Float[Tensor, "samples features"], y: Float[Tensor, " samples"]
    ) -> Float[Tensor, "*models samples experts"]:
        """``P(expert i | x, y)``, the responsibilities of the E step.

        Raises:
            ValueError: as `log_prob`.
        """
        return torch.softmax(self._log_joint(x, y), dim=-1)

    def predict_mean(self, x: Float[Tensor, "samples features"]) -> Float[Tensor, "*models samples"]:
        """``E[y|x] = sum_i w_i(x) (a_i . x + b_i)``."""
        return (self.log_weights(x).exp() * self.means(x)).sum(dim=-1)

    @torch.no_grad()
    def sample_experts(
        self, x: Float[Tensor, "samples features"], generator: torch.Generator | None = None
    ) -> Int[Tensor, "*models samples"]:
        """Draw an expert for each sample from the gate's weights.

        Args:
            x: inputs.
            generator: of the CPU or of the parameters' device.
        """
        cumulative = self.log_weights(x).exp().cumsum(dim=-1)
        uniform = _drawn(torch.rand, cumulative[..., :1], generator) * cumulative[..., -1:]
        return torch.searchsorted(cumulative, uniform, right=True).squeeze(-1).clamp_max(cumulative.shape[-1] - 1)

    @torch.no_grad()
    def sample(
        self, x: Float[Tensor, "samples features"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "*models samples"]:
        """Draw ``y`` given ``x``: an expert from the gate's weights, then its Gaussian.

        Args:
            x: inputs.
            generator: of the CPU or of the parameters' device.
        """
        expert = self.sample_experts(x, generator)
        mean = self.means(x).gather(-1, expert.unsqueeze(-1)).squeeze(-1)
        deviation = torch.exp(0.5 * self.log_variances).gather(-1, expert)
        return mean + deviation * _drawn(torch.randn, mean, generator)

    def _products(self, x: Tensor, slopes: Tensor) -> Tensor:
        if x.dim() != 2 or x.shape[1] != slopes.shape[-1]:
            raise ValueError(f"inputs are [samples, {slopes.shape[-1]}], got shape {list(x.shape)}")
        with without_autocast(x.device):
            return x.to(slopes.dtype) @ slopes.mT


def check_covariance(covariance: str) -> None:
    """Raise ``ValueError`` for an unknown covariance."""
    if covariance not in get_args(Covariance):
        raise ValueError(f"covariance must be 'per-expert' or 'tied', got {covariance!r}")


def _drawn(draw: Any, like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Numbers of the shape, dtype and device of ``like``, drawn where the generator lives."""
    device = like.device if generator is None else generator.device
    numbers: Tensor = draw(like.shape, generator=generator, dtype=like.dtype, device=device)
    return numbers.to(like.device)
