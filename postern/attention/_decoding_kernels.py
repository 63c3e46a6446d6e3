"""The compiled kernels of decoding, for the CPU; see ``decode_attention.cpp`` and ``flat_linear.cpp``."""

from __future__ import annotations

import ctypes
import functools
import math
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from postern import _native

# The codes of the C interface.
FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Columns that lie side by side in packed weights; see ``decoding.h``.
PANEL = 32

_Layout, _Limits = ctypes.c_int64 * 16, ctypes.c_double * 5

# Asked once, at import: torch.compile cannot look through the loading of a library.
STATUS = _native.status()
IS_FAST = STATUS.instruction_set in ("avx2", "avx512")
_native.share_threads()  # torch's, which has been imported by now, whoever loaded the kernels


def can_run(*tensors: Tensor) -> bool:
    """Whether the kernels take these: on the CPU, all of one format that is not float64."""
    dtype = tensors[0].dtype
    return dtype in FORMATS and all(x.dtype == dtype and x.device.type == "cpu" for x in tensors)


def attend(
    query: Float[Tensor, "batch heads head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    mask: Bool[Tensor, "batch heads keys"] | None,
    num_splits: int,
    *,
    phi: float | None,
    low: float = -math.inf,
    high: float = math.inf,
    least_total: float = 0.0,
    greatest_total: float = math.inf,
) -> tuple[Float[Tensor, "batch heads value_dim"], Bool[Tensor, "batch heads"]]:
    """Attend in chunks; return the output in float32, and which rows were computed again.

    Args:
        query: scaled, in float32.
        key: keys, of any strides but the last.
        value: values, of the same format.
        mask: true where a key may be attended to; may be expanded.
        num_splits: number of chunks.
        phi: the unified maximum; None for the synchronised form.
        low: exclusive bound of ``logit - phi``; infinite bounds are not looked at.
        high: likewise.
        least_total: bounds of the denominator within which a row is safe.
        greatest_total: likewise.
    """
    batch, heads, head_dim = query.shape
    kv_heads, keys, value_dim = key.shape[1], key.shape[2], value.shape[3]
    query = query.contiguous()
    key, value = (x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous() for x in (key, value))
    out = query.new_empty(batch, heads, value_dim)
    recomputed = torch.empty(batch, heads, dtype=torch.bool)
    mask_strides = (0, 0, 0) if mask is None else mask.stride()
    sizes = (batch, kv_heads, heads // kv_heads, keys, head_dim, value_dim, num_splits)
    layout = (*sizes, *key.stride()[:3], *value.stride()[:3], *mask_strides)
    failed = _functions()[0](
        int(phi is not None),
        FORMATS[key.dtype],
        query.data_ptr(),
        key.data_ptr(),
        value.data_ptr(),
        None if mask is None else mask.data_ptr(),
        out.data_ptr(),
        recomputed.data_ptr(),
        _Layout(*layout),
        _Limits(0.0 if phi is None else phi, low, high, least_total, greatest_total),
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(f"no memory for the partial sums of {batch * heads} rows in {num_splits} chunks")
    return out, recomputed


def multiply(
    x: Float[Tensor, "rows inputs"],
    packed: Float[Tensor, "panels inputs 32"],
    out_features: int,
    bias: Float[Tensor, " outputs"] | None,
) -> Float[Tensor, "rows outputs"]:
    """``x W^T + bias`` in float32, for weights in panels.

    Args:
        x: in float32.
        packed: see `postern.attention.pack_weight`.
        out_features: rows of the weights.
        bias: added; in float32.
    """
    x, packed = x.contiguous(), packed.contiguous()
    bias = None if bias is None else bias.contiguous()
    out = x.new_empty(x.shape[0], out_features)
    failed = _functions()[1](
        FORMATS[packed.dtype],
        x.data_ptr(),
        packed.data_ptr(),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        x.shape[0],
        out_features,
        x.shape[1],
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(f"no memory for {x.shape[0]} rows of {x.shape[1]} inputs")
    return out


@functools.cache
def _functions() -> tuple[Any, Any]:
    library = _native.library()
    number, pointer, size = ctypes.c_int, ctypes.c_void_p, ctypes.c_int64
    attention, product = library.postern_decode_attention, library.postern_flat_linear
    attention.argtypes = [number, number, *[pointer] * 6, ctypes.POINTER(size), ctypes.POINTER(ctypes.c_double), number]
    product.argtypes = [number, *[pointer] * 4, size, size, size, number]
    return attention, product
