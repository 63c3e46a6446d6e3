"""What the selection of boxes needs to know beside the boxes, checked once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from postern.boxes.decay import gaussian_decay, hard_decay, linear_decay

Decay = Callable[[Float[Tensor, "*shape"]], Float[Tensor, "*shape"]]


@dataclass(frozen=True)
class Options:
    """The parameters of `postern.boxes.soft_nms`.

    Raises:
        ValueError: a parameter out of range.
    """

    method: str = "gaussian"
    iou_threshold: float = 0.3
    sigma: float = 0.5
    score_threshold: float = 1e-3
    max_out: int | None = None
    decay: Decay | None = None
    is_pixel_inclusive: bool = False

    def __post_init__(self) -> None:
        if self.method not in ("gaussian", "linear", "hard"):
            raise ValueError(f"method must be 'gaussian', 'linear' or 'hard', got {self.method!r}")
        if not 0 <= self.iou_threshold <= 1:
            raise ValueError(f"iou_threshold must lie in [0, 1], got {self.iou_threshold}")
        if not 0 < self.sigma < math.inf:
            raise ValueError(f"sigma must be positive and finite, got {self.sigma}")
        if not 0 <= self.score_threshold < math.inf:
            raise ValueError(f"score_threshold must be finite and not negative, got {self.score_threshold}")
        if self.max_out is not None and self.max_out < 1:
            raise ValueError(f"max_out must be at least 1 or None, got {self.max_out}")
        if self.decay is not None:
            _check_decay(self.decay)

    def factors(self, iou: Tensor) -> Tensor:
        """The factors f(iou) of the scores."""
        if self.decay is not None:
            return self.decay(iou).to(iou.dtype)
        if self.method == "gaussian":
            return gaussian_decay(iou, self.sigma)
        return (linear_decay if self.method == "linear" else hard_decay)(iou, self.iou_threshold)


def _check_decay(decay: Decay) -> None:
    probe = torch.linspace(0, 1, 101, dtype=torch.float64)
    factors = decay(probe)
    if not isinstance(factors, Tensor) or factors.shape != probe.shape:
        raise ValueError(f"decay must map a tensor of overlaps to one of the same shape, got {type(factors).__name__}")
    outside = ~((factors >= 0) & (factors <= 1))
    if outside.any():
        iou, factor = probe[outside][0].item(), factors[outside][0].item()
        raise ValueError(f"decay must give factors in [0, 1], got decay({iou:.2f}) = {factor:g}")
