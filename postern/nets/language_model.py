"""A small causal language model in the manner of OPT, and how the experiments train and judge it.

Learned positions, layers that normalise before attention and before the feed-forward block, a last normalisation, and
an output layer that shares the embedding's weights (arXiv 2205.01068). Its attention can be any layer that follows
`postern.attention.Attention`; its feed-forward blocks, norms and positions can be others as well, e.g. Llama's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from postern.attention.self_attention import SelfAttention
from postern.nets.evaluation import evaluating

AttentionBuilder = Callable[[int], nn.Module]
WidthBuilder = Callable[[int], nn.Module]
Progress = Callable[[Iterable[int]], Iterable[int]]


@dataclass
class LanguageModelCache:
    """What a language model keeps of the tokens it has seen: one cache a layer, and their number."""

    layers: list[Any]
    length: int = 0


class LanguageModelLayer(nn.Module):
    """``x + attention(norm(x))``, then ``x + W_2 activation(W_1 norm(x))`` or ``x + feedforward(norm(x))``.

    Args:
        attention: follows `postern.attention.Attention`.
        width: features of a token.
        feedforward_dim: hidden width of the feed-forward block.
        activation: of the feed-forward block.
        dropout: share of each block's outputs that are zeroed in training.
        feedforward: makes another feed-forward block, of the width that it is given.
        norm: makes the norms, of the width that it is given.
    """

    def __init__(
        self,
        attention: nn.Module,
        width: int,
        feedforward_dim: int,
        activation: Callable[[Tensor], Tensor],
        dropout: float,
        feedforward: WidthBuilder | None = None,
        norm: WidthBuilder = nn.LayerNorm,
    ) -> None:
        super().__init__()
        self.attention_norm = norm(width)
        self.attention = attention
        self.feedforward_norm = norm(width)
        self.feedforward = None if feedforward is None else feedforward(width)
        if self.feedforward is None:
            self.expand = nn.Linear(width, feedforward_dim)
            self.contract = nn.Linear(feedforward_dim, width)
        self.activation = activation
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Float[Tensor, "batch time width"], mask: Bool[Tensor, "*mask"] | None = None, cache: Any = None
    ) -> Float[Tensor, "batch time width"]:
        """Return the tokens after both blocks."""
        x = x + self.dropout(self.attention(self.attention_norm(x), mask, cache))
        hidden = self.feedforward_norm(x)
        if self.feedforward is None:
            hidden = self.contract(self.activation(self.expand(hidden)))
        else:
            hidden = self.feedforward(hidden)
        output: Tensor = x + self.dropout(hidden)
        return output


class LanguageModel(nn.Module):
    """A causal transformer over tokens.

    Args:
        num_tokens: size of the vocabulary; 256 for bytes.
        width: features of a token, a multiple of ``num_heads``.
        num_layers: number of layers.
        num_heads: attention heads a layer, for the default attention.
        context: longest sequence.
        attention: makes the attention of layer 0, 1, ...: causal, of this width. By default
            `postern.attention.SelfAttention`.
        feedforward_dim: hidden width of the feed-forward blocks; by default four times the width.
        activation: of the feed-forward blocks.
        dropout: share of the embeddings and of each block's outputs that are zeroed in training.
        initial_std: standard deviation of the initial embeddings and linear weights; biases start at 0. Other
            parameters of the attention layers keep their own start. None for torch's own start of all.
        has_position_embedding: whether a learned vector of its position is added to each token; false where the
            attention knows positions.
        feedforward: makes the feed-forward blocks, of the width that it is given; ``feedforward_dim`` and
            ``activation`` are then those of none.
        norm: makes the norms, of the width that it is given.
        shares_embedding: whether the output layer shares the embedding's weights.

    Raises:
        ValueError: a size below 1, a standard deviation that is not positive, or an attention layer of another width
            or that is not causal.
    """

    def __init__(
        self,
        num_tokens: int,
        width: int = 128,
        num_layers: int = 4,
        num_heads: int = 4,
        context: int = 128,
        *,
        attention: AttentionBuilder | None = None,
        feedforward_dim: int | None = None,
        activation: Callable[[Tensor], Tensor] = F.relu,
        dropout: float = 0.0,
        initial_std: float | None = 0.02,
        has_position_embedding: bool = True,
        feedforward: WidthBuilder | None = None,
        norm: WidthBuilder = nn.LayerNorm,
        shares_embedding: bool = True,
    ) -> None:
        super().__init__()
        feedforward_dim = 4 * width if feedforward_dim is None else feedforward_dim
        if min(num_tokens, width, num_layers, num_heads, context, feedforward_dim) < 1:
            raise ValueError(
                f"sizes are positive, got num_tokens={num_tokens}, width={width}, num_layers={num_layers}, "
                f"num_heads={num_heads}, context={context}, feedforward_dim={feedforward_dim}"
            )
        if initial_std is not None and not initial_std > 0:
            raise ValueError(f"initial_std must be positive, got {initial_std}")
        self.num_tokens = num_tokens
        self.width = width
        self.context = context
        self.initial_std = initial_std
        self.embedding = nn.Embedding(num_tokens, width)
        self.position = nn.Embedding(context, width) if has_position_embedding else None
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList()
        for index in range(num_layers):
            layer = SelfAttention(width, num_heads, is_causal=True) if attention is None else attention(index)
            if getattr(layer, "width", None) != width or not getattr(layer, "is_causal", False):
                raise ValueError(
                    f"the attention of layer {index} must be causal and of width {width}, got {type(layer).__name__} "
                    f"with width={getattr(layer, 'width', None)}, is_causal={getattr(layer, 'is_causal', None)}"
                )
            self.layers.append(
                LanguageModelLayer(layer, width, feedforward_dim, activation, dropout, feedforward, norm)
            )
        self.norm = norm(width)
        self.head = nn.Linear(width, num_tokens, bias=False)
        if shares_embedding:
            self.head.weight = self.embedding.weight
        if initial_std is not None:
            self.apply(partial(initialise, std=initial_std))

    def new_cache(self) -> LanguageModelCache:
        """Return an empty cache, for `forward`."""
        attentions: list[Any] = [cast(LanguageModelLayer, layer).attention for layer in self.layers]
        return LanguageModelCache([attention.new_cache() for attention in attentions])

    def features(
        self,
        tokens: Int[Tensor, "batch time"],
        mask: Bool[Tensor, "*mask"] | None = None,
        cache: LanguageModelCache | None = None,
    ) -> Float[Tensor, "batch time width"]:
        """Return what the output layer sees; arguments as in `forward`.

        Raises:
            ValueError: see `forward`.
        """
        start = 0 if cache is None else cache.length
        if tokens.dim() != 2 or tokens.is_floating_point():
            raise ValueError(f"tokens are integers [batch, time], got {tokens.dtype} {list(tokens.shape)}")
        stop = start + tokens.shape[1]
        if stop > self.context:
            raise ValueError(f"the context has room for {self.context} tokens, got {stop}")
        hidden = self.embedding(tokens)
        if self.position is not None:
            hidden = hidden + self.position.weight[start:stop]
        hidden = self.dropout(hidden)
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, mask, None if cache is None else cache.layers[index])
        if cache is not None:
            cache.length = stop
        features: Tensor = self.norm(hidden)
        return features

    def forward(
        self,
        tokens: Int[Tensor, "batch time"],
        mask: Bool[Tensor, "*mask"] | None = None,
        cache: LanguageModelCache | None = None,
    ) -> Float[Tensor, "batch time num_tokens"]:
        """Return the logits of each next token.

        Args:
            tokens: indices below ``num_tokens``.
            mask: true where a token may be attended to, ``[batch, time]`` or as in `postern.attention.Attention`.
            cache: from `new_cache`; changed in place. Then ``tokens`` continue those already seen.

        Raises:
            ValueError: tokens that are not integers ``[batch, time]``, or more than the context has room for.
        """
        logits: Tensor = self.head(self.features(tokens, mask, cache))
        return logits

    def loss(self, tokens: Int[Tensor, "batch time"], mask: Bool[Tensor, "*mask"] | None = None) -> Float[Tensor, ""]:
        """Mean cross-entropy, in nats, of each token given those before it; at least two tokens.

        Raises:
            ValueError: see `forward`.
        """
        return next_token_loss(self(tokens[:, :-1], mask), tokens)


def initialise(module: nn.Module, std: float) -> None:
    """Draw the weights of a linear layer or an embedding from a normal distribution; biases start at 0.

    Args:
        module: any; others stay as they are.
        std: standard deviation.
    """
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=std)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def next_token_loss(
    logits: Float[Tensor, "batch time num_tokens"], tokens: Int[Tensor, "batch time+1"]
) -> Float[Tensor, ""]:
    """Mean cross-entropy, in nats, of ``tokens[:, 1:]`` under the logits for them.

    Raises:
        ValueError: not one prediction for each token but the first.
    """
    if logits.shape[:-1] != tokens[:, 1:].shape:
        raise ValueError(
            f"{list(tokens.shape)} tokens need predictions for all but the first, got {list(logits.shape)}"
        )
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten().long())


def train_language_model(
    model: nn.Module,
    tokens: Int[Tensor, " time"],
    *,
    context: int,
    steps: int,
    batch_size: int,
    learning_rate: float,
    generator: torch.Generator,
    warm_up_steps: int = 0,
    final_rate: float = 0.0,
    weight_decay: float = 0.0,
    betas: Sequence[float] = (0.9, 0.95),
    clip_norm: float = 1.0,
    accumulation: int = 1,
    autocast: torch.dtype | None = None,
    loss: Callable[[Tensor], Tensor] | None = None,
    progress: Progress = iter,
) -> list[float]:
    """Train on random windows of a text with AdamW: linear warm-up, then linear decay.

    Args:
        model: ``(tokens [batch, time]) -> logits [batch, time, num_tokens]``; left in training mode.
        tokens: the text; windows are moved to the model's device.
        context: tokens that the model sees at once.
        steps: updates.
        batch_size: windows an update.
        learning_rate: the highest.
        generator: draws the windows; on the CPU.
        warm_up_steps: steps over which the rate grows from 0.
        final_rate: what is left of the rate at the end, as a share of the highest.
        weight_decay: of all parameters but biases; normalisation gains decay as well, as in OPT's recipe.
        betas: Adam's.
        clip_norm: largest norm of the gradient.
        accumulation: parts into which a batch is split to save memory.
        autocast: a 16-bit type to compute in, where it pays.
        loss: of windows ``[batch, context + 1]``; by default `next_token_loss` of the model's logits.
        progress: wraps the loop over the steps, to show how far it is.

    Returns:
        The training loss of every step, in nats.

    Raises:
        ValueError: fewer tokens than one window, sizes below 1, or a batch that does not split into equal parts.
    """
    if min(context, steps, batch_size, accumulation) < 1 or batch_size % accumulation:
        raise ValueError(
            f"context, steps, batch_size and accumulation are positive and the last divides the batch, "
            f"got {context}, {steps}, {batch_size}, {accumulation}"
        )
    check_text(tokens, context)
    device = next(model.parameters()).device
    decaying = [parameter for name, parameter in model.named_parameters() if not name.endswith("bias")]
    biases = [parameter for name, parameter in model.named_parameters() if name.endswith("bias")]
    optimizer = torch.optim.AdamW(
        [{"params": decaying, "weight_decay": weight_decay}, {"params": biases, "weight_decay": 0.0}],
        lr=learning_rate,
        betas=(betas[0], betas[1]),
    )
    losses = []
    model.train()
    for step in progress(range(steps)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * rate_at(step, steps, warm_up_steps, final_rate)
        windows = random_windows(tokens, context + 1, batch_size, generator)
        total = 0.0
        for part in windows.to(device).chunk(accumulation):
            with torch.autocast(device.type, autocast, enabled=autocast is not None):
                found = next_token_loss(model(part[:, :-1]), part) if loss is None else loss(part)
            torch.autograd.backward([found / accumulation])
            total += found.item() / accumulation
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(total)
    return losses


def rate_at(step: int, steps: int, warm_up_steps: int = 0, final_rate: float = 0.0) -> float:
    """The learning rate at a step, as a share of the highest: linear warm-up, then linear decay to ``final_rate``."""
    if step < warm_up_steps:
        return (step + 1) / warm_up_steps
    left = (steps - step) / max(1, steps - warm_up_steps)
    return final_rate + (1 - final_rate) * left


def random_windows(
    tokens: Int[Tensor, " time"], length: int, count: int, generator: torch.Generator
) -> Int[Tensor, "count length"]:
    """Draw windows of a text, uniformly.

    Raises:
        ValueError: a text shorter than a window.
    """
    check_text(tokens, length - 1)
    starts = torch.randint(len(tokens) - length + 1, (count, 1), generator=generator)
    return tokens[starts + torch.arange(length)].long()


def consecutive_windows(tokens: Int[Tensor, " time"], length: int, count: int) -> Int[Tensor, "count length"]:
    """The first windows of a text, each beginning with the token that the one before ends with.

    Args:
        tokens: the text.
        length: tokens a window, at least 2.
        count: how many at most; there may be fewer.

    Raises:
        ValueError: a text shorter than a window.
    """
    check_text(tokens, length - 1)
    return tokens.unfold(0, length, length - 1)[:count].long()


@torch.no_grad()
def language_model_loss(model: nn.Module, windows: Int[Tensor, "count length"], batch_size: int = 32) -> float:
    """Mean cross-entropy of windows of a text, in nats a token, in evaluation mode.

    Args:
        model: ``(tokens [batch, time]) -> logits [batch, time, num_tokens]``.
        windows: from `consecutive_windows`; they are moved to the model's device.
        batch_size: windows at once.

    Raises:
        ValueError: no windows, or a batch size below 1.
    """
    if not len(windows) or batch_size < 1:
        raise ValueError(f"a loss needs windows and a positive batch size, got {len(windows)} and {batch_size}")
    device = next(model.parameters()).device
    total = 0.0
    with evaluating(model):
        for batch in torch.split(windows.to(device), batch_size):
            total += next_token_loss(model(batch[:, :-1]), batch).item() * len(batch)
    return total / len(windows)


def check_text(tokens: Tensor, context: int) -> None:
    """Check that a text has at least one window.

    Raises:
        ValueError: tokens that are not a row of integers, or fewer than ``context + 1``.
    """
    if tokens.dim() != 1 or tokens.is_floating_point():
        raise ValueError(f"a text is a row of integer tokens, got {tokens.dtype} {list(tokens.shape)}")
    if len(tokens) <= context:
        raise ValueError(f"a window has {context + 1} tokens, the text only {len(tokens)}")
