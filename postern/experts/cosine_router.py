"""A router that scores by cosine: tokens and experts meet on a sphere of few dimensions.

Paper: "On the Representation Collapse of Sparse Mixture of Experts" (X-MoE), arXiv 2204.09179.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from postern.experts.softmax_router import LogitRouter
from postern.experts.temperature_gate import GREATEST_TEMPERATURE, LEAST_TEMPERATURE, check_temperature
from postern.precision import without_autocast


class CosineRouter(LogitRouter):
    """``p = softmax(cos(W x, e) / temperature)``; the ``top_k`` largest choose, and weigh.

    Neither the length of a token nor that of an expert's direction e counts, and W leaves few dimensions; this is meant
    to keep tokens from collapsing onto the directions of their experts. The logarithm of the temperature is learnt; the
    temperature stays between 0.01 and 100. Probabilities are computed in float32 at least, also under autocast.

    Args:
        width: features of a token.
        num_experts: how many there are to choose from.
        top_k: experts of a token.
        dimensions: of the sphere; by default half as many as there are experts, and 2 at least.
        renormalises: see `SoftmaxRouter`.
        balance: weight of `balance_loss` in the auxiliary loss.
        z: weight of `router_z_loss` in the auxiliary loss.
        temperature: at first, in [0.01, 100].

    Raises:
        ValueError: sizes below 1, more experts a token than there are, negative weights of losses, fewer than 2
            dimensions, in which a cosine has no gradient, or a temperature outside its range.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        top_k: int = 2,
        *,
        dimensions: int | None = None,
        renormalises: bool | None = None,
        balance: float = 0.01,
        z: float = 0.0,
        temperature: float = 0.3,
    ) -> None:
        super().__init__(width, num_experts, top_k, renormalises=renormalises, balance=balance, z=z)
        dimensions = max(2, num_experts // 2) if dimensions is None else dimensions
        if dimensions < 2:
            raise ValueError(f"a cosine needs at least 2 dimensions, got {dimensions}")
        check_temperature(temperature)
        self.projection = nn.Linear(width, dimensions, bias=False)
        self.directions = nn.Parameter(torch.randn(num_experts, dimensions))
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))

    @property
    def temperature(self) -> Float[Tensor, ""]:
        """The temperature."""
        return self.log_temperature.exp().clamp(LEAST_TEMPERATURE, GREATEST_TEMPERATURE)

    def logits(self, tokens: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time num_experts"]:
        """Before softmax, in float32 at least."""
        with without_autocast(tokens.device):
            dtype = torch.promote_types(tokens.dtype, torch.float32)
            projected = F.linear(tokens.to(dtype), self.projection.weight.to(dtype))
            directions = F.normalize(self.directions.to(dtype), dim=-1)
            return F.linear(F.normalize(projected, dim=-1), directions) / self.temperature.to(dtype)
