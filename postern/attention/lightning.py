"""Causal attention without softmax: sums over earlier tokens that fade with distance, in time linear in the length.

Paper: "Scaling TransNormer to 175 Billion Parameters", arXiv 2307.14995. Its own kernel goes over tiles of the matrix
of all pairs ("tiled"); the linear-time form in blocks, which its authors published later, is that of "Lightning
Attention-2", arXiv 2401.04658 ("chunk", "triton").
"""

from __future__ import annotations

import importlib.util
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from postern.attention._lightning_blocks import allows_tf32, chunk_attention, fading, tiled_attention
from postern.attention.self_attention import repeat_heads
from postern.errors import Unavailable
from postern.precision import without_autocast

LightningForm = Literal["chunk", "triton", "tiled", "recurrent", "naive"]
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_TRITON_MAX_DIM = 256


def lightning_attention(
    query: Float[Tensor, "batch heads time key_dim"],
    key: Float[Tensor, "batch kv_heads time key_dim"],
    value: Float[Tensor, "batch kv_heads time value_dim"],
    slopes: Float[Tensor, " heads"] | None = None,
    state: Float[Tensor, "batch heads key_dim value_dim"] | None = None,
    *,
    block: int = 64,
    implementation: LightningForm | None = None,
) -> tuple[Float[Tensor, "batch heads time value_dim"], Float[Tensor, "batch heads key_dim value_dim"]]:
    """``o_t = sum over s <= t of exp(-slope (t - s)) (q_t . k_s) v_s``, in blocks.

    Inside a block it multiplies the matrix of products; what comes from earlier blocks is one matrix a head, the state
    ``S_t = exp(-slope) S_{t-1} + k_t v_t^T``. No power of ``exp(slope)`` occurs that could overflow.

    ===============  ===================  ================================================================
    implementation   time                 what it is
    ===============  ===================  ================================================================
    ``"chunk"``      linear               blocks; the backward pass makes the states again
    ``"triton"``     linear               the same in kernels, for CUDA devices; not in float64
    ``"tiled"``      quadratic            the paper's kernel: tile by tile, never a matrix of all pairs
    ``"recurrent"``  linear, sequential   one token after the other; for single tokens
    ``"naive"``      quadratic            the matrix of all pairs; differentiable twice
    ===============  ===================  ================================================================

    Gradients go to queries, keys, values, state and slopes. All forms but "naive" and "recurrent" are opaque to
    ``torch.compile``, so that a graph does not grow with the time, and can be differentiated once.

    Args:
        query: queries.
        key: keys; several query heads in a row may share one head of keys and values.
        value: values.
        slopes: how fast each head forgets, at least 0; None for heads that do not. See `decay_slopes`.
        state: of the tokens before, from an earlier call.
        block: tokens of a block or tile, at least 1; "triton" chooses its own.
        implementation: by default "recurrent" for a single token; "triton" on a CUDA device that has Triton, in 16 bits
            or where torch may multiply in TF32, with at most 256 features a head; else "chunk".

    Returns:
        The output in the dtype of the values, and the state after the last token, in float32 at least.

    Raises:
        ValueError: a block below 1, no tokens, shapes that do not fit, or an implementation that is not known or not
            for such tensors.
        Unavailable: "triton" without Triton.
    """
    if block < 1:
        raise ValueError(f"a block has at least one token, got {block}")
    _check(query, key, value, slopes, state)
    heads, time = query.shape[1], query.shape[2]
    key, value = repeat_heads(key, heads), repeat_heads(value, heads)
    form = _fastest(query, key, value) if implementation is None else implementation
    dtype = torch.promote_types(value.dtype, torch.float32)
    with without_autocast(query.device):
        slopes = query.new_zeros(heads, dtype=dtype) if slopes is None else slopes.to(query.device, dtype)
        if state is None:
            shape = (*query.shape[:2], query.shape[3], value.shape[3])
            state = query.new_zeros(shape, dtype=dtype)
        if form == "chunk":
            return chunk_attention(query, key, value, slopes, state.to(dtype), min(block, time))
        if form == "triton":
            return _triton(query, key, value, slopes, state.to(dtype))
        q, k, v, state = query.to(dtype), key.to(dtype), value.to(dtype), state.to(dtype)
        if form == "recurrent":
            output, state = _recurrent(q, k, v, slopes, state)
        elif form in ("naive", "tiled"):
            output = _naive(q, k, v, slopes) if form == "naive" else tiled_attention(q, k, v, slopes, min(block, time))
            output, state = _with_state(output, q, k, v, slopes, state)
        else:
            raise ValueError(
                f"implementation is 'chunk', 'triton', 'tiled', 'recurrent' or 'naive', got {implementation!r}"
            )
    return output.to(value.dtype), state


