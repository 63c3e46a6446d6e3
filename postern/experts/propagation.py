"""Tokens that take over the expert preferences of related tokens.

Paper: "Improving Routing in Sparse Mixture of Experts with Graph of Tokens", arXiv 2505.00792. There a token first
picks a related token, with probabilities that make a row of a matrix ``S`` or ``A``, and then an expert as that token
would; the related token is summed out.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from postern.attention.entropy import attention_entropy
from postern.attention.self_attention import attend


def related_tokens(
    num_tokens: int,
    mask: Bool[Tensor, "batch time"] | None = None,
    *,
    is_causal: bool = True,
    document_ids: Int[Tensor, "batch time"] | None = None,
    device: torch.device | None = None,
) -> Bool[Tensor, "#batch time time"]:
    """True where the token of a row may take over the preference of the token of a column.

    Those are the tokens of its document that count, in causal models up to the row's own; and always the row's own, so
    that tokens that do not count have a row that adds up to 1 as well.

    Args:
        num_tokens: of a sequence.
        mask: true where a token counts.
        is_causal: whether later tokens are left out.
        document_ids: whose tokens these are, where a sequence holds several documents.
        device: where to make it without a mask and documents.
    """
    device = next((x.device for x in (mask, document_ids) if x is not None), device)
    related = torch.ones(1, num_tokens, num_tokens, dtype=torch.bool, device=device)
    if is_causal:
        related = related.tril()
    if mask is not None:
        related = related & (mask[:, None, :] | torch.eye(num_tokens, dtype=torch.bool, device=device))
    return related if document_ids is None else related & _same_document(document_ids)


def _same_document(document_ids: Int[Tensor, "batch time"]) -> Bool[Tensor, "batch time time"]:
    """True where the tokens of a row and of a column are of one document."""
    return document_ids[:, :, None] == document_ids[:, None, :]


def propagate(
    attention: Float[Tensor, "batch heads time time"],
    preferences: Float[Tensor, "batch time num_experts"],
    mask: Bool[Tensor, "batch time"] | None = None,
    head_weights: Float[Tensor, " heads"] | None = None,
    *,
    document_ids: Int[Tensor, "batch time"] | None = None,
) -> Float[Tensor, "batch time num_experts"]:
    """``A R`` with ``A = sum_h w_h A_h``; what a row of A lacks to 1 stays with the token itself.

    So a token that attends to nothing keeps its preference.

    Args:
        attention: weights of the attention layer before, before dropout.
        preferences: R, the probabilities or logits of all experts.
        mask: true where a token counts; no other is averaged over.
        head_weights: w, adding up to 1; by default equal.
        document_ids: whose tokens these are; none is averaged over those of another document.
    """
    combined = attention.mean(1) if head_weights is None else torch.einsum("bhij,h->bij", attention, head_weights)
    if mask is not None:
        combined = combined * mask[:, None, :]
    if document_ids is not None:
        combined = combined * _same_document(document_ids)
    return combined @ preferences + (1 - combined.sum(-1, keepdim=True)) * preferences


def propagate_with_sdpa(
    query: Float[Tensor, "batch heads time head_dim"],
    key: Float[Tensor, "batch kv_heads time head_dim"],
    preferences: Float[Tensor, "batch time num_experts"],
    mask: Bool[Tensor, "batch time"] | None = None,
    *,
    is_causal: bool = True,
    head_weights: Float[Tensor, " heads"] | None = None,
    document_ids: Int[Tensor, "batch time"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "batch time num_experts"]:
    """``sum_h w_h softmax(scale Q_h K_h^T) R`` by fused attention with R as the values: A is never in memory.

    Args:
        query: of the attention layer before, as it multiplies them.
        key: likewise; several query heads in a row may share one head of keys.
        preferences: R, the probabilities or logits of all experts.
        mask: true where a token counts; no other is averaged over, but that such a token looks at itself.
        is_causal: whether a token sees itself and earlier ones only.
        head_weights: w, adding up to 1; by default equal.
        document_ids: whose tokens these are; none is averaged over those of another document.
        scale: by default ``1 / sqrt(head_dim)``.
    """
    head_dim, num_experts = query.shape[-1], preferences.shape[-1]
    scale = head_dim**-0.5 if scale is None else scale
    # PyTorch's fused kernels, but for one on GPUs, take values as wide as the keys alone; zeros change nothing
    size = max(head_dim, num_experts)
    query, key, value = (F.pad(x, (0, size - x.shape[-1])) for x in (query, key, preferences[:, None]))
    value = value.expand(-1, key.shape[1], -1, -1)
    related = None
    if mask is not None or document_ids is not None:
        related = related_tokens(query.shape[2], mask, is_causal=is_causal, document_ids=document_ids)[:, None]
    by_head = attend(query, key, value, related, is_causal=is_causal, scale=scale)[..., :num_experts]
    if head_weights is None:
        return by_head.mean(1)
    return torch.einsum("bhim,h->bim", by_head, head_weights)


def sharpest_head(attention: Float[Tensor, "batch heads time time"]) -> Float[Tensor, "batch 1 time time"]:
    """Each token's row of the head in which its attention has the lowest entropy.

    The choice is each token's own, so that it does not depend on later ones.
    """
    head = attention_entropy(attention.detach()).argmin(1)
    return attention.gather(1, head[:, None, :, None].expand(-1, 1, -1, attention.shape[-1]))
