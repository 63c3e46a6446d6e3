"""Which filters of a layer matter for an input: those that hold most of its activation.

Paper: Fire Together Wire Together (FTWT, arXiv 2110.08232). The masks are labels for `MaskPredictor`; no gradient flows
through them.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

_DEAD = 1e-5  # of the mass, or of the activation: the bound below which the paper's code takes a filter for dead


@torch.no_grad()
def heatmap_mass_mask(
    output: Float[Tensor, "batch channels height width"], mass: float, min_keep: int = 1
) -> Bool[Tensor, "batch channels"]:
    """Keep, for each input, the most active filters that together hold a share of the activation.

        a_c = max over pixels |O_c|,      p = a / sum(a)
        sorted by p, falling:  keep the filter at rank j  iff  p_1 + .. + p_j <= mass (+ 1e-5)

    So the filter that crosses the share is dropped. A mass of 1 drops the filters that are dead for this input (``p <=
    1e-5``) and no others; a negative one keeps all.

    Args:
        output: of a layer, unpruned.
        mass: share of the activation to keep, at most 1.
        min_keep: filters that are kept at least; without it an input whose largest ``p`` exceeds the mass keeps none.

    Raises:
        ValueError: a mass above 1, or a negative number of filters.
    """
    if mass > 1 or mass != mass or min_keep < 0:
        raise ValueError(f"mass is a share, min_keep not negative, got mass={mass}, min_keep={min_keep}")
    activation = _activation(output)
    if mass < 0:
        return torch.ones_like(activation, dtype=torch.bool)
    p = activation / activation.sum(1, keepdim=True).clamp_min(torch.finfo(activation.dtype).tiny)
    ordered, order = p.sort(dim=1, descending=True, stable=True)
    keep = ordered > _DEAD if mass == 1 else ordered.cumsum(1) <= mass + 1e-5
    keep = keep | _first(min_keep, keep)
    return torch.zeros_like(keep).scatter(1, order, keep)


@torch.no_grad()
def topk_uniform_mask(
    output: Float[Tensor, "batch channels height width"], prune_ratio: float, min_keep: int = 1
) -> Bool[Tensor, "batch channels"]:
    """Drop the same number of filters for each input: the ``int(prune_ratio * channels)`` least active, and dead ones.

    Here the number is the share that is pruned, where `heatmap_mass_mask` takes the share that is kept.

    Args:
        output: of a layer, unpruned.
        prune_ratio: share of the filters to drop, in [0, 1].
        min_keep: filters that are kept at least.

    Raises:
        ValueError: a ratio outside [0, 1], or a negative number of filters.
    """
    if not 0 <= prune_ratio <= 1 or min_keep < 0:
        raise ValueError(f"prune_ratio lies in [0, 1], min_keep is not negative, got {prune_ratio} and {min_keep}")
    ordered, order = _activation(output).sort(dim=1, descending=True, stable=True)
    channels = output.shape[1]
    keep = _first(channels - int(prune_ratio * channels), ordered) & (ordered > _DEAD)
    keep = keep | _first(min_keep, keep)
    return torch.zeros_like(keep).scatter(1, order, keep)


def _activation(output: Tensor) -> Tensor:
    # 16 bits would spoil the cumulative sum
    return output.abs().amax((2, 3)).to(torch.promote_types(output.dtype, torch.float32))


def _first(count: int, like: Tensor) -> Tensor:
    return torch.arange(like.shape[1], device=like.device) < count
