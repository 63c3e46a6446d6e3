"""Predictors of a prompt's target that need no training: what attention is compared with.

Paper: "In-Context Linear Regression Demystified: Training Dynamics and Mechanistic Interpretability of Multi-Head
Softmax Attention", arXiv 2503.12734. All take inputs, labels and the query's input of a batch of prompts.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from postern.dynamics.in_context_attention import Weighting


def reduced_attention(
    inputs: Float[Tensor, "batch length dim"],
    labels: Float[Tensor, "batch length outputs"],
    query: Float[Tensor, "batch dim"],
    omega: Float[Tensor, " heads"],
    mu: Float[Tensor, " heads"],
    *,
    weighting: Weighting = torch.softmax,
) -> Float[Tensor, "batch outputs"]:
    """``sum_h mu_h sum_l y_l w_l(omega_h x_l . x_q)``: attention whose heads are two numbers each.

    One head is a kernel smoother; two with opposite omega and mu are nearly `gradient_descent_predict`.

    Args:
        inputs: ``x_l``.
        labels: ``y_l``.
        query: ``x_q``.
        omega: how strongly each head compares inputs.
        mu: what each head's average of the labels counts.
        weighting: see `postern.dynamics.in_context_attention`.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    _check(inputs, labels, query)
    if omega.dim() != 1 or omega.shape != mu.shape:
        raise ValueError(f"omega and mu have one entry a head, got {list(omega.shape)} and {list(mu.shape)}")
    logits = (inputs @ query[..., None]).transpose(1, 2) * omega.to(inputs)[:, None]  # [batch, heads, length]
    averages = weighting(logits, -1) @ labels
    return (mu.to(inputs)[:, None] * averages).sum(1)


def gradient_descent_predict(
    inputs: Float[Tensor, "batch length dim"],
    labels: Float[Tensor, "batch length outputs"],
    query: Float[Tensor, "batch dim"],
    step_size: float | Float[Tensor, "dim dim"],
    *,
    is_debiased: bool = False,
) -> Float[Tensor, "batch outputs"]:
    """``x_q^T P (1 / L) sum_l (x_l - b) y_l``: one step of gradient descent from 0, with ``b`` 0 or the inputs' mean.

    With the mean it is what two opposite heads of softmax attention compute as their omega goes to 0.

    Args:
        inputs: ``x_l``.
        labels: ``y_l``.
        query: ``x_q``.
        step_size: ``P``, the matrix that preconditions the step, or the multiple of the identity that it is.
        is_debiased: whether the inputs' mean is subtracted.

    Raises:
        ValueError: shapes that do not fit each other.
    """
    _check(inputs, labels, query)
    if is_debiased:
        inputs = inputs - inputs.mean(1, keepdim=True)
    if isinstance(step_size, Tensor) and step_size.dim():
        if step_size.shape != (query.shape[1],) * 2:
            raise ValueError(f"the step size is a number or [dim, dim] of {query.shape[1]}, got {step_size.shape}")
        direction = query @ step_size.to(query)
    else:
        direction = query * step_size
    scores = inputs @ direction[..., None]
    return (scores.transpose(1, 2) @ labels)[:, 0] / inputs.shape[1]


def ridge_predict(
    inputs: Float[Tensor, "batch length dim"],
    labels: Float[Tensor, "batch length outputs"],
    query: Float[Tensor, "batch dim"],
    noise_variance: float,
    coefficient_variance: float | None = None,
) -> Float[Tensor, "batch outputs"]:
    """``x_q^T (X^T X + (s2 / c) I)^-1 X^T y``: the mean given the prompt, which no predictor beats in squared error.

    Args:
        inputs: ``X``.
        labels: ``y``.
        query: ``x_q``.
        noise_variance: ``s2``.
        coefficient_variance: ``c``; one over the number of inputs' entries if None.

    Raises:
        ValueError: shapes that do not fit each other, or variances that are not positive.
    """
    _check(inputs, labels, query)
    dim = inputs.shape[-1]
    coefficient_variance = 1 / dim if coefficient_variance is None else coefficient_variance
    if not (noise_variance > 0 and coefficient_variance > 0):
        raise ValueError(f"variances must be positive, got {noise_variance} and {coefficient_variance}")
    penalty = noise_variance / coefficient_variance * torch.eye(dim, dtype=inputs.dtype, device=inputs.device)
    coefficients = torch.linalg.solve(inputs.transpose(1, 2) @ inputs + penalty, inputs.transpose(1, 2) @ labels)
    return torch.matmul(query[:, None], coefficients)[:, 0]


def _check(inputs: Tensor, labels: Tensor, query: Tensor) -> None:
    fits = inputs.dim() == labels.dim() == 3 and query.dim() == 2 and inputs.shape[:2] == labels.shape[:2]
    if not fits or query.shape != (len(inputs), inputs.shape[-1]) or not inputs.shape[1]:
        raise ValueError(
            "prompts are inputs [batch, length, dim], labels [batch, length, outputs] and queries [batch, dim], got "
            f"{list(inputs.shape)}, {list(labels.shape)} and {list(query.shape)}"
        )
