"""A softmax over the K largest scores, with a bias that weighs the experts but does not select them.

Paper: "Statistical Perspective of Top-K Sparse Softmax Gating Mixture of Experts", arXiv 2309.13850. Most layers of
language models select by score plus bias instead; both are here.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

SelectOn = Literal["score", "score+bias"]


def topk_mask(scores: Float[Tensor, "*shape"], k_active: int, dim: int = -1) -> Bool[Tensor, "*shape"]:
    """True where a score is among the ``k_active`` largest along ``dim``; of equal scores the first counts as larger.

    It takes ``min(K, k - K)`` passes over the scores. That is faster than a sort for the few experts that a gate keeps
    or drops, most of all along a leading dimension, and says which of equal scores is kept, as `torch.topk` does not.

    Args:
        scores: finite numbers.
        k_active: how many are kept, 1 to the size of ``dim``.
        dim: the dimension of the experts.

    Raises:
        ValueError: ``k_active`` out of range.
    """
    size = scores.shape[dim]
    _check_active(size, k_active)
    scores = scores.detach()
    keeps = k_active <= size - k_active
    # dropping the smallest goes through the experts from the last, so that ties fall the same way
    left = scores if keeps else -scores.flip(dim)
    taken = torch.zeros_like(scores, dtype=torch.bool)
    for _ in range(min(k_active, size - k_active)):
        is_largest = left == left.amax(dim, keepdim=True)
        is_first = is_largest & (is_largest.cumsum(dim) == 1)
        taken = taken | is_first
        left = left.masked_fill(is_first, float("-inf"))
    return taken if keeps else ~taken.flip(dim)


def topk_indices(scores: Float[Tensor, "*shape"], k_active: int, dim: int = -1) -> Int[Tensor, "*kept"]:
    """Where the ``k_active`` largest scores are along ``dim``, largest first; of equal scores the first is larger.

    The same choice as that of `topk_mask`, for gathering what belongs to it. It takes K passes over the scores.

    Args:
        scores: finite numbers.
        k_active: how many are kept, 1 to the size of ``dim``.
        dim: the dimension of the experts.

    Raises:
        ValueError: ``k_active`` out of range.
    """
    _check_active(scores.shape[dim], k_active)
    left = scores.detach()
    indices: list[Tensor] = []
    for _ in range(k_active):
        if indices:
            left = left.scatter(dim, indices[-1], float("-inf"))
        indices.append(left.max(dim, keepdim=True).indices)
    return torch.cat(indices, dim)


def topk_softmax_gate(
    scores: Float[Tensor, "*shape experts"],
    bias: Float[Tensor, " experts"] | None,
    k_active: int,
    select_on: SelectOn = "score",
) -> tuple[Float[Tensor, "*shape experts"], Bool[Tensor, "*shape experts"]]:
    """``Softmax(TopK(v, K; u))`` with ``TopK(v_i, K; u_i) = v_i + u_i`` for the K largest ``v_i``, else ``-inf``.

    Gradients go through the kept entries alone; which ones are kept has none.

    Args:
        scores: ``v``, finite.
        bias: ``u``; zero if None.
        k_active: ``K``, how many experts are kept.
        select_on: "score" keeps the largest ``v_i`` and adds the bias afterwards, as the paper has it; "score+bias"
            keeps the largest ``v_i + u_i``. The two cut the inputs into different regions.

    Returns:
        The weights, which sum to one and are zero off the mask, and the mask.

    Raises:
        ValueError: ``k_active`` out of range, an unknown ``select_on``, or a bias of another length.
    """
    check_select_on(select_on)
    if bias is not None and bias.shape[-1:] != scores.shape[-1:]:
        raise ValueError(f"one bias for each of {scores.shape[-1]} experts, got shape {list(bias.shape)}")
    logits = scores if bias is None else scores + bias
    mask = topk_mask(scores if select_on == "score" else logits, k_active)
    return torch.softmax(logits.masked_fill(~mask, float("-inf")), dim=-1), mask


def check_select_on(select_on: str) -> None:
    """Raise ``ValueError`` for an unknown rule of selection."""
    if select_on not in get_args(SelectOn):
        raise ValueError(f"select_on must be 'score' or 'score+bias', got {select_on!r}")


def _check_active(size: int, k_active: int) -> None:
    if not 1 <= k_active <= size:
        raise ValueError(f"of {size} experts between 1 and {size} can be kept, got k_active={k_active}")
