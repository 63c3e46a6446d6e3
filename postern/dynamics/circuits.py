"""The key-query and output-value circuits of an in-context learner, and how near they are to a debiased gradient step.

Paper: "In-Context Linear Regression Demystified: Training Dynamics and Mechanistic Interpretability of Multi-Head
Softmax Attention", arXiv 2503.12734. It finds that training leaves

    KQ_h = [[omega_h I, .], [0, .]],    OV_h = (0, ..., 0, mu_h),

with ``omega_h mu_h > 0``, one ``|omega_h|`` for all heads that are active, and ``sum_h mu_h = 0``. The dots multiply
the zero in the query.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class CircuitPattern:
    """How far the circuits of one model of one output follow the pattern; averages are over the active heads.

    Attributes:
        omega: ``omega_h``, the mean of the diagonal that compares inputs.
        mu: ``mu_h``, what the head's label counts.
        is_active: whether ``|omega_h mu_h|`` is at least a share of the largest; the others are dummies.
        step_size: ``sum_h omega_h mu_h``, the learning rate of the gradient step that the heads make together.
        sign_agreement: share of the active heads with ``omega_h mu_h > 0``.
        omega_variation: standard deviation over mean of the active heads' ``|omega_h|``.
        imbalance: ``|sum_h mu_h| / sum_h |mu_h|``, of all heads.
        diagonal_share: norm of that diagonal over the norm of all entries of ``KQ_h`` that the query's input meets.
        diagonal_variance: variance of the diagonal's entries.
        label_share: share of the label's entry in the square of ``OV_h``.
        label_to_input: largest ``|KQ_h|`` between a label and the query's input.
    """

    omega: tuple[float, ...]
    mu: tuple[float, ...]
    is_active: tuple[bool, ...]
    step_size: float
    sign_agreement: float
    omega_variation: float
    imbalance: float
    diagonal_share: float
    diagonal_variance: float
    label_share: float
    label_to_input: float


@dataclass(frozen=True)
class Circuits:
    """What the heads compare and what they copy.

    Attributes:
        key_query: ``KQ_h = K_h^T Q_h / sqrt(e)``: an example's token on the left, the query's on the right.
        output_value: ``OV_h = O_h V_h``, as rows.
    """

    key_query: Float[Tensor, "*models heads e e"]
    output_value: Float[Tensor, "*models heads outputs e"]

    def __post_init__(self) -> None:
        *heads, outputs, width = self.output_value.shape
        if self.key_query.shape != (*heads, width, width) or not 0 < outputs < width:
            raise ValueError(
                "circuits are [.., heads, e, e] and [.., heads, outputs, e] with outputs below e, got "
                f"{list(self.key_query.shape)} and {list(self.output_value.shape)}"
            )

    def __getitem__(self, model: int) -> Circuits:
        """Return those of one of several models."""
        if self.key_query.dim() < 4:
            raise ValueError("these are the circuits of one model")
        return Circuits(self.key_query[model], self.output_value[model])

    def detach(self) -> Circuits:
        """Return the same without gradients, on the CPU in double precision, to look at."""
        return Circuits(self.key_query.detach().double().cpu(), self.output_value.detach().double().cpu())

    @property
    def dim(self) -> int:
        """Entries of an input."""
        return self.output_value.shape[-1] - self.output_value.shape[-2]

    @property
    def comparison(self) -> Float[Tensor, "*models heads dim dim"]:
        """The block of ``KQ_h`` that compares inputs."""
        return self.key_query[..., : self.dim, : self.dim]

    @property
    def omega(self) -> Float[Tensor, "*models heads"]:
        """``omega_h``: the mean of the diagonal of the comparison."""
        return self.comparison.diagonal(dim1=-2, dim2=-1).mean(-1)

    @property
    def mu(self) -> Float[Tensor, "*models heads outputs"]:
        """``mu_hk``: what the examples' k-th label counts for the k-th output."""
        return self.output_value[..., self.dim :].diagonal(dim1=-2, dim2=-1)

    def preconditioner(self) -> Float[Tensor, "*models outputs dim dim"]:
        """``P_k = sum_h mu_hk W_h^T``, with ``W_h`` the comparison: the step that softmax attention makes.

        y_k = x_q^T P_k (1 / L) sum_l (x_l - mean x) y_lk.
        """
        return torch.einsum("...hk,...hij->...kji", self.mu, self.comparison)

    def task_mass(self) -> Float[Tensor, "*models heads outputs"]:
        """``|mu_hk| |W_h|``, in the Frobenius norm: how much each head does for each output."""
        mass: Tensor = self.mu.abs() * torch.linalg.matrix_norm(self.comparison)[..., None]
        return mass

    def active_heads(self, least: float = 0.05) -> Bool[Tensor, "*models heads"]:
        """Return which heads are no dummies: their `task_mass` is at least ``least`` of the model's largest.

        Raises:
            ValueError: a share that is not between 0 and 1.
        """
        if not 0 <= least <= 1:
            raise ValueError(f"least must be between 0 and 1, got {least}")
        mass = self.task_mass().sum(-1)
        return mass >= least * mass.amax(-1, keepdim=True)

    def pattern(self, least: float = 0.05) -> CircuitPattern:
        """Describe one model of one output.

        Args:
            least: see `active_heads`.

        Raises:
            ValueError: several models or outputs, or circuits that are zero or not finite.
        """
        if self.key_query.dim() > 3 or self.output_value.shape[-2] != 1:
            raise ValueError(f"a pattern is of one model with one output, got OV of {list(self.output_value.shape)}")
        exact = self.detach()
        if not (torch.isfinite(exact.key_query).all() and torch.isfinite(exact.output_value).all()):
            raise ValueError("circuits must be finite, got NaN or infinity")
        if not exact.task_mass().any():
            raise ValueError("a pattern needs a head that does something, and all circuits are zero")
        active = exact.active_heads(least)
        seen, row = exact.key_query[active][..., : self.dim], exact.output_value[active][:, 0]
        diagonal = exact.comparison[active].diagonal(dim1=-2, dim2=-1)
        mu, omega = exact.mu[:, 0], exact.omega
        size = omega[active].abs()
        return CircuitPattern(
            omega=tuple(omega.tolist()),
            mu=tuple(mu.tolist()),
            is_active=tuple(active.tolist()),
            step_size=(omega * mu).sum().item(),
            sign_agreement=(omega * mu > 0)[active].double().mean().item(),
            omega_variation=(size.std(unbiased=False) / size.mean()).item(),
            imbalance=(mu.sum().abs() / mu.abs().sum()).item(),
            diagonal_share=(diagonal.norm(dim=-1) / seen.flatten(1).norm(dim=-1)).mean().item(),
            diagonal_variance=diagonal.var(-1, unbiased=False).mean().item(),
            label_share=(row[:, -1].square() / row.square().sum(-1)).mean().item(),
            label_to_input=seen[:, -1].abs().max().item(),
        )
