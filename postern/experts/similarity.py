"""Which tokens of a sequence are alike: the graph of similarity-aware routing.

Paper: "Improving Routing in Sparse Mixture of Experts with Graph of Tokens", arXiv 2505.00792.
"""

from __future__ import annotations

from typing import Literal, get_args

from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from postern.experts.propagation import related_tokens

Similarity = Literal["bilinear", "dot", "cosine", "distance"]


def similarity_matrix(
    tokens: Float[Tensor, "batch time width"],
    kind: Similarity = "dot",
    tau: float = 1.0,
    mask: Bool[Tensor, "batch time"] | None = None,
    *,
    is_causal: bool = True,
    document_ids: Int[Tensor, "batch time"] | None = None,
    weight: Float[Tensor, "width width"] | None = None,
) -> Float[Tensor, "batch time time"]:
    """``S_ij = softmax_j(sim(u_i, u_j) / tau)`` over the tokens that i may relate to; rows add up to 1.

    The similarities are ``u_i^T W u_j`` ("bilinear"), ``u_i^T u_j / sqrt(width)`` ("dot"), the cosine, and
    ``-|u_i - u_j|^2`` ("distance").

    Args:
        tokens: u.
        kind: of the similarity.
        tau: temperature, positive; towards 0 a token that is most alike to itself relates to itself alone.
        mask: true where a token counts; the others are related to by none but themselves.
        is_causal: whether a token relates to itself and earlier ones only.
        document_ids: whose tokens these are; none relates to those of another document.
        weight: W, for "bilinear" only.

    Raises:
        ValueError: an unknown similarity, a temperature that is not positive, or a weight where there is none or none
            where there is one.
    """
    check_similarity(kind, tau)
    if (weight is not None) != (kind == "bilinear"):
        raise ValueError(
            f"the bilinear similarity has a weight and the others have none; got {kind!r} "
            f"{'without' if weight is None else 'with'} one"
        )
    if kind == "cosine":
        tokens = F.normalize(tokens, dim=-1)
    left = tokens if weight is None else tokens @ weight
    similarity = left @ tokens.transpose(-1, -2)
    if kind == "dot":
        similarity = similarity * tokens.shape[-1] ** -0.5
    elif kind == "distance":
        # -|u_i|^2 is the same for the whole row, which softmax does not see
        similarity = 2 * similarity - tokens.square().sum(-1)[:, None, :]
    related = related_tokens(
        tokens.shape[1], mask, is_causal=is_causal, document_ids=document_ids, device=tokens.device
    )
    return (similarity / tau).masked_fill(~related, float("-inf")).softmax(-1)


def check_similarity(kind: str, tau: float) -> None:
    """Check the settings of a similarity.

    Raises:
        ValueError: an unknown similarity, or a temperature that is not positive.
    """
    if kind not in get_args(Similarity):
        raise ValueError(f"a similarity is one of {', '.join(get_args(Similarity))}; got {kind!r}")
    if not tau > 0:
        raise ValueError(f"the temperature tau is positive, got {tau}")
