"""Expected calibration error: how far confidence is from accuracy.

Paper: On Calibration of Modern Neural Networks (arXiv 1706.04599) for bins of equal width; bins of equal mass are those
of Verified Uncertainty Calibration (arXiv 1909.10155).
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

Binning = Literal["quantile", "uniform"]


def expected_calibration_error(
    confidence: Float[Tensor, " samples"],
    correct: Bool[Tensor, " samples"],
    num_bins: int = 15,
    binning: Binning = "quantile",
) -> float:
    """``sum_b (n_b / n) |accuracy_b - mean confidence_b|`` over bins of the confidence.

    Args:
        confidence: probability of the predicted class, in [0, 1].
        correct: whether the prediction is right.
        num_bins: number of bins.
        binning: "quantile" for bins of equal mass, where samples of equal confidence share the bin of the first of
            them, so that the order of the samples does not matter; "uniform" for bins of equal width.

    Raises:
        ValueError: no samples, sizes that differ, a confidence outside [0, 1], no bins, or an unknown binning.
    """
    if binning not in get_args(Binning):
        raise ValueError(f"binning is one of {get_args(Binning)}, got {binning!r}")
    if num_bins < 1:
        raise ValueError(f"there is at least one bin, got num_bins={num_bins}")
    if confidence.dim() != 1 or confidence.shape != correct.shape or not len(confidence):
        raise ValueError(
            f"each sample has a confidence and is right or not, got {list(confidence.shape)} and {list(correct.shape)}"
        )
    confidence = confidence.double()
    if not ((confidence >= 0) & (confidence <= 1)).all():
        raise ValueError(f"confidences lie in [0, 1], got {confidence.min().item():g} to {confidence.max().item():g}")
    samples = len(confidence)
    if binning == "uniform":
        which = (confidence * num_bins).long().clamp_max(num_bins - 1)
    else:
        below = torch.searchsorted(confidence.sort().values, confidence)
        which = below * num_bins // samples
    gaps = torch.zeros(num_bins, dtype=torch.float64, device=confidence.device)
    return gaps.index_add(0, which, correct.double() - confidence).abs().sum().item() / samples
