"""Attention that lets a small gate choose the blocks it looks at while it reads a prompt.

Paper: "SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs", arXiv 2410.13276. Unlike the paper's code, a
row keeps its own block unless told otherwise, blocks begin with the first token of each padded sequence, and the rule
and the scores of a layer can be exchanged at any time. `postern.attention.attach_gates` does the same for models of
Transformers, and `postern.attention.distil_gates` trains the gates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Unpack

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from postern.attention.attn_gate import AttnGate, Pooling
from postern.attention.block_selection import BlockScorer, ScorerInput, check_rule, select_blocks
from postern.attention.block_sparse import Implementation, block_sparse_attention
from postern.attention.block_target import gate_distillation_loss, pooled_attention_target
from postern.attention.protocol import check_input, check_padding
from postern.attention.self_attention import HeadOptions, KeyValueCache, SelfAttention, attend


class BlockSparsity(nn.Module):
    """The heads of one attention layer on a prompt: a gate, a rule that chooses blocks, and attention to these.

    Attributes:
        gate: scores blocks.
        threshold: see `select_blocks`; of this and the next two, all but one are None. All can be changed at any time.
        density: see `select_blocks`.
        top_k: see `select_blocks`.
        dense_last: see `select_blocks`.
        keeps_diagonal: see `select_blocks`.
        scorer: scores blocks in the place of the gate, where it is not None.
        is_sparse: whether blocks that are not chosen are left out; else attention is dense.
        is_distilling: whether each call leaves the gate's loss in ``loss``.
        loss: of the last call, see `postern.attention.gate_loss`.
        drop_first: see `gate_distillation_loss`.
        blocks: those kept in the last call, where ``keeps_blocks`` is set, to look at.
        implementation: see `block_sparse_attention`.

    Args:
        gate: scores blocks.
        threshold: see `select_blocks`.
        density: see `select_blocks`.
        top_k: see `select_blocks`.
        dense_last: see `select_blocks`.
        keeps_diagonal: see `select_blocks`.

    Raises:
        ValueError: not exactly one of the three rules, or one outside its range.
    """

    def __init__(
        self,
        gate: AttnGate,
        *,
        threshold: float | None = None,
        density: float | None = None,
        top_k: int | None = None,
        dense_last: int = 2,
        keeps_diagonal: bool = True,
    ) -> None:
        super().__init__()
        self.gate = gate
        self.scorer: BlockScorer | None = None
        self.is_sparse = True
        self.is_distilling = False
        self.drop_first = 0.25
        self.loss: Tensor | None = None
        self.keeps_blocks = False
        self.blocks: Tensor | None = None
        self.implementation: Implementation = "auto"
        self.set_rule(
            threshold=threshold, density=density, top_k=top_k, dense_last=dense_last, keeps_diagonal=keeps_diagonal
        )

    def set_rule(
        self,
        *,
        threshold: float | None = None,
        density: float | None = None,
        top_k: int | None = None,
        dense_last: int | None = None,
        keeps_diagonal: bool | None = None,
    ) -> None:
        """Choose blocks by another rule; see `select_blocks`. What is None of the last two stays as it is.

        Raises:
            ValueError: not exactly one of threshold, density and top_k, or one outside its range.
        """
        check_rule(threshold, density, top_k, 0 if dense_last is None else dense_last)
        self.threshold = threshold
        self.density = density
        self.top_k = top_k
        if dense_last is not None:
            self.dense_last = dense_last
        if keeps_diagonal is not None:
            self.keeps_diagonal = keeps_diagonal

    def choose(self, x: ScorerInput) -> Bool[Tensor, "batch heads blocks blocks"]:
        """Return the blocks that are kept."""
        with torch.no_grad():
            scores = self.gate(x.plain_query, x.plain_key, x.lengths) if self.scorer is None else self.scorer(x)
            return select_blocks(
                scores,
                threshold=self.threshold,
                density=self.density,
                top_k=self.top_k,
                dense_last=self.dense_last,
                keeps_diagonal=self.keeps_diagonal,
                num_blocks=None if x.lengths is None else -(-x.lengths // x.block),
            )

    def distillation_loss(self, x: ScorerInput) -> Float[Tensor, ""]:
        """The gate's divergence from the pooled attention map; its gradient reaches the gate alone."""
        target = pooled_attention_target(x.query, x.key, x.block, lengths=x.lengths, scale=x.scale)
        scores = self.gate(x.plain_query.detach(), x.plain_key.detach(), x.lengths)
        return gate_distillation_loss(scores, target, drop_first=self.drop_first)

    def forward(
        self,
        query: Float[Tensor, "batch heads time head_dim"],
        key: Float[Tensor, "batch kv_heads time head_dim"],
        value: Float[Tensor, "batch kv_heads time value_dim"],
        plain_query: Float[Tensor, "batch heads time head_dim"],
        plain_key: Float[Tensor, "batch kv_heads time head_dim"],
        mask: Bool[Tensor, "batch time"] | None = None,
        scale: float | None = None,
    ) -> Float[Tensor, "batch heads time value_dim"]:
        """Attend, causally.

        Args:
            query: queries, rotated as in the model.
            key: keys, rotated as in the model.
            value: values.
            plain_query: queries before rotation.
            plain_key: keys before rotation.
            mask: true for tokens, false for padding, on either side. Padding gets zeros where blocks are left out.
            scale: of the logits; by default ``1 / sqrt(head_dim)``.
        """
        if not self.is_sparse and not self.is_distilling:
            return attend(query, key, value, mask, is_causal=True, scale=scale)
        if mask is None:
            return self._attend(value, ScorerInput(query, key, plain_query, plain_key, self.gate.block, None, scale))
        # blocks must begin with the first token of each sequence
        order = (~mask).to(torch.int8).argsort(dim=1, stable=True)
        query, key, value, plain_query, plain_key = (
            _take_tokens(x, order) for x in (query, key, value, plain_query, plain_key)
        )
        lengths = mask.sum(1)
        x = ScorerInput(query, key, plain_query, plain_key, self.gate.block, lengths, scale)
        heads = _take_tokens(self._attend(value, x), order.argsort(dim=1))
        return heads * mask[:, None, :, None]

    def _attend(self, value: Tensor, x: ScorerInput) -> Tensor:
        self.loss = self.distillation_loss(x) if self.is_distilling else None
        if not self.is_sparse:
            return attend(x.query, x.key, value, is_causal=True, scale=x.scale)
        blocks = self.choose(x)
        if self.keeps_blocks:
            self.blocks = blocks
        return block_sparse_attention(
            x.query, x.key, value, blocks, x.block, scale=x.scale, implementation=self.implementation
        )

    def extra_repr(self) -> str:
        """Return what the printed module says of its settings."""
        rules = {"threshold": self.threshold, "density": self.density, "top_k": self.top_k}
        rule = ", ".join(f"{name}={value:g}" for name, value in rules.items() if value is not None)
        return f"{rule}, dense_last={self.dense_last}, keeps_diagonal={self.keeps_diagonal}"


