"""A dual encoder: one encoder for queries and labels, whose inner products are the scores.

Paper: "Dual-Encoders for Extreme Multi-Label Classification" (arXiv 2310.10636): DistilBERT, the first token's last
hidden state, optionally a linear bottleneck, embeddings of length 1 and a temperature of 0.05.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from postern.errors import MissingExtra
from postern.heads._positives import at_least_float32
from postern.precision import without_autocast

Pooling = Literal["cls", "mean"]


class DualEncoder(nn.Module):
    """Embeds queries and labels with one encoder; ``score = embed(query) . embed(label) / tau``.

    Args:
        encoder: any module. It is called with ``encoder(inputs)``, or ``encoder(**inputs)`` where the inputs are a
            mapping (as tokenizers give), and returns vectors ``[batch, width]``, states ``[batch, time, width]``, or an
            object with ``last_hidden_state``, as models of Hugging Face do.
        pooling: how states become a vector: "cls" takes the first, "mean" the mean over the ``attention_mask`` of the
            inputs, or over all where there is none. Vectors are taken as they are.
        dim: width of a linear bottleneck after pooling; None for none.
        normalize: whether embeddings have length 1.
        tau: temperature; the paper uses 0.05 for embeddings of length 1 and 1 for others.
        encoder_dim: width of the encoder, where a bottleneck is wanted and the encoder has no ``config.hidden_size``.

    Raises:
        ValueError: a tau or width that is not positive, unknown pooling, or a bottleneck under an unknown width.
    """

    def __init__(
        self,
        encoder: nn.Module,
        pooling: Pooling = "cls",
        dim: int | None = None,
        normalize: bool = True,
        tau: float = 0.05,
        *,
        encoder_dim: int | None = None,
    ) -> None:
        super().__init__()
        if pooling not in ("cls", "mean"):
            raise ValueError(f"pooling must be cls or mean, got {pooling!r}")
        if not 0 < tau < float("inf"):
            raise ValueError(f"tau must be positive, got {tau}")
        if dim is not None and dim < 1:
            raise ValueError(f"dim must be at least 1, got {dim}")
        self.encoder = encoder
        self.pooling: Pooling = pooling
        self.normalize = normalize
        self.tau = tau
        self.bottleneck: nn.Module = nn.Identity()
        if dim is not None:
            if encoder_dim is None:
                encoder_dim = getattr(getattr(encoder, "config", None), "hidden_size", None)
            if encoder_dim is None:
                raise ValueError("a bottleneck needs encoder_dim: the encoder has no config.hidden_size")
            self.bottleneck = nn.Linear(encoder_dim, dim)

    @classmethod
    def from_hugging_face(cls, model: Any, **options: Any) -> DualEncoder:
        """Build one over a model of Hugging Face.

        Args:
            model: a configuration such as ``DistilBertConfig(...)``, for fresh weights, or a name or folder such as
                "distilbert-base-uncased", for pretrained ones.
            options: see the class.

        Raises:
            MissingExtra: Transformers is not installed.
            ValueError: see the class.
        """
        try:
            import transformers
        except ImportError as error:
            raise MissingExtra("transformers", "An encoder of Hugging Face") from error
        make = transformers.AutoModel.from_pretrained if isinstance(model, str) else transformers.AutoModel.from_config
        return cls(make(model), **options)

    def forward(self, inputs: Any) -> Float[Tensor, "batch dim"]:
        """Return the embeddings of queries or labels, in float32 at least.

        Args:
            inputs: what the encoder takes.

        Raises:
            ValueError: an encoder that returns neither vectors nor states.
        """
        output = self.encoder(**inputs) if isinstance(inputs, Mapping) else self.encoder(inputs)
        states = getattr(output, "last_hidden_state", output)
        if not isinstance(states, Tensor) or states.dim() not in (2, 3):
            what = list(states.shape) if isinstance(states, Tensor) else type(states).__name__
            raise ValueError(f"an encoder returns [batch, width] or [batch, time, width], got {what}")
        embeddings = at_least_float32(self.bottleneck(self._pool(states, inputs) if states.dim() == 3 else states))
        return F.normalize(embeddings, dim=-1) if self.normalize else embeddings

    def scores(
        self,
        queries: Float[Tensor, "queries dim"],
        labels: Float[Tensor, "labels dim"],
        excluded: tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]] | None = None,
    ) -> Float[Tensor, "queries labels"]:
        """Return ``queries @ labels.T / tau`` of embeddings, in float32 at least, also under autocast.

        Args:
            queries: embeddings.
            labels: embeddings.
            excluded: pairs of a query and a label that are neither right nor wrong; their score is -inf, which the
                losses leave out.
        """
        with without_autocast(queries.device):
            scores = at_least_float32(queries) @ at_least_float32(labels).T / self.tau
            return scores if excluded is None else scores.index_put(excluded, scores.new_tensor(-torch.inf))

    def _pool(self, states: Float[Tensor, "batch time width"], inputs: Any) -> Float[Tensor, "batch width"]:
        if self.pooling == "cls":
            return states[:, 0]
        mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
        if mask is None:
            return states.mean(1)
        weights = mask.to(states.dtype)[..., None]
        mean: Tensor = (states * weights).sum(1) / weights.sum(1).clamp_min(1)
        return mean


@torch.no_grad()
def top_labels(
    queries: Float[Tensor, "queries dim"],
    labels: Float[Tensor, "labels dim"],
    k: int,
    *,
    excluded: tuple[Int[Tensor, " pairs"], Int[Tensor, " pairs"]] | None = None,
    block: int = 65_536,
) -> tuple[Float[Tensor, "queries k"], Int[Tensor, "queries k"]]:
    """Return the inner products and indices of each query's k best labels, best first: exact search.

    Labels are searched block by block, so that memory is for ``queries x (block + k)`` scores.

    Args:
        queries: embeddings.
        labels: embeddings.
        k: how many; all labels where there are fewer.
        excluded: pairs of a query and a label that must not be found; where nothing else is left, the inner product is
            -inf and the index -1.
        block: labels that are scored at once.

    Raises:
        ValueError: embeddings that do not fit each other, a k or block below 1.
    """
    if queries.dim() != 2 or labels.dim() != 2 or queries.shape[1] != labels.shape[1] or not len(labels):
        raise ValueError(
            f"embeddings are [queries, dim] and [labels, dim] with at least one label, "
            f"got {list(queries.shape)} and {list(labels.shape)}"
        )
    if k < 1 or block < 1:
        raise ValueError(f"k and block must be at least 1, got {k} and {block}")
    values = queries.new_empty(len(queries), 0)
    indices = torch.empty(len(queries), 0, dtype=torch.long, device=queries.device)
    for start in range(0, len(labels), block):
        scores = queries @ labels[start : start + block].T
        if excluded is not None:
            is_here = (excluded[1] >= start) & (excluded[1] < start + scores.shape[1])
            scores[excluded[0][is_here], excluded[1][is_here] - start] = -torch.inf
        new = scores.topk(min(k, scores.shape[1]), dim=1)
        values = torch.cat([values, new.values], dim=1)
        indices = torch.cat([indices, new.indices + start], dim=1)
        values, best = values.topk(min(k, values.shape[1]), dim=1)
        indices = indices.gather(1, best)
    return values, indices.masked_fill(values == -torch.inf, -1)
