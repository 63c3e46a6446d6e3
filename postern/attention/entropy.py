"""How spread out attention is, and whether a longer query makes it sharper.

Paper: "NaLaFormer: Norm-Aware Linear Attention for Transformer Models", arXiv 2506.21137.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from scipy.stats import rankdata
from torch import Tensor
from torch.nn import functional as F

Weigh = Callable[[Tensor, Tensor], Tensor]
_CONSTANT = 1e-6  # nats


def attention_entropy(weights: Float[Tensor, "*batch queries keys"]) -> Float[Tensor, "*batch queries"]:
    """``-sum_s w_s log(w_s)``, in nats: 0 on one key, ``log(keys)`` where all weigh the same.

    Args:
        weights: at least 0, with the sum 1 over the keys; from `attention_weights` or `linear_attention_weights`.
    """
    entropy: Tensor = torch.special.entr(weights).sum(-1)
    return entropy


def entropy_by_norm(
    weigh: Weigh,
    direction: Float[Tensor, "batch queries head_dim"],
    key: Float[Tensor, "batch keys head_dim"],
    norms: Float[Tensor, " norms"],
) -> Float[Tensor, "batch queries norms"]:
    """Entropy of the attention of queries of these lengths, in nats.

    Args:
        weigh: ``(query, key) -> weights [batch, queries, keys]``.
        direction: queries; each is stretched to every length.
        key: keys.
        norms: lengths.
    """
    unit = F.normalize(direction, dim=-1)
    return torch.stack([attention_entropy(weigh(unit * norm, key)) for norm in norms], dim=-1)


def norm_entropy_correlation(entropy: Float[Tensor, "*batch norms"], norms: Float[Tensor, " norms"]) -> float:
    """Spearman's rank correlation of the query's length and the entropy, a direction at a time; the mean over them.

    It is -1 where each longer query is sharper, however little, and 0 where the length makes no difference (less than
    1e-6 nats): so it goes with a look at the entropies themselves.

    Args:
        entropy: from `entropy_by_norm`.
        norms: lengths, all different.

    Raises:
        ValueError: fewer than two lengths, or not one entropy for each.
    """
    if norms.dim() != 1 or len(norms) < 2 or entropy.shape[-1] != len(norms):
        raise ValueError(
            f"a correlation needs two or more lengths and an entropy for each, got {list(norms.shape)} lengths and "
            f"entropies {list(entropy.shape)}"
        )
    rows = entropy.reshape(-1, len(norms)).double()
    ranks = torch.tensor(rankdata(rows.cpu().numpy(), axis=1))
    by_length = torch.tensor(rankdata(norms.cpu().numpy())) - (len(norms) + 1) / 2
    ranks = ranks - ranks.mean(1, keepdim=True)
    correlation = F.cosine_similarity(ranks, by_length[None], dim=1)
    is_constant = (rows.amax(1) - rows.amin(1)).cpu() < _CONSTANT
    return correlation.where(~is_constant, 0.0).mean().item()
