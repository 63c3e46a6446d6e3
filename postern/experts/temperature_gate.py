"""A gate over all experts with a temperature, set, scheduled or learnt.

Paper: "Is Temperature Sample Efficient for Softmax Gaussian Mixture of Experts?", arXiv 2401.13875, which shows that a
temperature cannot be learnt beside linear scores, and passes the scores through an activation before. Another way out
is that of arXiv 2602.01466, for sigmoid gates: Euclidean scores in place of inner products.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from postern.experts.gate_activation import SIGMOID_TEMPERATURE, Activation, is_sigmoid, resolve_activation
from postern.experts.routing import check_sizes
from postern.experts.temperature_softmax import temperature_softmax_gate
from postern.precision import without_autocast

LEAST_TEMPERATURE, GREATEST_TEMPERATURE = 1e-2, 1e2

GateScore = Literal["linear", "euclidean"]


def check_temperature(temperature: float, name: str = "temperature") -> None:
    """Refuse a temperature that no gate can have.

    Raises:
        ValueError: it is not in [0.01, 100].
    """
    if not LEAST_TEMPERATURE <= temperature <= GREATEST_TEMPERATURE:
        raise ValueError(
            f"a temperature is in [{LEAST_TEMPERATURE:g}, {GREATEST_TEMPERATURE:g}], got {name}={temperature}"
        )


class TemperatureGate(nn.Module):
    """``softmax((activation(s) + b) / temperature)`` over all experts, of scores ``s = W x`` or ``s_i = -||x - W_i||``.

    With linear scores and without an activation, or with one that is homogeneous as ReLU is, weights, bias and
    temperature can be scaled together and nothing changes: there, schedule a temperature rather than learn it.
    Euclidean scores have no such scale, as the tokens set it, and need no activation. (Their squares would: ``||x||^2``
    is common to all experts, and what remains is linear in the token.)

    A sigmoid's scores lie in (0, 1). At temperature 1 no expert then gets e times the weight of another with the same
    bias, so that routing stays dense: temperatures between 0.1 and 0.5 are where it can begin.

    Args:
        width: features of a token.
        num_experts: how many there are.
        temperature: a number in [0.01, 100], or "learned", which starts at 1, with a sigmoid at 0.3; `set_temperature`
            starts it elsewhere. Its logarithm is the parameter, and it stays in that range.
        activation: of the scores: an elementwise function or a name in `ACTIVATIONS`; None for none.
        bias: whether each expert has a bias, which is added after the activation.
        score: "linear", or "euclidean", with the weights as the experts' centres among the tokens, drawn from N(0, 1).

    Raises:
        ValueError: sizes below 1, a temperature outside [0.01, 100], or an unknown activation or score.
    """

    log_temperature: Tensor

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        temperature: float | Literal["learned"] = 1.0,
        activation: str | Activation | None = None,
        bias: bool = True,
        score: GateScore = "linear",
    ) -> None:
        super().__init__()
        check_sizes(width, num_experts, 1)
        if score not in get_args(GateScore):
            raise ValueError(f"score must be 'linear' or 'euclidean', got {score!r}")
        self.width = width
        self.num_experts = num_experts
        self.score = score
        self.activation = resolve_activation(activation)
        self.weight = nn.Parameter(torch.empty(num_experts, width))
        self.bias = nn.Parameter(torch.zeros(num_experts)) if bias else None
        if score == "linear":
            nn.init.uniform_(self.weight, -(width**-0.5), width**-0.5)
        else:
            nn.init.normal_(self.weight)
        if temperature == "learned":
            self.log_temperature = nn.Parameter(torch.zeros(()))
            temperature = SIGMOID_TEMPERATURE if is_sigmoid(self.activation) else 1.0
        else:
            self.register_buffer("log_temperature", torch.zeros(()))
        self.set_temperature(temperature)

    @property
    def temperature(self) -> Float[Tensor, ""]:
        """The temperature."""
        return self.log_temperature.exp().clamp(LEAST_TEMPERATURE, GREATEST_TEMPERATURE)

    @torch.no_grad()
    def set_temperature(self, temperature: float) -> None:
        """Set the temperature, e.g. by a schedule.

        Args:
            temperature: in [0.01, 100].

        Raises:
            ValueError: it is outside.
        """
        check_temperature(temperature)
        self.log_temperature.fill_(math.log(temperature))

    def scores(self, tokens: Float[Tensor, "*tokens width"]) -> Float[Tensor, "*tokens num_experts"]:
        """``activation(s) + b``, not yet divided by the temperature, in float32 at least."""
        with without_autocast(tokens.device):
            dtype = torch.promote_types(tokens.dtype, torch.float32)
            tokens, weight = tokens.to(dtype), self.weight.to(dtype)
            if self.score == "linear":
                scores = nn.functional.linear(tokens, weight)
            else:
                # by matrix products it would lose the digits of short distances
                rows = tokens.reshape(-1, self.width)
                distances = torch.cdist(rows, weight, compute_mode="donot_use_mm_for_euclid_dist")
                scores = -distances.reshape(*tokens.shape[:-1], self.num_experts)
            scores = self.activation(scores)
            return scores if self.bias is None else scores + self.bias.to(dtype)

    def forward(self, tokens: Float[Tensor, "*tokens width"]) -> Float[Tensor, "*tokens num_experts"]:
        """Return the weights of all experts."""
        return temperature_softmax_gate(self.scores(tokens), None, self.temperature)


def set_temperature(module: nn.Module, temperature: float) -> None:
    """Set the temperature of every `TemperatureGate` in a model.

    Args:
        module: the model.
        temperature: in [0.01, 100].

    Raises:
        ValueError: a temperature outside, or a model without such gates.
    """
    gates = [gate for gate in module.modules() if isinstance(gate, TemperatureGate)]
    if not gates:
        raise ValueError(f"{type(module).__name__} has no TemperatureGate whose temperature could be set")
    for gate in gates:
        gate.set_temperature(temperature)


class LinearTemperatureSchedule:
    """A temperature that goes from ``start`` to ``end`` in equal steps, and stays there.

    Args:
        steps: how many it takes.
        start: the first, in [0.01, 100].
        end: the last, in [0.01, 100].

    Raises:
        ValueError: steps below 1, or temperatures outside.
    """

    def __init__(self, steps: int, start: float = 2.0, end: float = 0.3) -> None:
        if steps < 1:
            raise ValueError(f"a schedule has at least one step, got {steps}")
        check_temperature(start, "start")
        check_temperature(end, "end")
        self.steps = steps
        self.start = start
        self.end = end

    def __call__(self, step: float) -> float:
        """Return the temperature after so many steps.

        Args:
            step: from 0 on; parts of a step count.
        """
        return self.start + (self.end - self.start) * min(step / self.steps, 1.0)
