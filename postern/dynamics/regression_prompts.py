"""Prompts of linear regressions: examples of a linear function that is drawn anew for each prompt, and a query.

The data of "In-Context Linear Regression Demystified: Training Dynamics and Mechanistic Interpretability of Multi-Head
Softmax Attention" (arXiv 2503.12734), with its isotropic, anisotropic and multi-task variants in one generator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class RegressionPrompts:
    """A batch of prompts.

    Attributes:
        examples: ``z_l = [x_l; y_l]``.
        query: ``z_q = [x_q; 0]``.
        target: ``y_q``, what is to be predicted.
    """

    examples: Float[Tensor, "batch length dim+outputs"]
    query: Float[Tensor, "batch dim+outputs"]
    target: Float[Tensor, "batch outputs"]

    def __len__(self) -> int:
        return len(self.target)

    @property
    def inputs(self) -> Float[Tensor, "batch length dim"]:
        """``x_l``."""
        return self.examples[..., : -self.target.shape[-1]]

    @property
    def labels(self) -> Float[Tensor, "batch length outputs"]:
        """``y_l``."""
        return self.examples[..., -self.target.shape[-1] :]

    @property
    def query_input(self) -> Float[Tensor, "batch dim"]:
        """``x_q``."""
        return self.query[..., : -self.target.shape[-1]]


class InContextRegression:
    """Draws prompts ``y_k = beta_k^T x + e`` with ``x ~ N(0, S)``, ``beta_k ~ N(0, c I)`` and ``e ~ N(0, s2)``.

    Args:
        dim: entries of an input, ``d``.
        noise_variance: ``s2``, the variance of each label's noise.
        covariance: ``S``, ``[dim, dim]``; the identity if None.
        tasks: the inputs' entries that each output depends on, one sequence an output; a single output that depends on
            all of them if None.
        coefficient_variance: ``c``; if None one over the number of entries that the output depends on, so that labels
            of standard normal inputs have the variance ``1 + s2``.
        is_query_noisy: whether the target has noise, as the labels have.

    Raises:
        ValueError: a dimension below 1, a negative variance, a covariance of another shape or not positive definite,
            or tasks without entries, or with repeated ones or some that are not there.
    """

    def __init__(
        self,
        dim: int,
        noise_variance: float = 0.1,
        *,
        covariance: Float[Tensor, "dim dim"] | None = None,
        tasks: Sequence[Sequence[int]] | None = None,
        coefficient_variance: float | None = None,
        is_query_noisy: bool = True,
    ) -> None:
        if dim < 1:
            raise ValueError(f"inputs have at least one entry, got dim={dim}")
        if not 0 <= noise_variance < math.inf:
            raise ValueError(f"noise_variance must be finite and at least 0, got {noise_variance}")
        if coefficient_variance is not None and not 0 < coefficient_variance < math.inf:
            raise ValueError(f"coefficient_variance must be finite and above 0, got {coefficient_variance}")
        tasks = [range(dim)] if tasks is None else tasks
        if not tasks:
            raise ValueError("tasks must hold at least one task, got none")
        for entries in tasks:
            if not len(entries) or len(set(entries)) != len(entries) or not set(entries) <= set(range(dim)):
                raise ValueError(f"a task is some different entries of 0 to {dim - 1}, got {list(entries)}")
        self.dim = dim
        self.num_outputs = len(tasks)
        self.noise_variance = noise_variance
        self.is_query_noisy = is_query_noisy
        self._factor = None if covariance is None else _cholesky(covariance, dim)
        self._deviations = torch.zeros(dim, self.num_outputs)
        for output, entries in enumerate(tasks):
            variance = 1 / len(entries) if coefficient_variance is None else coefficient_variance
            self._deviations[list(entries), output] = variance**0.5

    def sample(
        self,
        batch_size: int,
        length: int,
        *,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> RegressionPrompts:
        """Draw prompts.

        Args:
            batch_size: how many.
            length: examples of each, ``L``.
            generator: draws on its own device; torch's global one if None.
            device: where the prompts are; by default where they are drawn.
            dtype: of the prompts.

        Raises:
            ValueError: sizes below 1.
        """
        if batch_size < 1 or length < 1:
            raise ValueError(f"batch_size and length must be at least 1, got {batch_size} and {length}")
        source = device if generator is None else generator.device

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device=source, dtype=dtype)

        x = normal(batch_size, length + 1, self.dim)
        if self._factor is not None:
            x = x @ self._factor.to(x).T
        coefficients = normal(batch_size, self.dim, self.num_outputs) * self._deviations.to(x)
        noise = self.noise_variance**0.5 * normal(batch_size, length + 1, self.num_outputs)
        if not self.is_query_noisy:
            noise[:, -1] = 0
        z = torch.cat([x, x @ coefficients + noise], dim=-1).to(device)
        query = z[:, -1].clone()
        query[:, self.dim :] = 0
        return RegressionPrompts(z[:, :-1], query, z[:, -1, self.dim :])


def autoregressive_covariance(dim: int, correlation: float) -> Float[Tensor, "dim dim"]:
    """``S_ij = rho^|i - j|``, the covariance of the paper's anisotropic inputs.

    Args:
        dim: entries of an input.
        correlation: ``rho``.

    Raises:
        ValueError: a dimension below 1, or a correlation that is not between -1 and 1.
    """
    if dim < 1 or not -1 < correlation < 1:
        raise ValueError(f"dim is at least 1 and -1 < correlation < 1, got dim={dim} and correlation={correlation}")
    places = torch.arange(dim)
    covariance: Tensor = torch.tensor(float(correlation)) ** (places[:, None] - places).abs()
    return covariance


def _cholesky(covariance: Tensor, dim: int) -> Tensor:
    if covariance.shape != (dim, dim):
        raise ValueError(f"the covariance of {dim} entries is [{dim}, {dim}], got {list(covariance.shape)}")
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(covariance.double())
    if failed or not torch.allclose(covariance, covariance.T):
        raise ValueError("the covariance must be symmetric and positive definite, and is not")
    return factor