def _check(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor | None, state: Tensor | None) -> None:
    """Check that shapes fit; heads are checked where they are repeated."""
    if any(x.dim() != 4 for x in (query, key, value)) or query.shape[2] < 1:
        raise ValueError(
            "queries, keys and values are [batch, heads, time, dim] with at least one token, got "
            f"{list(query.shape)}, {list(key.shape)} and {list(value.shape)}"
        )
    batch, heads, time, dim = query.shape
    if (
        key.shape[0] != batch
        or key.shape[2:] != (time, dim)
        or value.shape[:3] != key.shape[:3]
        or not all(x.is_floating_point() for x in (query, key, value))
    ):
        raise ValueError(
            f"keys and values must be floating-point and fit queries of {list(query.shape)} in batch, time and "
            f"key_dim, got {key.dtype} {list(key.shape)} and {value.dtype} {list(value.shape)}"
        )
    if slopes is not None and slopes.shape != (heads,):
        raise ValueError(f"slopes are one number a head, [{heads}], got {list(slopes.shape)}")
    if state is not None and state.shape != (batch, heads, dim, value.shape[3]):
        raise ValueError(f"the state must be {[batch, heads, dim, value.shape[3]]}, got {list(state.shape)}")


def _fastest(query: Tensor, key: Tensor, value: Tensor) -> LightningForm:
    if query.shape[2] == 1:
        return "recurrent"
    if query.is_cuda and _HAS_TRITON and _fits_triton(query, key, value):
        # products of float32 that must be exact gain nothing from a kernel
        is_exact = torch.float32 in (query.dtype, key.dtype, value.dtype) and not allows_tf32()
        return "chunk" if is_exact else "triton"
    return "chunk"


def _fits_triton(query: Tensor, key: Tensor, value: Tensor) -> bool:
    dtypes = {query.dtype, key.dtype, value.dtype}
    return dtypes <= set(_TRITON_DTYPES) and max(query.shape[3], value.shape[3]) <= _TRITON_MAX_DIM


def _triton(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    if not _fits_triton(query, key, value):
        raise ValueError(
            f"'triton' takes float32, float16 or bfloat16 and heads of at most {_TRITON_MAX_DIM} features, got "
            f"{query.dtype} {list(query.shape)}, {key.dtype} and {value.dtype} {list(value.shape)}"
        )
    try:
        from postern.attention._lightning_triton import IS_INTERPRETED, triton_attention
    except ImportError as error:
        raise Unavailable(f"'triton' needs the package triton, which CUDA builds of torch bring: {error}") from error
    if not query.is_cuda and not IS_INTERPRETED:
        raise ValueError(f"'triton' needs tensors on a CUDA device, got {query.device}; 'chunk' runs everywhere")
    return triton_attention(query, key, value, slopes, state)


def _recurrent(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """``S_t = exp(-slope) S_{t-1} + k_t v_t^T``, ``o_t = q_t S_t``: the paper's robust inference."""
    decay = torch.exp(-slopes)[:, None, None]
    outputs = []
    for t in range(q.shape[2]):
        token = slice(t, t + 1)
        state = decay * state + k[:, :, token].mT * v[:, :, token]
        outputs.append(q[:, :, token] @ state)
    return torch.cat(outputs, dim=2) if len(outputs) > 1 else outputs[0], state


def _naive(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    """``((Q K^T) * M) V``, with the matrix M of the paper."""
    return (q @ k.mT * fading(slopes, q.shape[2])) @ v


def _with_state(
    output: Tensor, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Add what the tokens before contribute, and let the state go on to the last token."""
    time = q.shape[2]
    steps = torch.arange(time, device=q.device, dtype=q.dtype)
    rise = torch.exp(-slopes[:, None] * (steps + 1))[..., None]
    fall = torch.exp(-slopes[:, None] * (time - 1 - steps))[..., None]
    over_all = torch.exp(-slopes * time)[:, None, None]
    return output + (q * rise) @ state, over_all * state + (k * fall).mT @ v
