"""Decay functions of Soft-NMS (arXiv 1704.04503): by what factor a score falls, given the overlap with a better box.

The paper asks of such a function f that it leave boxes alone that do not overlap (f(0) = 1), fall as the overlap
grows, be small near 1, and be continuous. Only the Gaussian has all four properties.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def hard_decay(iou: Float[Tensor, "*shape"], iou_threshold: float = 0.3) -> Float[Tensor, "*shape"]:
    """Classic NMS: 1 where ``iou <= iou_threshold``, else 0."""
    return (iou <= iou_threshold).to(iou.dtype)


def linear_decay(iou: Float[Tensor, "*shape"], iou_threshold: float = 0.3) -> Float[Tensor, "*shape"]:
    """1 where ``iou <= iou_threshold``, else ``1 - iou``: it jumps at the threshold."""
    return torch.where(iou <= iou_threshold, 1.0, 1.0 - iou)


def gaussian_decay(iou: Float[Tensor, "*shape"], sigma: float = 0.5) -> Float[Tensor, "*shape"]:
    """``exp(-iou^2 / sigma)``: continuous, and the form that the paper recommends."""
    return torch.exp(iou * iou * (-1 / sigma))
