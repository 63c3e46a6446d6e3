"""Attention in Triton, for GPUs: split-KV decoding with a unified maximum, flat matrix products, and blocks left out.

Triton is imported when a kernel is first needed, or asked for. With ``TRITON_INTERPRET=1``, set before that, Triton's
interpreter runs the kernels on the CPU, slowly; tests do that.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from postern.attention.unified_softmax import SAFE_EXPONENT
from postern.errors import Unavailable

# Asked once, at import: torch.compile cannot look through the search for a package.
IS_AVAILABLE = importlib.util.find_spec("triton") is not None
_FORMATS = (torch.float32, torch.bfloat16, torch.float16)


def require(x: Tensor) -> None:
    """Check that the kernels can run on such a tensor.

    Raises:
        Unavailable: Triton is not installed, or the tensor is on the CPU and the interpreter is off.
        ValueError: a dtype that the kernels do not take.
    """
    if not IS_AVAILABLE:
        raise Unavailable("Triton is not installed: pip install triton, or leave the choice to backend='auto'")
    if x.dtype not in _FORMATS:
        raise ValueError(f"the Triton kernels take float32, bfloat16 and float16, got {x.dtype}")
    if x.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise Unavailable(f"Triton runs on a GPU, got tensors on {x.device}; TRITON_INTERPRET=1 runs it anywhere")


def attend(
    query: Float[Tensor, "batch heads head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    mask: Bool[Tensor, "batch heads keys"] | None,
    num_splits: int,
    *,
    scale: float,
    phi: float | None,
    low: float = -math.inf,
    high: float = math.inf,
) -> tuple[Float[Tensor, "batch heads value_dim"], Bool[Tensor, "batch heads"]]:
    """Attend in chunks; return the output in the dtype of the values, and which rows were computed again.

    Three kernels follow each other and the host waits for none: one over chunks, one that sums them, and one that
    computes again the rows whose flag is up and leaves the others at once.

    Args:
        query: not scaled, in the dtype of the keys.
        key: keys.
        value: values.
        mask: true where a key may be attended to.
        num_splits: number of chunks.
        scale: of the logits.
        phi: the unified maximum; None for the synchronised form.
        low: exclusive bound of ``logit - phi``; infinite bounds are not looked at.
        high: likewise.
    """
    kernels = _kernels()
    batch, heads, head_dim = query.shape
    kv_heads, keys, value_dim = key.shape[1], key.shape[2], value.shape[3]
    query = query.contiguous()
    numerators = query.new_empty(batch, heads, num_splits, value_dim, dtype=torch.float32)
    denominators, origins = query.new_empty(2, batch, heads, num_splits, dtype=torch.float32)
    flags = query.new_empty(batch, heads, num_splits, dtype=torch.int32)
    out = value.new_empty(batch, heads, value_dim)
    make = query.new_zeros if phi is None else query.new_empty
    recomputed = make((batch, heads), dtype=torch.bool)
    mask_bytes = None if mask is None else mask.view(torch.uint8)
    mask_strides = (0, 0, 0) if mask is None else mask.stride()
    groups = heads // kv_heads
    sizes: dict[str, Any] = {
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "HEAD_BLOCK": max(16, _power_of_two(head_dim)),
        "VALUE_BLOCK": max(16, _power_of_two(value_dim)),
        "HAS_MASK": mask is not None,
    }
    arguments = (*key.stride(), *value.stride(), *mask_strides, scale)
    is_checked = math.isfinite(low) or math.isfinite(high)
    limits = (0.0 if phi is None else phi, max(low, -3e38), min(high, 3e38))
    kernels["chunk"][batch * kv_heads, num_splits](
        query,
        key,
        value,
        query if mask_bytes is None else mask_bytes,
        numerators,
        denominators,
        origins,
        flags,
        keys,
        kv_heads,
        num_splits,
        *arguments,
        *limits,
        GROUPS=groups,
        # A tensor core takes 16 rows; a single row is multiplied and summed by the ordinary ones.
        GROUP_BLOCK=1 if groups == 1 else max(16, _power_of_two(groups)),
        BLOCK=32 if groups > 1 and key.dtype == torch.float32 else 64,
        # Weights stay in 32 bits: those of the unified form may exceed what float16 holds.
        PRECISION="ieee" if key.dtype == torch.float32 else "tf32",
        IS_UNIFIED=phi is not None,
        IS_CHECKED=is_checked,
        **sizes,
    )
    kernels["combine"][batch * heads,](
        numerators,
        denominators,
        origins,
        flags,
        out,
        recomputed.view(torch.uint8),
        num_splits,
        math.exp(-SAFE_EXPONENT),
        math.exp(SAFE_EXPONENT),
        IS_UNIFIED=phi is not None,
        VALUE_DIM=value_dim,
        VALUE_BLOCK=sizes["VALUE_BLOCK"],
        SPLIT_BLOCK=min(32, _power_of_two(num_splits)),
    )
    if phi is not None:
        kernels["repair"][batch * heads,](
            query,
            key,
            value,
            query if mask_bytes is None else mask_bytes,
            out,
            recomputed.view(torch.uint8),
            keys,
            heads,
            groups,
            *arguments,
            BLOCK=64,
            **sizes,
        )
    return out, recomputed


def multiply(
    x: Float[Tensor, "rows inputs"], weight: Float[Tensor, "outputs inputs"], bias: Float[Tensor, " outputs"] | None
) -> Float[Tensor, "rows outputs"]:
    """``x W^T + bias``, for few rows, which are filled up to 8 and not to the 64 of a square tile.

    The weights are the operand that a tensor core takes 16 rows of, and x the one that it takes 8 columns of. A program
    has some outputs and goes over the inputs in order, so that nothing is added by two. There are two programs for each
    of the GPU's processors, where there are outputs for so many, and each has several tiles of the weights on their
    way: few rows wait for nothing but the weights.

    Args:
        x: inputs.
        weight: as of `torch.nn.Linear`.
        bias: added.
    """
    rows, inputs = x.shape
    outputs = weight.shape[0]
    out = x.new_empty(rows, outputs)
    processors = 108
    if x.device.type == "cuda":
        processors = torch.cuda.get_device_properties(x.device).multi_processor_count
    block = next((size for size in (128, 64, 32) if outputs >= 2 * size * processors), 16)
    row_block = min(64, max(8, _power_of_two(rows)))
    input_block = (256 if block == 16 and row_block <= 16 else 128) * 2 // x.element_size()
    _kernels()["flat"][-(-outputs // block), -(-rows // 64)](
        x,
        weight,
        x if bias is None else bias,
        out,
        rows,
        outputs,
        inputs,
        *x.stride(),
        *weight.stride(),
        HAS_BIAS=bias is not None,
        ROW_BLOCK=row_block,
        OUTPUT_BLOCK=block,
        INPUT_BLOCK=input_block,
        num_stages=5 if row_block <= 16 else 3,
    )
    return out


def attend_to_blocks(
    query: Float[Tensor, "batch heads time head_dim"],
    key: Float[Tensor, "batch kv_heads time head_dim"],
    value: Float[Tensor, "batch kv_heads time value_dim"],
    blocks: Bool[Tensor, "batch heads blocks blocks"],
    block: int,
    scale: float,
) -> Float[Tensor, "batch heads time value_dim"]:
    """Causal attention of each block of queries to the blocks of keys that it keeps; without gradients.

    Args:
        query: in the dtype of the values.
        key: likewise.
        value: values.
        blocks: true where a block of keys is kept.
        block: tokens of a block; see `takes_blocks`.
        scale: of the logits.
    """
    query, key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value))
    batch, heads, time, head_dim = query.shape
    value_dim, n = value.shape[3], blocks.shape[-1]
    earlier = (blocks & torch.ones(n, n, dtype=torch.bool, device=blocks.device).tril(-1)).flatten()
    counts = earlier.view(-1, n).sum(-1)
    out = value.new_empty(batch, heads, time, value_dim)
    _kernels()["block_sparse"][n, batch * heads](
        query,
        key,
        value,
        out,
        torch.cat([counts.new_zeros(1), counts.cumsum(0)]),
        earlier.nonzero()[:, 0] % n,
        blocks.diagonal(dim1=2, dim2=3).contiguous().view(torch.uint8),
        time,
        n,
        heads,
        heads // key.shape[1],
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        scale,
        HEAD_DIM=head_dim,
        VALUE_DIM=value_dim,
        HEAD_BLOCK=max(16, _power_of_two(head_dim)),
        VALUE_BLOCK=max(16, _power_of_two(value_dim)),
        BLOCK=block,
        PRECISION="ieee",
        num_warps=4 if block <= 64 else 8,
        num_stages=3 if value.element_size() == 2 else 2,
    )
    return out


def takes_blocks(value: Tensor, head_dim: int, block: int) -> bool:
    """Whether `attend_to_blocks` takes such values, queries of so many features, and blocks of so many tokens.

    Args:
        value: values.
        head_dim: features of a query.
        block: tokens of a block: a power of two.
    """
    sizes = 16 <= block <= 128 and block & (block - 1) == 0 and max(head_dim, value.shape[3]) <= 256
    return IS_AVAILABLE and sizes and value.dtype in _FORMATS


def _power_of_two(size: int) -> int:
    """The smallest that is no smaller."""
    return 1 << max(0, size - 1).bit_length()


@functools.cache
def _kernels() -> dict[str, Any]:
    """The kernels, compiled by Triton when they are first launched."""
    from postern.attention import _triton_programs

    return {
        "chunk": _triton_programs.chunk,
        "combine": _triton_programs.combine,
        "repair": _triton_programs.repair,
        "flat": _triton_programs.flat,
        "block_sparse": _triton_programs.block_sparse,
    }
