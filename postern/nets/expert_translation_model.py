"""A small encoder-decoder for translation whose feed-forward blocks may be mixtures of experts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from postern.attention.self_attention import SelfAttention
from postern.experts.mixture import MixtureOfExperts
from postern.experts.routing import Routing, RoutingContext
from postern.nets.expert_language_model import feed_forward
from postern.nets.language_model import initialise

TranslationExpertsBuilder = Callable[[Literal["encoder", "decoder"], int], MixtureOfExperts | None]


class ExpertTranslationLayer(nn.Module):
    """``x + attention(norm(x))``, in a decoder ``x + cross(norm(x), memory)``, then ``x + experts(norm(x))``.

    Args:
        width: features of a token.
        num_heads: attention heads.
        experts: a mixture, or an ordinary feed-forward block.
        is_decoder: whether tokens see earlier ones only, and what the encoder made of the source.
        dropout: share of each block's outputs that is zeroed in training.
    """

    def __init__(self, width: int, num_heads: int, experts: nn.Module, *, is_decoder: bool, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = SelfAttention(width, num_heads, is_causal=is_decoder)
        self.cross_norm = nn.LayerNorm(width) if is_decoder else None
        self.cross = nn.MultiheadAttention(width, num_heads, batch_first=True) if is_decoder else None
        self.feedforward_norm = nn.LayerNorm(width)
        self.feedforward = experts
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        token_ids: Int[Tensor, "batch time"],
        mask: Bool[Tensor, "batch time"],
        memory: Float[Tensor, "batch source_time width"] | None = None,
        memory_mask: Bool[Tensor, "batch source_time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time width"], Routing | None]:
        """Return the tokens after all blocks, and how they were routed; None without experts."""
        attended = self.attention_norm(x)
        x = x + self.dropout(self.attention(attended, mask))
        if self.cross is not None and self.cross_norm is not None:
            ignored = None if memory_mask is None else ~memory_mask
            seen, _ = self.cross(self.cross_norm(x), memory, memory, key_padding_mask=ignored, need_weights=False)
            x = x + self.dropout(seen)
        normed = self.feedforward_norm(x)
        context = RoutingContext(mask, token_ids, is_causal=self.cross is not None)
        output, routing = feed_forward(self.feedforward, normed, context, self.attention, attended)
        return x + self.dropout(output), routing


class ExpertTranslationModel(nn.Module):
    """An encoder-decoder transformer with experts in some of its layers.

    Learned positions, norms before the blocks and at the end of both stacks, and one embedding for source, target and
    output.

    Args:
        num_tokens: size of the vocabulary, which source and target share.
        experts: makes the mixture of layer 0, 1, ... of the "encoder" or "decoder", of this width; None for an ordinary
            block in that layer.
        width: features of a token, a multiple of ``num_heads``.
        num_layers: layers of the encoder, and of the decoder.
        num_heads: attention heads a layer.
        context: longest source or target.
        feedforward_dim: hidden width of ordinary blocks; by default twice the width.
        dropout: share of the embeddings, of ordinary blocks' hidden features and of each block's outputs that is zeroed
            in training.
        pad: token that fills up sources and targets.
        initial_std: standard deviation of the initial embeddings and linear weights; experts keep their own start.

    Raises:
        ValueError: a size below 1, or a mixture of another width.
    """

    def __init__(
        self,
        num_tokens: int,
        experts: TranslationExpertsBuilder,
        width: int = 96,
        num_layers: int = 2,
        num_heads: int = 4,
        context: int = 32,
        *,
        feedforward_dim: int | None = None,
        dropout: float = 0.0,
        pad: int = 0,
        initial_std: float = 0.02,
    ) -> None:
        super().__init__()
        if min(num_tokens, width, num_layers, num_heads, context) < 1:
            raise ValueError(
                f"sizes are positive, got num_tokens={num_tokens}, width={width}, num_layers={num_layers}, "
                f"num_heads={num_heads}, context={context}"
            )
        self.num_tokens = num_tokens
        self.context = context
        self.pad = pad
        self.embedding = nn.Embedding(num_tokens, width)
        self.source_position = nn.Embedding(context, width)
        self.target_position = nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout)
        hidden = 2 * width if feedforward_dim is None else feedforward_dim

        def layer(stack: Literal["encoder", "decoder"], index: int) -> ExpertTranslationLayer:
            mixture: nn.Module | None = experts(stack, index)
            if mixture is not None and getattr(mixture, "width", None) != width:
                raise ValueError(
                    f"the experts of {stack} layer {index} must be of width {width}, "
                    f"got {getattr(mixture, 'width', None)}"
                )
            if mixture is None:
                mixture = nn.Sequential(
                    nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, width)
                )
            return ExpertTranslationLayer(width, num_heads, mixture, is_decoder=stack == "decoder", dropout=dropout)

        self.encoder = nn.ModuleList(layer("encoder", index) for index in range(num_layers))
        self.decoder = nn.ModuleList(layer("decoder", index) for index in range(num_layers))
        self.encoder_norm = nn.LayerNorm(width)
        self.decoder_norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_tokens, bias=False)
        self.head.weight = self.embedding.weight
        self.apply(partial(initialise, std=initial_std))

    def route(
        self, source: Int[Tensor, "batch source_time"], target: Int[Tensor, "batch time"]
    ) -> tuple[Float[Tensor, "batch time num_tokens"], list[Routing]]:
        """Return the logits of what follows each target token, and how tokens were routed in each layer with experts.

        Args:
            source: tokens to translate.
            target: tokens of the translation so far, from the one that starts it.

        Raises:
            ValueError: tokens that are not integers ``[batch, time]``, or more than the context has room for.
        """
        memory, routings = self._encode(source)
        hidden, more = self._decode(target, memory, source)
        return self.head(hidden), routings + more

    def forward(
        self, source: Int[Tensor, "batch source_time"], target: Int[Tensor, "batch time"]
    ) -> Float[Tensor, "batch time num_tokens"]:
        """Return the logits of what follows each target token; see `route`.

        Raises:
            ValueError: see `route`.
        """
        return self.route(source, target)[0]

    def loss(
        self,
        source: Int[Tensor, "batch source_time"],
        target: Int[Tensor, "batch time"],
        *,
        label_smoothing: float = 0.0,
    ) -> Float[Tensor, ""]:
        """Mean cross-entropy, in nats, of each target token but the first, with the routers' auxiliary losses.

        Args:
            source: tokens to translate.
            target: the translation, from the token that starts it.
            label_smoothing: share of the target's probability that goes to all tokens alike.

        Raises:
            ValueError: see `route`.
        """
        logits, routings = self.route(source, target[:, :-1])
        loss = F.cross_entropy(
            logits.flatten(0, 1), target[:, 1:].flatten(), ignore_index=self.pad, label_smoothing=label_smoothing
        )
        return loss + torch.stack([routing.auxiliary_loss for routing in routings]).sum() if routings else loss

    @torch.no_grad()
    def translate(
        self, source: Int[Tensor, "batch source_time"], start: int, end: int
    ) -> Int[Tensor, "batch translated_time"]:
        """Translate greedily: each token is the likeliest after those before it; in the mode the model is in.

        Layers with experts route the translation so far anew for each token. Where routers draw, force what a sentence
        is to keep.

        Args:
            source: tokens to translate.
            start: token that starts a translation.
            end: token that ends it.

        Returns:
            From the token that starts it: as long as the longest, at most a token more than the context has room for,
            padded where a translation has ended.

        Raises:
            ValueError: see `route`.
        """
        memory, _ = self._encode(source)
        target = source.new_full((len(source), 1), start)
        has_ended = torch.zeros(len(source), dtype=torch.bool, device=source.device)
        while target.shape[1] <= self.context and not has_ended.all():
            hidden, _ = self._decode(target, memory, source)
            token = self.head(hidden[:, -1]).argmax(-1).masked_fill(has_ended, self.pad)
            target = torch.cat([target, token[:, None]], dim=1)
            has_ended |= token == end
        return target

    def _encode(self, source: Tensor) -> tuple[Tensor, list[Routing]]:
        """What the encoder makes of the source."""
        routings: list[Routing] = []
        mask = self._check(source) != self.pad
        memory = self.dropout(self.embedding(source) + self.source_position.weight[: source.shape[1]])
        for layer in self.encoder:
            memory, routing = layer(memory, source, mask)
            routings += [] if routing is None else [routing]
        return self.encoder_norm(memory), routings

    def _decode(self, target: Tensor, memory: Tensor, source: Tensor) -> tuple[Tensor, list[Routing]]:
        """What the decoder makes of the target, before the head."""
        routings: list[Routing] = []
        mask = self._check(target) != self.pad
        hidden = self.dropout(self.embedding(target) + self.target_position.weight[: target.shape[1]])
        for layer in self.decoder:
            hidden, routing = layer(hidden, target, mask, memory, source != self.pad)
            routings += [] if routing is None else [routing]
        return self.decoder_norm(hidden), routings

    def _check(self, tokens: Tensor) -> Tensor:
        if tokens.dim() != 2 or tokens.is_floating_point():
            raise ValueError(f"tokens are integers [batch, time], got {tokens.dtype} {list(tokens.shape)}")
        if tokens.shape[1] > self.context:
            raise ValueError(f"the context has room for {self.context} tokens, got {tokens.shape[1]}")
        return tokens
