"""Softmax collapse: rows of logits whose softmax loss is exactly zero in floating point.

Once a row's largest logit leads by enough, ``sum_k exp(z_k)`` rounds to ``exp(z_max)``: the other classes are absorbed,
the loss is exactly 0, and so is the gradient of the leading class. The row teaches nothing any more.

Paper: "Grokking at the Edge of Numerical Stability" (arXiv 2501.04697), definitions 2 and 3.
Under another loss than cross-entropy, rows collapse without harm: there the fraction is no alarm.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor


def softmax_collapse_fraction(
    logits: Float[Tensor, "*batch classes"],
    target: Int[Tensor, "*batch"] | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> float:
    """Return the share of rows whose exponentials sum to the largest one exactly.

    With ``e = exp(z - max z)`` a row has collapsed when ``sum e == 1`` in the precision of the loss.

    Args:
        logits: scores, classes last.
        target: the true classes; if given, only rows that collapsed onto their true class count, whose loss is 0.
        dtype: the precision in which the loss is computed; None for the logits' own.

    Returns:
        A share between 0 and 1.

    Raises:
        ValueError: logits that are not floating point or have no rows, targets of another shape than the rows.
    """
    if not logits.is_floating_point() or logits.dim() == 0 or logits.numel() == 0:
        raise ValueError(f"logits must be rows of floating point, got {logits.dtype} of shape {tuple(logits.shape)}")
    if target is not None and target.shape != logits.shape[:-1]:
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} need targets of shape {tuple(logits.shape[:-1])}, "
            f"got {tuple(target.shape)}"
        )
    scores = logits.detach().to(logits.dtype if dtype is None else dtype)
    leading, predicted = scores.max(-1, keepdim=True)
    has_collapsed = (scores - leading).exp().sum(-1) == 1
    if target is not None:
        has_collapsed &= predicted[..., 0] == target
    return has_collapsed.double().mean().item()


def zero_loss_fraction(losses: Float[Tensor, "*batch"]) -> float:
    """Return the share of samples whose loss is exactly zero.

    Args:
        losses: one loss a sample, as losses return with ``reduction="none"``.

    Returns:
        A share between 0 and 1.

    Raises:
        ValueError: no losses.
    """
    if losses.numel() == 0:
        raise ValueError("a share needs at least one loss, got none")
    return (losses.detach() == 0).double().mean().item()


def collapse_gap(dtype: torch.dtype, num_classes: int) -> tuple[float, float]:
    """Return the bounds between which a row collapses, as its largest logit pulls away from equal others.

    With ``p`` significant bits, a term is absorbed by 1 from ``2^-p`` down. The row collapses at the lower end,
    ``p ln 2``, if the small terms are added to 1 one by one, and at the upper end, ``p ln 2 + ln(classes - 1)``, if
    they are summed first: 16.6 to 21.4 in float32 with 113 classes.

    Args:
        dtype: a floating-point type.
        num_classes: number of classes, at least 2.

    Returns:
        (lowest, highest) gap of the logits at which the row may collapse first.

    Raises:
        ValueError: a dtype that is not floating point, or fewer than two classes.
    """
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be floating point, got {dtype}")
    if num_classes < 2:
        raise ValueError(f"a softmax that collapses has at least 2 classes, got {num_classes}")
    lowest = -math.log(torch.finfo(dtype).eps / 2)
    return lowest, lowest + math.log(num_classes - 1)
