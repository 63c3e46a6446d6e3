"""Causal attention to some blocks of keys: gathered on the CPU, a Triton kernel on a GPU.

Paper: "SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs", arXiv 2410.13276. In Triton each block of
queries goes through the list of the blocks of keys that it keeps. Elsewhere it gathers them, and all blocks of queries
that keep equally many go through PyTorch's fused kernel together. Time and memory follow the number of blocks kept.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from postern.attention import _triton_kernels
from postern.attention.attn_gate import causal_blocks
from postern.attention.self_attention import attend
from postern.precision import without_autocast

Implementation = Literal["auto", "gather", "triton", "flex", "dense"]

# Gathered keys and values of one call of the fused kernel; on the CPU by thread: more leave the second-level cache,
# fewer are not worth a call.
_GATHERED_BYTES = 1 << 21
_GATHERED_BYTES_ON_GPU = 1 << 28


def block_sparse_attention(
    query: Float[Tensor, "batch heads time head_dim"],
    key: Float[Tensor, "batch kv_heads time head_dim"],
    value: Float[Tensor, "batch kv_heads time value_dim"],
    blocks: Bool[Tensor, "batch heads blocks blocks"],
    block: int,
    *,
    scale: float | None = None,
    implementation: Implementation = "auto",
) -> Float[Tensor, "batch heads time value_dim"]:
    """``softmax(scale * Q K^T) V`` over earlier tokens, and those alone whose block is kept.

    Gradients flow to queries, keys and values; they cannot be differentiated again, but for "dense".

    Args:
        query: queries.
        key: keys; several query heads in a row may share one head of keys and values.
        value: values.
        blocks: true where a block of queries keeps a block of keys; later blocks do not count. Queries that keep
            nothing get zeros.
        block: tokens of a block; the last may be shorter.
        scale: by default ``1 / sqrt(head_dim)``.
        implementation: "gather"; "triton", a kernel for GPUs, whose gradients are those of "gather", for blocks of 16,
            32, 64 or 128 tokens, heads of at most 256 features, and at most 32 bits; "flex", which is
            `torch.nn.attention.flex_attention`, without gradients, compiled when first called on a GPU and slow there
            once lengths change, and on the CPU uncompiled and saving nothing; "dense", which masks ordinary attention
            and saves nothing either; "auto" is "triton" on a GPU, where it can be, else "gather".

    Raises:
        ValueError: shapes that do not fit, blocks that are not boolean, an unknown implementation, or "triton" with
            tensors that it does not take.
        Unavailable: "triton" without Triton, or on the CPU.
    """
    _check(query, key, value, blocks, block)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if implementation == "auto":
        fits = query.device.type == "cuda" and _triton_kernels.takes_blocks(value, query.shape[3], block)
        implementation = "triton" if fits else "gather"
    if implementation == "triton":
        _triton_kernels.require(value)
        if not _triton_kernels.takes_blocks(value, query.shape[3], block):
            raise ValueError(
                "'triton' takes blocks of 16, 32, 64 or 128 tokens and heads of at most 256 features, got blocks of "
                f"{block} and heads of {query.shape[3]} and {value.shape[3]}"
            )
    if implementation in ("gather", "triton"):
        by_triton = implementation == "triton"
        output: Tensor = _operator(query.to(value.dtype), key.to(value.dtype), value, blocks, block, scale, by_triton)
        return output
    if implementation == "flex":
        return _flex_attention(query.to(value.dtype), key.to(value.dtype), value, blocks, block, scale)
    if implementation == "dense":
        time = query.shape[2]
        kept = blocks.repeat_interleave(block, 2).repeat_interleave(block, 3)[:, :, :time, :time]
        return attend(query, key, value, kept, is_causal=True, scale=scale)
    raise ValueError(f"implementation is 'auto', 'gather', 'triton', 'flex' or 'dense', got {implementation!r}")


def _check(query: Tensor, key: Tensor, value: Tensor, blocks: Tensor, block: int) -> None:
    batch, heads, time, head_dim = query.shape
    kv_heads = key.shape[1]
    if block < 1 or time < 1:
        raise ValueError(f"blocks have at least one token, got blocks of {block} and {time} tokens")
    if key.shape != (batch, kv_heads, time, head_dim) or value.shape[:3] != (batch, kv_heads, time) or heads % kv_heads:
        raise ValueError(
            "there are as many keys and values as queries, in heads that query heads share evenly; got "
            f"{list(query.shape)}, {list(key.shape)} and {list(value.shape)}"
        )
    n = -(-time // block)
    if blocks.dtype != torch.bool or blocks.shape != (batch, heads, n, n):
        raise ValueError(
            f"{time} tokens in blocks of {block} need boolean blocks [{batch}, {heads}, {n}, {n}], "
            f"got {blocks.dtype} {list(blocks.shape)}"
        )


# Gathered blocks -----------------------------------------------------------------------------------------------------


def _as_blocks(x: Tensor, block: int) -> Tensor:
    """All blocks of all heads, ``[batch * heads * blocks, block, dim]``; the last of a sequence is filled up with 0."""
    rest = -x.shape[2] % block
    x = F.pad(x, (0, 0, 0, rest)) if rest else x
    return x.reshape(-1, block, x.shape[3])


def _take(x: Tensor, columns: Tensor) -> Tensor:
    return x.flatten(1).index_select(0, columns.flatten())


def _order_within_blocks(like: Tensor, blocks: Tensor, block: int) -> Tensor:
    """What is added to logits whose last ``block`` keys are the queries' own block: minus infinity for later keys.

    The filled-up keys of a ragged last block are later than its queries.
    """
    most = max(1, int(blocks.sum(-1).max())) if blocks.numel() else 1
    order = like.new_zeros(block, most * block)
    later = torch.ones(block, block, dtype=torch.bool, device=like.device).triu(1)
    order[:, order.shape[1] - block :].masked_fill_(later, -torch.inf)
    return order


def _rows_by_count(blocks: Tensor, kv_heads: int, block_bytes: int) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """Rows of blocks that keep equally many, a few at a time.

    Yields:
        The rows among ``[batch * heads * blocks]``; the blocks that each keeps among ``[batch * kv_heads * blocks]``,
        ascending; and whether the last of them is the row's own.
    """
    _, heads, n, _ = blocks.shape
    blocks = blocks & causal_blocks(n, blocks.device)
    counts = blocks.sum(-1).flatten()
    row, column = blocks.flatten(0, 2).nonzero(as_tuple=True)
    head = row // n
    head = head // heads * kv_heads + head % heads // (heads // kv_heads)
    column = head * n + column
    first = counts.cumsum(0) - counts
    kinds = 2 * counts + blocks.diagonal(dim1=2, dim2=3).flatten()
    kinds, order = kinds.sort(stable=True)
    kinds, sizes = torch.unique_consecutive(kinds, return_counts=True)
    available = _GATHERED_BYTES * torch.get_num_threads() if blocks.device.type == "cpu" else _GATHERED_BYTES_ON_GPU
    for kind, rows in zip(kinds.tolist(), torch.split(order, sizes.tolist()), strict=True):
        count, has_own = divmod(kind, 2)
        if count:
            steps = torch.arange(count, device=blocks.device)
            for part in torch.split(rows, max(1, available // (count * block_bytes))):
                yield part, column[first[part, None] + steps], bool(has_own)


def _as_they_are(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compute in the dtypes of the tensors: the operators are called below autocast's level, where it still acts."""

    @functools.wraps(function)
    def wrapped(*arguments: Any) -> Any:
        with without_autocast(arguments[0].device):
            return function(*arguments)

    return wrapped


