"""Similarity-aware and attention-aware routing: related tokens agree on their experts.

Paper: "Improving Routing in Sparse Mixture of Experts with Graph of Tokens", arXiv 2505.00792. The experts still see
the token itself; what is shared is their choice and their weights. What the paper's text left open to us is an option
here.
"""

from __future__ import annotations

from typing import Literal, TypedDict, Unpack, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from postern.attention.self_attention import attention_weights
from postern.experts.propagation import propagate, propagate_with_sdpa, related_tokens, sharpest_head
from postern.experts.routing import NO_CONTEXT, Routing, RoutingContext, check_tokens
from postern.experts.similarity import Similarity, check_similarity, similarity_matrix
from postern.experts.softmax_router import SoftmaxRouter, choose
from postern.precision import without_autocast

Graph = Literal["similarity", "attention", "uniform", "none"]
Mix = Literal["probabilities", "logits", "chosen"]
Heads = Literal["mean", "sharpest", "learned"]
Source = Literal["mixed", "own"]


class GraphOptions(TypedDict, total=False):
    """Options of `TokenGraph` that those who build one pass on."""

    similarity: Similarity
    tau: float
    self_weight: float | None
    heads: Heads
    num_heads: int | None
    mix: Mix
    has_graph_gradient: bool


class TokenGraph(nn.Module):
    """Average the expert preferences of related tokens: ``r~_i = sum_j S_ij r_j``.

    Sums are taken in float32 at least, also under autocast.

    Args:
        width: features of a token.
        graph: who is related: tokens that are alike ("similarity"), those that the attention layer before attends to
            ("attention"), all that are there ("uniform", a control: smoothing without content), or "none".
        top_k: how many preferences count where ``mix`` is "chosen".
        similarity: see `similarity_matrix`; the matrix of "bilinear" is learnt, from ``identity / sqrt(width)`` on.
        tau: temperature of the similarity.
        self_weight: what a token keeps of its own preference beside the average, ``(1 - s) S r + s r``. By default 1/2
            with "attention"; else 0, as the token itself is among those that it relates to.
        heads: what the weights of the heads make together: their "mean", each token's "sharpest" one (of lowest
            entropy; this alone keeps all weights in memory), or a "learned" convex combination.
        num_heads: of the attention layer; needed for "learned".
        mix: what is averaged: "probabilities"; "logits", before softmax; or probabilities of each token's "chosen"
            experts, which share 1.
        has_graph_gradient: whether gradients pass through the similarities or the attention weights.

    Raises:
        ValueError: an unknown option, a temperature that is not positive, a self-weight outside [0, 1], or learned
            heads without their number.
    """

    def __init__(
        self,
        width: int,
        graph: Graph = "similarity",
        *,
        top_k: int = 2,
        similarity: Similarity = "bilinear",
        tau: float = 1.0,
        self_weight: float | None = None,
        heads: Heads = "mean",
        num_heads: int | None = None,
        mix: Mix = "probabilities",
        has_graph_gradient: bool = True,
    ) -> None:
        super().__init__()
        check_choice("graph", graph, Graph)
        check_choice("heads", heads, Heads)
        check_choice("mix", mix, Mix)
        check_similarity(similarity, tau)
        if self_weight is None:
            self_weight = 0.5 if graph == "attention" else 0.0
        if not 0 <= self_weight <= 1:
            raise ValueError(f"a self-weight lies in [0, 1], got {self_weight}")
        is_learned = graph == "attention" and heads == "learned"
        if is_learned and (num_heads is None or num_heads < 1):
            raise ValueError(f"learned weights of heads need their number, num_heads; got {num_heads}")
        self.width = width
        self.graph = graph
        self.top_k = top_k
        self.similarity = similarity
        self.tau = tau
        self.self_weight = self_weight
        self.heads = heads
        self.mix = mix
        self.has_graph_gradient = has_graph_gradient
        is_bilinear = graph == "similarity" and similarity == "bilinear"
        self.weight = nn.Parameter(torch.eye(width) * width**-0.5) if is_bilinear else None
        self.head_logits = nn.Parameter(torch.zeros(num_heads)) if is_learned and num_heads is not None else None

    def forward(
        self,
        logits: Float[Tensor, "batch time num_experts"],
        tokens: Float[Tensor, "batch time width"],
        context: RoutingContext = NO_CONTEXT,
        attention: Float[Tensor, "batch heads time time"] | None = None,
    ) -> Float[Tensor, "batch time num_experts"]:
        """Return the probabilities of all experts that related tokens agree on; they add up to 1.

        Args:
            logits: each token's own.
            tokens: what similarity is judged by.
            context: the mask of those that count, documents, and query and key for the graph of attention.
            attention: the weights of the attention layer before, before dropout and already causal where they have to
                be; in place of query and key.

        Raises:
            ValueError: the graph of attention without attention, or with one of another shape.
        """
        own = logits.softmax(-1)
        if self.graph == "none":
            return own
        with without_autocast(tokens.device):
            if self.mix == "logits":
                return self._average(logits, tokens, context, attention).softmax(-1)
            if self.mix == "chosen":
                weights, indices = choose(own, self.top_k, renormalises=True)
                own = torch.zeros_like(own).scatter(-1, indices, weights)
            return self._average(own, tokens, context, attention)

    @torch.no_grad()
    def matrix(
        self,
        tokens: Float[Tensor, "batch time width"],
        context: RoutingContext = NO_CONTEXT,
        attention: Float[Tensor, "batch heads time time"] | None = None,
    ) -> Float[Tensor, "batch time time"]:
        """Return S with the self-weight in it, whose rows add up to 1; to look at, as `forward` need not make it.

        Args:
            tokens: see `forward`, as for the next ones.
            context: the mask, documents, and query and key.
            attention: in place of query and key.

        Raises:
            ValueError: see `forward`.
        """
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        alone = torch.eye(tokens.shape[1], dtype=dtype, device=tokens.device).expand(len(tokens), -1, -1)
        if self.graph == "none":
            return alone
        with without_autocast(tokens.device):
            # an average is linear in what is averaged
            return self._average(alone, tokens, context, attention)

    def _average(
        self, preferences: Tensor, tokens: Tensor, context: RoutingContext, attention: Tensor | None
    ) -> Tensor:
        if self.graph == "attention":
            average = self._attend(preferences, context, attention)
        else:
            average = self._relate(tokens.to(preferences.dtype), context) @ preferences
        return average if self.self_weight == 0 else torch.lerp(average, preferences, self.self_weight)

    def _relate(self, tokens: Tensor, context: RoutingContext) -> Tensor:
        mask, is_causal, document_ids = context.mask, context.is_causal, context.document_ids
        if self.graph == "uniform":
            related = related_tokens(
                tokens.shape[1], mask, is_causal=is_causal, document_ids=document_ids, device=tokens.device
            ).to(tokens.dtype)
            return related / related.sum(-1, keepdim=True)
        weight = None if self.weight is None else self.weight.to(tokens.dtype)
        found = similarity_matrix(
            tokens, self.similarity, self.tau, mask, is_causal=is_causal, document_ids=document_ids, weight=weight
        )
        return found if self.has_graph_gradient else found.detach()

    def _attend(self, preferences: Tensor, context: RoutingContext, attention: Tensor | None) -> Tensor:
        dtype, mask, document_ids = preferences.dtype, context.mask, context.document_ids
        head_weights = None if self.head_logits is None else self.head_logits.to(dtype).softmax(0)
        if attention is None:
            query, key = context.query, context.key
            if query is None or key is None:
                raise ValueError(
                    "routing by attention needs the attention layer before: RoutingContext(query=..., key=...)"
                )
            self._check_heads("query", query, preferences)
            query, key = self._graph(query, dtype), self._graph(key, dtype)
            if self.heads != "sharpest":
                return propagate_with_sdpa(
                    query,
                    key,
                    preferences,
                    mask,
                    is_causal=context.is_causal,
                    head_weights=head_weights,
                    document_ids=document_ids,
                )
            related = related_tokens(
                query.shape[2], mask, is_causal=context.is_causal, document_ids=document_ids, device=query.device
            )
            attention = attention_weights(query, key, related[:, None])
        else:
            self._check_heads("attention", attention, preferences)
            attention = self._graph(attention, dtype)
        if self.heads == "sharpest":
            attention = sharpest_head(attention)
        return propagate(attention, preferences, mask, head_weights, document_ids=document_ids)

    def _graph(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        return x.to(dtype) if self.has_graph_gradient else x.detach().to(dtype)

    def _check_heads(self, name: str, x: Tensor, preferences: Tensor) -> None:
        batch, time, _ = preferences.shape
        num_heads = None if self.head_logits is None else len(self.head_logits)
        if x.dim() != 4 or (x.shape[0], x.shape[2]) != (batch, time) or num_heads not in (None, x.shape[1]):
            heads = "heads" if num_heads is None else num_heads
            raise ValueError(f"{name} begins with [{batch}, {heads}, {time}], got {list(x.shape)}")

    def extra_repr(self) -> str:
        """Return what the printed module says of its settings."""
        return f"graph={self.graph!r}, mix={self.mix!r}, self_weight={self.self_weight}"


class TokenGraphRouter(SoftmaxRouter):
    """``TopK_k`` of ``r~_i = sum_j S_ij softmax(W u_j)``: the experts that related tokens agree on.

    With ``graph="none"`` it is `SoftmaxRouter`. Whether later tokens matter is the context's ``is_causal``.

    Args:
        width: features of a token.
        num_experts: how many there are to choose from.
        top_k: experts of a token.
        graph: who is related, see `TokenGraph`.
        weights: of the chosen experts: those of the average ("mixed"), or the token's "own" probabilities of them.
        balances: what the balance loss is of: the average and the experts chosen by it ("mixed"), or the probabilities
            that are a token's "own" and the experts that it would choose by them.
        renormalises: see `SoftmaxRouter`.
        bias: see `SoftmaxRouter`.
        balance: see `SoftmaxRouter`.
        z: see `SoftmaxRouter`; of the token's own logits.
        temperature: see `SoftmaxRouter`; of the token's own logits.
        similarity: see `TokenGraph`, as for the next ones.
        tau: see `TokenGraph`.
        self_weight: see `TokenGraph`.
        heads: see `TokenGraph`.
        num_heads: see `TokenGraph`.
        mix: see `TokenGraph`.
        has_graph_gradient: see `TokenGraph`.

    Raises:
        ValueError: see `SoftmaxRouter` and `TokenGraph`.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        top_k: int = 2,
        graph: Graph = "similarity",
        *,
        weights: Source = "mixed",
        balances: Source = "mixed",
        renormalises: bool | None = None,
        bias: bool = False,
        balance: float = 0.01,
        z: float = 0.0,
        temperature: float = 1.0,
        **options: Unpack[GraphOptions],
    ) -> None:
        super().__init__(
            width,
            num_experts,
            top_k,
            renormalises=renormalises,
            bias=bias,
            balance=balance,
            z=z,
            temperature=temperature,
        )
        check_choice("weights", weights, Source)
        check_choice("balances", balances, Source)
        self.weights = weights
        self.balances = balances
        self.graph = TokenGraph(width, graph, top_k=top_k, **options)

    @property
    def needs_attention(self) -> bool:
        """Whether the context must have queries and keys."""
        return self.graph.graph == "attention"

    def forward(
        self,
        tokens: Float[Tensor, "batch time width"],
        context: RoutingContext = NO_CONTEXT,
        attention: Float[Tensor, "batch heads time time"] | None = None,
    ) -> Routing:
        """See `postern.experts.Router`; of the context it uses all but the numbers of tokens.

        Args:
            tokens: what the experts will see.
            context: what else is known of them.
            attention: the weights themselves, in place of query and key; see `TokenGraph`.

        Raises:
            ValueError: tokens, a mask, documents or attention that do not fit.
        """
        check_tokens(self, tokens, context)
        logits = self.logits(tokens)
        own = logits.softmax(-1)
        mixed = self.graph(logits, tokens, context, attention)
        weights, indices = choose(mixed, self.top_k, renormalises=self.renormalises)
        if self.weights == "own":
            weights, order = choose(own.gather(-1, indices), self.top_k, renormalises=self.renormalises)
            indices = indices.gather(-1, order)
        if self.balances == "own":
            loss = self.auxiliary_loss(logits, own, own.topk(self.top_k, dim=-1).indices, context)
        else:
            loss = self.auxiliary_loss(logits, mixed, indices, context)
        return Routing(weights, indices, loss, mixed)


def check_choice(name: str, value: str, choices: object) -> None:
    """Check an option that is one of some words.

    Raises:
        ValueError: it is none of them.
    """
    if value not in get_args(choices):
        raise ValueError(f"{name} is one of {', '.join(get_args(choices))}; got {value!r}")