def _take_tokens(x: Tensor, order: Int[Tensor, "batch time"]) -> Tensor:
    return x.gather(2, order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


class SeerAttention(SelfAttention):
    """Causal self-attention that leaves out blocks of a prompt's attention map, those that a gate scores low.

    It follows the protocol of `postern.attention.Attention`. What comes with an empty cache or with none is read with
    blocks left out; what comes after it, token by token or in chunks, attends to everything. Layers with everything
    kept (``density=1``) compute what `SelfAttention` does.

    A new gate knows nothing: train the model with ``sparsity.is_sparse = False``, then its gates by
    `postern.attention.distil_gates`, or both together under `postern.attention.distilling`.

    Args:
        width: features of a token; a multiple of ``num_heads``.
        num_heads: number of heads.
        block: tokens of a block.
        threshold: see `select_blocks`.
        density: see `select_blocks`.
        top_k: see `select_blocks`. Of these three, exactly one is given.
        dense_last: see `select_blocks`.
        keeps_diagonal: see `select_blocks`.
        gate_dim: see `AttnGate`.
        query_pooling: see `AttnGate`.
        key_pooling: see `AttnGate`.
        options: see `SelfAttention`; ``rotary_base`` is the gate's as well, ``is_causal`` is true, ``dropout`` is 0.

    Raises:
        ValueError: see `SelfAttention`, `AttnGate` and `select_blocks`; or dropout, or a layer that is not causal.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        block: int = 64,
        threshold: float | None = None,
        density: float | None = None,
        top_k: int | None = None,
        dense_last: int = 2,
        keeps_diagonal: bool = True,
        gate_dim: int | None = None,
        query_pooling: Sequence[Pooling] = ("avg",),
        key_pooling: Sequence[Pooling] = ("max", "min", "avg"),
        **options: Unpack[HeadOptions],
    ) -> None:
        options.setdefault("is_causal", True)
        super().__init__(width, num_heads, **options)
        if not self.is_causal or self.dropout:
            raise ValueError(
                f"blocks are left out of causal attention without dropout, got is_causal={self.is_causal} and "
                f"dropout={self.dropout}"
            )
        self.sparsity = BlockSparsity(
            AttnGate(
                width // num_heads,
                num_heads,
                self.num_kv_heads,
                block=block,
                gate_dim=gate_dim,
                query_pooling=query_pooling,
                key_pooling=key_pooling,
                rotary_base=self.rotary_base,
            ),
            threshold=threshold,
            density=density,
            top_k=top_k,
            dense_last=dense_last,
            keeps_diagonal=keeps_diagonal,
        )

    def forward(
        self,
        x: Float[Tensor, "batch time width"],
        mask: Bool[Tensor, "batch keys"] | None = None,
        cache: KeyValueCache | None = None,
    ) -> Float[Tensor, "batch time width"]:
        """Attend; see `postern.attention.Attention` for the mask and the cache.

        Raises:
            ValueError: an input of another width, or a mask by query or head.
        """
        check_input(x, self.width)
        start = 0 if cache is None else len(cache)
        check_padding(mask, x.shape[0], start + x.shape[1])
        plain_query, plain_key, value = self.heads(x)
        query, key = self.place(plain_query, plain_key, start)
        if cache is not None:
            key, value = cache.append(key, value)
        if start:
            heads = attend(query, key, value, mask, is_causal=True)
        else:
            heads = self.sparsity(query, key, value, plain_query, plain_key, mask)
        merged: Tensor = self.output(heads.transpose(1, 2).flatten(2))
        return merged


# Training gates ------------------------------------------------------------------------------------------------------


def block_sparsities(model: nn.Module) -> dict[str, BlockSparsity]:
    """Return the gated layers' `BlockSparsity` by their names in the model.

    Raises:
        ValueError: there are none.
    """
    found = {name: module for name, module in model.named_modules() if isinstance(module, BlockSparsity)}
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no gated attention layers: use SeerAttention layers, or attach_gates"
        )
    return found


@contextmanager
def distilling(model: nn.Module, *, is_sparse: bool = False, drop_first: float = 0.25) -> Iterator[None]:
    """Within, calls of the model leave the losses of its gates, for `gate_loss`.

    With ``is_sparse`` the model itself sees what it would see later, so that it can be fine-tuned together with its
    gates, on its own loss plus `gate_loss`; the choice of blocks passes no gradient.

    Args:
        model: with gated layers.
        is_sparse: whether blocks are left out meanwhile.
        drop_first: see `gate_distillation_loss`.

    Raises:
        ValueError: the model has no gated layers.
    """
    layers = list(block_sparsities(model).values())
    before = [(layer.is_distilling, layer.is_sparse, layer.drop_first) for layer in layers]
    for layer in layers:
        layer.is_distilling, layer.is_sparse, layer.drop_first = True, is_sparse, drop_first
    try:
        yield
    finally:
        for layer, settings in zip(layers, before, strict=True):
            layer.is_distilling, layer.is_sparse, layer.drop_first = settings
            layer.loss = None


def gate_loss(model: nn.Module) -> Float[Tensor, ""]:
    """The sum of the gates' losses of the last call, see `distilling`; in nats.

    Raises:
        ValueError: the model has no gated layers, or one of them was not called while it was distilling.
    """
    losses = {name: layer.loss for name, layer in block_sparsities(model).items()}
    missing = [name for name, loss in losses.items() if loss is None]
    if missing:
        raise ValueError(f"the gate of {missing[0]!r} has no loss: call the model under distilling() first")
    return torch.stack([loss for loss in losses.values() if loss is not None]).sum()