def _attend(
    query: Tensor, key: Tensor, value: Tensor, blocks: Tensor, block: int, scale: float, by_triton: bool
) -> Tensor:
    if by_triton:
        return _triton_kernels.attend_to_blocks(query, key, value, blocks, block, scale)
    batch, heads, time, _ = query.shape
    q, k, v = (_as_blocks(x, block) for x in (query, key, value))
    output = v.new_zeros(len(q), block, v.shape[2])
    order = _order_within_blocks(query, blocks, block)
    for rows, columns, has_own in _rows_by_count(blocks, key.shape[1], k[0].nbytes + v[0].nbytes):
        tokens = columns.shape[1] * block
        # what is gathered gets no name: it is free before the next turn, which takes the same memory, mapped and warm
        output[rows] = F.scaled_dot_product_attention(
            q[rows].unsqueeze(1),
            _take(k, columns).view(len(rows), 1, tokens, -1),
            _take(v, columns).view(len(rows), 1, tokens, -1),
            # at an address that every kernel takes
            attn_mask=order[:, -tokens:].contiguous() if has_own else None,
            scale=scale,
        ).squeeze(1)
    return output.view(batch, heads, -1, v.shape[2])[:, :, :time].contiguous()


def _gather_and_differentiate(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, blocks: Tensor, block: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(query.dtype, torch.float32)
    q, k, v, g = (_as_blocks(x, block).to(dtype) for x in (query, key, value, grad))
    grads = [torch.zeros_like(x) for x in (q, k, v)]
    order = _order_within_blocks(q, blocks, block)
    for rows, columns, has_own in _rows_by_count(blocks, key.shape[1], 4 * (k[0].nbytes + v[0].nbytes)):
        tokens = columns.shape[1] * block
        of_query, of_output = q[rows], g[rows]
        keys, values = (_take(x, columns).view(len(rows), tokens, -1) for x in (k, v))
        logits = of_query @ keys.transpose(1, 2) * scale
        weights = (logits + order[:, -tokens:] if has_own else logits).softmax(-1)
        of_weights = of_output @ values.transpose(1, 2)
        of_logits = weights * (of_weights - (weights * of_weights).sum(-1, keepdim=True)) * scale
        grads[0][rows] = of_logits @ keys
        for total, gathered in (
            (grads[1], of_logits.transpose(1, 2) @ of_query),
            (grads[2], weights.transpose(1, 2) @ of_output),
        ):
            total.index_add_(0, columns.flatten(), gathered.view(-1, block, total.shape[2]))
    of_query, of_key, of_value = (
        total.view(*x.shape[:2], -1, x.shape[3])[:, :, : x.shape[2]].to(x.dtype).contiguous()
        for total, x in zip(grads, (query, key, value), strict=True)
    )
    return of_query, of_key, of_value


_LIBRARY = torch.library.Library("postern", "FRAGMENT")  # type: ignore[no-untyped-call]
_ARGUMENTS = "Tensor query, Tensor key, Tensor value, Tensor blocks, int block, float scale"
_OPERATOR = "block_sparse_attention"
for _schema, _implementation in (
    (f"{_OPERATOR}({_ARGUMENTS}, bool by_triton) -> Tensor", _attend),
    (f"{_OPERATOR}_backward(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)", _gather_and_differentiate),
):
    _LIBRARY.define(_schema)  # type: ignore[no-untyped-call]
    _LIBRARY.impl(_schema.partition("(")[0], _as_they_are(_implementation), "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]

_operator = torch.ops.postern.block_sparse_attention.default
_backward_operator = torch.ops.postern.block_sparse_attention_backward.default


def _output_like(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    return value.new_empty(*query.shape[:3], value.shape[3])


def _gradients_like(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.block, ctx.scale, _ = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_backward_operator(grad, *ctx.saved_tensors, ctx.block, ctx.scale), None, None, None, None)


torch.library.register_fake(f"postern::{_OPERATOR}", _output_like, lib=_LIBRARY)
torch.library.register_fake(f"postern::{_OPERATOR}_backward", _gradients_like, lib=_LIBRARY)
torch.library.register_autograd(f"postern::{_OPERATOR}", _backward, setup_context=_save, lib=_LIBRARY)


# FlexAttention -------------------------------------------------------------------------------------------------------


def _flex_attention(query: Tensor, key: Tensor, value: Tensor, blocks: Tensor, block: int, scale: float) -> Tensor:
    from torch.nn.attention.flex_attention import BlockMask, FlexKernelOptions, flex_attention

    n, time = blocks.shape[-1], query.shape[2]

    def is_kept(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return blocks[batch, head, row // block, column // block] & (row >= column)

    # The kernel takes the same strides for both lists. It reads the listed blocks alone, and asks in those on the
    # diagonal; without it all pairs are asked for.
    counts, columns = _listed(blocks & causal_blocks(n, blocks.device).tril(-1))
    own = torch.zeros_like(columns)
    own[..., 0] = torch.arange(n, device=blocks.device)
    mask = BlockMask.from_kv_blocks(
        blocks.diagonal(dim1=2, dim2=3).to(torch.int32).contiguous(),
        own,
        counts,
        columns,
        BLOCK_SIZE=block,
        mask_mod=_is_earlier if query.device.type == "cuda" else is_kept,
        seq_lengths=(time, time),
        compute_q_blocks=False,  # which only the backward pass needs
    )
    # tiles as large as the blocks, at most: by default they are larger than blocks of 64
    options: FlexKernelOptions = {"BLOCK_M": math.gcd(block, 64), "BLOCK_N": math.gcd(block, 64)}
    is_compiled = query.device.type == "cuda" and not torch.compiler.is_compiling()
    attend_to: Any = _compiled_flex_attention() if is_compiled else flex_attention
    output: Tensor = attend_to(
        query,
        key,
        value,
        block_mask=mask,
        scale=scale,
        enable_gqa=query.shape[1] != key.shape[1],
        kernel_options=options,
    )
    return output


def _is_earlier(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
    return row >= column


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks each row has, and all columns with those in front."""
    order = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), order.to(torch.int32)


@functools.cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Callable[..., Tensor] = torch.compile(flex_attention)
    return compiled
