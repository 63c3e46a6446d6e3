"""Thresholds for each exit, such that wanted shares of the samples stop there.

Paper: Multi-Scale Dense Networks for Resource Efficient Image Classification (arXiv 1703.09844), which stops the most
confident samples first and searches the thresholds on validation data.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor


def geometric_exit_fractions(num_exits: int, ratio: float) -> tuple[float, ...]:
    """Shares ``p_k = ratio^k / sum_j ratio^j`` of the samples that stop at each exit.

    Args:
        num_exits: exits, the final head included.
        ratio: positive; below 1 most stop early, above 1 most go far.

    Raises:
        ValueError: no exits, or a ratio that is not positive and finite.
    """
    if num_exits < 1 or not 0 < ratio < math.inf:
        raise ValueError(f"num_exits is at least 1 and ratio positive, got num_exits={num_exits}, ratio={ratio}")
    # Scaled by the largest, so that no power overflows.
    powers = [math.exp(k * math.log(ratio) - max(0.0, (num_exits - 1) * math.log(ratio))) for k in range(num_exits)]
    return tuple(power / sum(powers) for power in powers)


def calibrate_thresholds(
    logits: Sequence[Float[Tensor, "samples classes"]], fractions: Sequence[float]
) -> tuple[float, ...]:
    """Thresholds on the largest probability, one for each exit but the last, for `MaxProbExit`.

    Exit by exit, of the samples that are left the ``round(fractions[k] * samples)`` most confident ones stop; the
    threshold lies half-way between the lowest confidence among them and the highest among the others, so that rounding
    changes no decision. Ties at a threshold stop together.

    Args:
        logits: of each exit on validation samples, the final head last.
        fractions: the share of all samples that is to stop at each exit, the final head included.

    Raises:
        ValueError: as many fractions as do not match the exits, negative ones, or a sum other than 1.
    """
    if len(logits) < 2 or len(fractions) != len(logits):
        raise ValueError(f"each of two or more exits has a fraction, got {len(fractions)} for {len(logits)} exits")
    if min(fractions) < 0 or not math.isclose(sum(fractions), 1, abs_tol=1e-6):
        raise ValueError(f"fractions are not negative and have the sum 1, got {list(fractions)}")
    samples = len(logits[0])
    left = torch.ones(samples, dtype=torch.bool, device=logits[0].device)
    thresholds = []
    for each, fraction in zip(logits[:-1], fractions, strict=False):
        confidence = each.softmax(1).amax(1)
        candidates = confidence[left].sort(descending=True).values
        count = min(round(fraction * samples), len(candidates))
        # no probability reaches infinity
        threshold = candidates[count - 1 : count + 1].double().mean().item() if count else math.inf
        thresholds.append(threshold)
        left &= confidence < threshold
    return tuple(thresholds)
