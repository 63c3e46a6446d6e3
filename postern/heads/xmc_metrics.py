"""The metrics of extreme multi-label classification: precision, recall, nDCG, and precision weighted by propensity.

After the Extreme Classification Repository (manikvarma.org/downloads/XC/XMLRepository.html) and "Extreme Multi-label
Loss Functions for Recommendation, Tagging, Ranking & Other Missing Label Applications" (Jain et al., KDD 2016). The
repository's code counts queries without positives as failures; here they are left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from postern.heads.label_sets import LabelSets


def xmc_metrics(
    predicted: Int[Tensor, "queries top"],
    positives: LabelSets,
    ks: Sequence[int] = (1, 3, 5),
    propensities: Float[Tensor, " labels"] | None = None,
) -> dict[str, float]:
    r"""Return ``P@k``, ``nDCG@k``, ``R@k``, and with propensities ``PSP@k``, for every k.

    With ``h_r`` 1 where the label at rank r is a positive, and a query's positives P:
    ``P@k = sum_{r<=k} h_r / k``; ``R@k = sum_{r<=k} h_r / |P|``;
    ``nDCG@k = sum_{r<=k} h_r / log2(r + 1)  /  sum_{r<=min(k,|P|)} 1 / log2(r + 1)``; means over queries. With the
    propensity p of a label, ``PSP@k`` is ``sum_{r<=k} h_r / p_r`` over all queries, divided by the same sum of a
    perfect prediction.

    Args:
        predicted: each query's labels, best first and distinct; -1 where there is none. At least as many as the
            largest k.
        positives: the labels of each query.
        ks: ranks.
        propensities: in (0, 1], one a label; see `label_propensities`.

    Raises:
        ValueError: not one row a query, too few predictions for a k, a k below 1, propensities that are not in (0, 1]
            or not one a label, or no query that has a positive.
    """
    if predicted.dim() != 2 or len(predicted) != len(positives) or predicted.is_floating_point():
        raise ValueError(
            f"predictions are label indices, one row for each of {len(positives)} queries, "
            f"got {predicted.dtype} {list(predicted.shape)}"
        )
    if not ks or min(ks) < 1 or max(ks) > predicted.shape[1]:
        raise ValueError(f"ks lie in 1..{predicted.shape[1]}, the number of predictions, got {list(ks)}")
    counts = positives.counts()
    kept = counts > 0
    if not bool(kept.any()):
        raise ValueError("metrics need a query that has a positive, got none")
    if propensities is not None and (
        propensities.shape != (positives.num_labels,) or not bool(((propensities > 0) & (propensities <= 1)).all())
    ):
        raise ValueError(
            f"propensities lie in (0, 1], one for each of {positives.num_labels} labels, got {list(propensities.shape)}"
        )
    queries = torch.arange(len(predicted), device=predicted.device)[:, None].expand_as(predicted)
    hits = positives.contain(queries, predicted).double()
    counts, hits, predicted = counts[kept], hits[kept], predicted[kept]
    top = max(ks)
    discounts = 1 / torch.arange(2, top + 2, device=hits.device, dtype=torch.float64).log2()
    ideal = discounts.cumsum(0)
    inverse = None if propensities is None else 1 / propensities.double()
    result = {}
    for k in ks:
        found = hits[:, :k].sum(1)
        gain = (hits[:, :k] * discounts[:k]).sum(1)
        result[f"P@{k}"] = found.mean().item() / k
        result[f"nDCG@{k}"] = (gain / ideal[counts.clamp_max(k) - 1]).mean().item()
        result[f"R@{k}"] = (found / counts).mean().item()
        if inverse is not None:
            reached = (hits[:, :k] * inverse[predicted[:, :k].clamp_min(0)]).sum()
            result[f"PSP@{k}"] = (reached / _best_sum(positives, inverse, k)).item()
    return result


def label_propensities(
    frequencies: Int[Tensor, " labels"], num_queries: int, a: float = 0.55, b: float = 1.5
) -> Float[Tensor, " labels"]:
    r"""Return how likely a positive label is to be recorded: ``1 / (1 + C (N_l + B)^{-A})``, after Jain et al.

    ``C = (log N - 1) (B + 1)^A``. Rare labels are missed most.

    Args:
        frequencies: number ``N_l`` of training queries that have each label.
        num_queries: number N of training queries.
        a: A; 0.55 in general, 0.5 for Wikipedia's sets, 0.6 for Amazon's.
        b: B; 1.5 in general, 0.4 for Wikipedia's, 2.6 for Amazon's.

    Raises:
        ValueError: fewer than three queries (``log N`` must exceed 1), or negative parameters or frequencies.
    """
    if num_queries < 3 or a < 0 or b < 0:
        raise ValueError(f"propensities need at least 3 queries and a, b >= 0, got {num_queries}, {a} and {b}")
    if frequencies.dim() != 1 or not frequencies.numel() or int(frequencies.min()) < 0:
        raise ValueError(f"frequencies are a row of counts, got {list(frequencies.shape)}")
    c = (math.log(num_queries) - 1) * (b + 1) ** a
    propensities: Tensor = 1 / (1 + c * (frequencies.double() + b) ** -a)
    return propensities


def _best_sum(positives: LabelSets, inverse: Float[Tensor, " labels"], k: int) -> Float[Tensor, ""]:
    """The sum over queries of the k largest inverse propensities of their positives."""
    rows, labels = positives.pairs()
    gains = inverse[labels]
    order = gains.argsort(descending=True)
    order = order[rows[order].argsort(stable=True)]
    sorted_rows = rows[order]
    rank = torch.arange(len(rows), device=rows.device) - torch.searchsorted(sorted_rows, sorted_rows)
    return gains[order][rank < k].sum()
