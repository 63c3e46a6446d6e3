"""How decided a router is, how even its load, and what averaging over related tokens can do to the former.

The bounds are not in the paper that they are about, "Improving Routing in Sparse Mixture of Experts with Graph of
Tokens", arXiv 2505.00792, which says that such averages are more decided. The lower bound is Jensen's inequality; the
upper one counts the choice of the related token in.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from postern.attention.entropy import attention_entropy


def selection_entropy(
    probabilities: Float[Tensor, "*tokens num_experts"], mask: Bool[Tensor, "*tokens"] | None = None
) -> Float[Tensor, ""]:
    """Mean over tokens of ``-sum_k r_k log(r_k)``, in nats: 0 for one expert, ``log(num_experts)`` for no preference.

    Args:
        probabilities: of all experts.
        mask: true where a token counts.
    """
    entropy = attention_entropy(probabilities)
    return entropy.mean() if mask is None else (entropy * mask).sum() / mask.sum().clamp_min(1)


def load_entropy(
    probabilities: Float[Tensor, "*tokens num_experts"], mask: Bool[Tensor, "*tokens"] | None = None
) -> Float[Tensor, ""]:
    """Entropy of the mean over tokens, in nats: ``log(num_experts)`` for an even load, 0 where one expert gets all.

    Args:
        probabilities: of all experts.
        mask: true where a token counts.
    """
    if mask is None:
        return attention_entropy(probabilities.flatten(0, -2).mean(0))
    load = (probabilities * mask.unsqueeze(-1)).flatten(0, -2).sum(0) / mask.sum().clamp_min(1)
    return attention_entropy(load)


def entropy_bounds(
    graph: Float[Tensor, "*batch time time"], probabilities: Float[Tensor, "*batch time num_experts"]
) -> tuple[Float[Tensor, "*batch time"], Float[Tensor, "*batch time"]]:
    """``sum_j S_ij H(r_j) <= H(sum_j S_ij r_j) <= H(S_i) + sum_j S_ij H(r_j)``: return both bounds, in nats.

    So an average is never more decided than the tokens that it is made of are in the mean.

    Args:
        graph: S, whose rows add up to 1.
        probabilities: r, of all experts.
    """
    least = torch.matmul(graph, attention_entropy(probabilities).unsqueeze(-1)).squeeze(-1)
    return least, least + attention_entropy(graph)
