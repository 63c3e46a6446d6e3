"""The StableMax head and its loss: cross-entropy that never stops teaching.

``-log stablemax(z)_y`` has the gradient ``(p_i - [i = y]) / (1 + |z_i|)``: it shrinks as logits grow, but unlike
softmax's it stays above zero in floating point, so that training goes on after the training set is fitted.

Paper: "Grokking at the Edge of Numerical Stability" (arXiv 2501.04697), section 4.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from postern.heads._linear import LinearHead
from postern.heads.protocol import check_target
from postern.softmax.stablemax import log_stablemax

Reduction = Literal["mean", "sum", "none"]
_REDUCTIONS = ("mean", "sum", "none")


def stablemax_cross_entropy(
    logits: Float[Tensor, "batch classes *positions"],
    target: Int[Tensor, "*samples"],
    reduction: Reduction = "mean",
    dtype: torch.dtype | None = None,
) -> Float[Tensor, "*reduced"]:
    """Return ``-log stablemax(z)_y``, with the conventions of `torch.nn.functional.cross_entropy`.

    Args:
        logits: scores, classes in dimension 1 (or the only dimension, for a single sample).
        target: indices of the true classes; -100 is ignored.
        reduction: "mean" over the samples that are not ignored, "sum", or "none".
        dtype: what to compute in and return. None is the logits' own, but float32 at least: in 16 bits large logits
            cannot be told apart, which brings back what StableMax avoids. The paper's code uses float64.

    Returns:
        The loss: a scalar, or one a sample for "none".

    Raises:
        ValueError: targets of another shape than the samples, not integer, or an unknown reduction.
    """
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(_REDUCTIONS)}, got {reduction!r}")
    if logits.dim() == 0:
        raise ValueError("logits need a dimension of classes, got a scalar")
    samples = logits.shape[:1] + logits.shape[2:] if logits.dim() > 1 else logits.shape[:0]
    if target.shape != samples:
        raise ValueError(
            f"logits of shape {tuple(logits.shape)} need targets of shape {tuple(samples)}, got {tuple(target.shape)}"
        )
    if target.is_floating_point() or target.is_complex():
        raise ValueError(f"targets must be class indices of an integer type, got {target.dtype}")
    if dtype is None:
        dtype = torch.promote_types(logits.dtype, torch.float32)
    log_probabilities = log_stablemax(logits, dim=min(1, logits.dim() - 1), dtype=dtype)
    return nn.functional.nll_loss(log_probabilities, target.long(), reduction=reduction)


class StableMaxLoss(nn.Module):
    """`stablemax_cross_entropy` as a module, in place of `torch.nn.CrossEntropyLoss`.

    Args:
        reduction: "mean", "sum" or "none".
        dtype: what to compute in; None is the logits' own, but float32 at least.

    Raises:
        ValueError: an unknown reduction.
    """

    def __init__(self, reduction: Reduction = "mean", dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if reduction not in _REDUCTIONS:
            raise ValueError(f"reduction must be one of {', '.join(_REDUCTIONS)}, got {reduction!r}")
        self.reduction: Reduction = reduction
        self.dtype = dtype

    def forward(
        self, logits: Float[Tensor, "batch classes *positions"], target: Int[Tensor, "*samples"]
    ) -> Float[Tensor, "*reduced"]:
        """Return the loss; see `stablemax_cross_entropy`."""
        return stablemax_cross_entropy(logits, target, self.reduction, self.dtype)


class StableMaxHead(LinearHead):
    """Linear logits with the StableMax loss.

    The probabilities are `postern.softmax.stablemax` of the logits.

    Args:
        in_features: width of the hidden vectors.
        num_classes: number of classes, at least 2.
        bias: whether the linear layer has one.
        dtype: what the loss is computed in; None is the logits' own, but float32 at least.

    Raises:
        ValueError: sizes that make no classifier.
    """

    def __init__(self, in_features: int, num_classes: int, bias: bool = True, dtype: torch.dtype | None = None) -> None:
        super().__init__(in_features, num_classes, bias)
        self.dtype = dtype

    def loss(self, hidden: Float[Tensor, "*batch in_features"], target: Int[Tensor, "*batch"]) -> Float[Tensor, ""]:
        """Return the mean of ``-log stablemax(z)_y``.

        Raises:
            ValueError: see `Head.loss`.
        """
        check_target(hidden, target)
        logits = self.logits(hidden).reshape(-1, self.num_classes)
        return stablemax_cross_entropy(logits, target.reshape(-1), dtype=self.dtype)
