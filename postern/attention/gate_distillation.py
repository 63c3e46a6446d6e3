"""Training the gates of a frozen model on its own attention maps.

Paper: "SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs", arXiv 2410.13276.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from postern.attention.seer_attention import block_sparsities, distilling, gate_loss

Progress = Callable[[Iterable[int]], Iterable[int]]


def distil_gates(
    model: nn.Module,
    next_batch: Callable[[], Any],
    *,
    steps: int = 500,
    learning_rate: float = 1e-3,
    warm_up_steps: int = 20,
    drop_first: float = 0.25,
    clip_norm: float | None = None,
    forward: Callable[[nn.Module, Any], object] | None = None,
    progress: Progress = iter,
) -> list[float]:
    """Train the gates of a model, and nothing else of it, to foretell its attention maps.

    AdamW without weight decay, a linear warm-up and a cosine decay to 0, as in the paper, with batches of 16 sequences
    of 65,536 tokens there. The model attends densely meanwhile, in the mode (training or evaluation) that it is in.

    Args:
        model: with gated layers: `SeerAttention`, or after `attach_gates`.
        next_batch: gives the next batch, on the model's device.
        steps: updates.
        learning_rate: the highest.
        warm_up_steps: steps over which the rate grows from 0.
        drop_first: see `gate_distillation_loss`.
        clip_norm: largest norm of the gradient; None for any.
        forward: calls the model with a batch; by default ``model(batch)``, or ``model(**batch)`` for mappings. The
            output is not used, so the output layer can be left out.
        progress: wraps the loop over the steps, to show how far it is.

    Returns:
        The loss of each step, summed over the layers, in nats.

    Raises:
        ValueError: the model has no gated layers, or sizes below 1.
    """
    if steps < 1 or not learning_rate > 0:
        raise ValueError(f"steps and learning_rate are positive, got {steps} and {learning_rate}")
    forward = _call if forward is None else forward
    gates = [parameter for layer in block_sparsities(model).values() for parameter in layer.gate.parameters()]
    optimizer = torch.optim.AdamW(gates, lr=learning_rate, weight_decay=0.0)
    needed_gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    losses = []
    try:
        model.requires_grad_(False)
        for parameter in gates:
            parameter.requires_grad_()
        with distilling(model, drop_first=drop_first):
            for step in progress(range(steps)):
                optimizer.param_groups[0]["lr"] = learning_rate * _rate_at(step, steps, warm_up_steps)
                forward(model, next_batch())
                loss = gate_loss(model)
                torch.autograd.backward([loss])
                if clip_norm is not None:
                    torch.nn.utils.clip_grad_norm_(gates, clip_norm)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                losses.append(loss.item())
    finally:
        for parameter, needed in needed_gradients:
            parameter.requires_grad_(needed)
    return losses


def _rate_at(step: int, steps: int, warm_up_steps: int) -> float:
    if step < warm_up_steps:
        return (step + 1) / warm_up_steps
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up_steps) / max(1, steps - warm_up_steps)))


def _call(model: nn.Module, batch: Any) -> object:
    return model(**batch) if hasattr(batch, "keys") else model(batch)
