"""Attention of a single query over a long cache: chunks of the keys in parallel, with or without their own maxima.

Paper: "FlashDecoding++: Faster Large Language Model Inference on GPUs", arXiv 2311.01282. Chunks that subtract their
own maxima must be rescaled to the greatest of them (the synchronised form, FlashDecoding); with one constant for all
there is nothing to rescale (the unified form), and a row that the constant does not fit is computed again with maxima.

It runs on compiled kernels on the CPU, on Triton on a GPU, and on plain tensor operations everywhere.
"""

from __future__ import annotations

import itertools
import math
from typing import Literal, Unpack, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from postern.attention import _decoding_kernels
from postern.attention.self_attention import HeadOptions, SelfAttention, allowed_keys
from postern.attention.unified_softmax import SAFE_EXPONENT, RangeCheck, UnifiedMax, check_range, is_safe_total
from postern.errors import Unavailable
from postern.precision import without_autocast

DecodingBackend = Literal["auto", "torch", "native", "triton"]
_BACKENDS = get_args(DecodingBackend)

# Chunks shorter than this cost more to combine than they gain.
_LEAST_CHUNK = 256


def decode_attention(
    query: Float[Tensor, "batch heads 1 head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    mask: Bool[Tensor, "*mask"] | None = None,
    *,
    scale: float | None = None,
    num_splits: int | None = None,
    unified: UnifiedMax | None = None,
    check: RangeCheck = "safe",
    backend: DecodingBackend = "auto",
) -> Float[Tensor, "batch heads 1 value_dim"]:
    """``softmax(scale * q K^T) V`` for one query a head, over chunks of the keys.

    Args:
        query: the query of the newest token.
        key: keys; several query heads in a row may share one head of keys and values.
        value: values.
        mask: true where a key may be attended to: ``[batch, keys]``, or broadcastable to ``[batch, heads, 1, keys]``.
            A query that may attend to nothing gets zeros.
        scale: by default ``1 / sqrt(head_dim)``.
        num_splits: number of chunks; by default enough to occupy the threads, or the GPU, and no chunk below 256 keys.
        unified: the constant for all chunks, from a calibration; None, or one that is disabled, for the synchronised
            form.
        check: which rows are computed again; see `postern.attention.unified_softmax`.
        backend: "native" for the compiled kernels, "triton", or "torch" for tensor operations; "auto" for the fastest
            that this machine has for these tensors.

    Raises:
        ValueError: more than one query, shapes, dtypes or devices that do not fit together, no keys, a mask of another
            shape or dtype, fewer than one chunk, or an unknown check or backend.
        Unavailable: a backend that was asked for and is not there.
    """
    if unified is not None and not unified.enabled:
        unified = None
    return _decode(query, key, value, mask, scale, num_splits, unified, check, backend)[0]


def unified_decode_attention(
    query: Float[Tensor, "batch heads 1 head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    unified: UnifiedMax,
    mask: Bool[Tensor, "*mask"] | None = None,
    *,
    scale: float | None = None,
    num_splits: int | None = None,
    check: RangeCheck = "safe",
    backend: DecodingBackend = "auto",
) -> tuple[Float[Tensor, "batch heads 1 value_dim"], Bool[Tensor, "batch heads"]]:
    """The unified form of `decode_attention`, and which rows had to be computed again; their share tells of a drift.

    Args:
        query: see `decode_attention`.
        key: see `decode_attention`.
        value: see `decode_attention`.
        unified: the constant; used even where it is disabled.
        mask: see `decode_attention`.
        scale: see `decode_attention`.
        num_splits: see `decode_attention`.
        check: see `decode_attention`.
        backend: see `decode_attention`.

    Returns:
        The output, and true for each row that was computed again. A row that may attend to nothing was not.

    Raises:
        ValueError: see `decode_attention`.
        Unavailable: see `decode_attention`.
    """
    return _decode(query, key, value, mask, scale, num_splits, unified, check, backend)


def _decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float | None,
    num_splits: int | None,
    unified: UnifiedMax | None,
    check: RangeCheck,
    backend: DecodingBackend,
) -> tuple[Tensor, Tensor]:
    _check_shapes(query, key, value, num_splits)
    check_range(check)
    allowed = allowed_keys(1, key.shape[2], mask)
    if allowed is not None:
        try:
            allowed = allowed.expand(query.shape[0], query.shape[1], 1, key.shape[2])[:, :, 0]
        except RuntimeError:
            raise ValueError(
                f"a mask broadcasts to [{query.shape[0]}, {query.shape[1]}, 1, {key.shape[2]}], "
                f"got {list(allowed.shape)}"
            ) from None
    phi = low = high = None
    if unified is not None:
        phi = unified.phi
        low, high = (unified.a, unified.b) if check == "paper" else (-math.inf, math.inf)
    arguments = (
        query[:, :, 0],
        key,
        value,
        allowed,
        query.shape[-1] ** -0.5 if scale is None else scale,
        0 if num_splits is None else num_splits,
        phi,
        low,
        high,
        _choose(backend, query, key, value),
    )
    is_tracked = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    run = _operator if is_tracked or torch.compiler.is_compiling() else _run
    out, recomputed = run(*arguments)
    return out[:, :, None], recomputed


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, num_splits: int | None) -> None:
    def shapes() -> str:
        return f"query {list(query.shape)}, key {list(key.shape)}, value {list(value.shape)}"

    if not query.dim() == key.dim() == value.dim() == 4 or query.shape[2] != 1:
        raise ValueError(f"decoding takes a query [batch, heads, 1, head_dim], and keys and values; got {shapes()}")
    if (
        query.shape[0] != key.shape[0]
        or key.shape[:3] != value.shape[:3]
        or query.shape[3] != key.shape[3]
        or query.shape[1] % max(1, key.shape[1])
        or not key.shape[1]
    ):
        raise ValueError(
            f"keys and values have the query's batch and sizes, and heads that divide its own; got {shapes()}"
        )
    if not key.shape[2]:
        raise ValueError(f"attention needs at least one key, got {shapes()}")
    is_one_dtype = query.dtype == key.dtype == value.dtype and query.is_floating_point()
    if not is_one_dtype or not query.device == key.device == value.device:
        raise ValueError(
            f"query, key and value have one floating-point dtype and one device, got {query.dtype}, {key.dtype}, "
            f"{value.dtype} on {query.device}, {key.device}, {value.device}"
        )
    if num_splits is not None and num_splits < 1:
        raise ValueError(f"num_splits is at least 1, got {num_splits}")


def _choose(backend: DecodingBackend, *tensors: Tensor) -> str:
    """The backend that runs.

    Raises:
        ValueError: an unknown one, or tensors that it does not take.
        Unavailable: it is not there.
    """
    if backend not in _BACKENDS:
        raise ValueError(f"backend is one of {', '.join(_BACKENDS)}; got {backend!r}")
    found = tensors[0]
    if backend == "native":
        if not _decoding_kernels.STATUS.available:
            raise Unavailable(_decoding_kernels.STATUS.reason)
        if not _decoding_kernels.can_run(*tensors):
            raise ValueError(
                "the compiled kernels take float32, bfloat16 and float16 on the CPU; "
                f"got {found.dtype} on {found.device}"
            )
    if backend == "triton":
        from postern.attention import _triton_kernels

        _triton_kernels.require(found)
    if backend != "auto":
        return backend
    if found.device.type == "cpu":
        return "native" if _decoding_kernels.IS_FAST and _decoding_kernels.can_run(*tensors) else "torch"
    if found.device.type == "cuda":
        from postern.attention import _triton_kernels

        return "triton" if _triton_kernels.IS_AVAILABLE and found.dtype != torch.float64 else "torch"
    return "torch"


def _default_splits(query: Tensor, key: Tensor) -> int:
    units = max(1, key.shape[0] * key.shape[1])
    workers = torch.get_num_threads()
    if query.device.type == "cuda":
        workers = 2 * torch.cuda.get_device_properties(query.device).multi_processor_count
    return max(1, min(-(-2 * workers // units), key.shape[2] // _LEAST_CHUNK))


# -- the operator -----------------------------------------------------------------------------------------------------


def _run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    num_splits: int,
    phi: float | None,
    low: float | None,
    high: float | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Attend; ``[batch, heads, value_dim]`` in the dtype of the values, and rows computed again ``[batch, heads]``."""
    splits = min(num_splits or _default_splits(query, key), key.shape[2])
    low, high = -math.inf if low is None else low, math.inf if high is None else high
    if not query.numel() or not value.shape[3]:
        return value.new_zeros(*query.shape[:2], value.shape[3]), query.new_zeros(query.shape[:2], dtype=torch.bool)
    if backend == "triton":
        from postern.attention import _triton_kernels

        return _triton_kernels.attend(query, key, value, mask, splits, scale=scale, phi=phi, low=low, high=high)
    # Autocast leaves these two alone.
    scaled = query.to(torch.promote_types(query.dtype, torch.float32)) * scale
    if backend == "native":
        bound = math.exp(SAFE_EXPONENT)
        limits = {"low": low, "high": high, "least_total": 1 / bound, "greatest_total": bound}
        out, recomputed = _decoding_kernels.attend(scaled, key, value, mask, splits, phi=phi, **limits)
    else:
        with without_autocast(query.device):
            if phi is None:
                out = _synchronised(scaled, key, value, mask, splits)
                recomputed = scaled.new_zeros(scaled.shape[:2], dtype=torch.bool)
            else:
                out, recomputed = _unified(scaled, key, value, mask, splits, phi, low, high)
    return out.to(value.dtype), recomputed


_LIBRARY = torch.library.Library("postern", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define(  # type: ignore[no-untyped-call]
    "split_decoding(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale, int num_splits, float? phi, "
    "float? low, float? high, str backend) -> (Tensor, Tensor)"
)
_LIBRARY.impl("split_decoding", _run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
_operator = torch.ops.postern.split_decoding.default


def _shapes_of_results(query: Tensor, key: Tensor, value: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return value.new_empty(*query.shape[:2], value.shape[3]), query.new_empty(query.shape[:2], dtype=torch.bool)


torch.library.register_fake("postern::split_decoding", _shapes_of_results, lib=_LIBRARY)


def _keep_inputs(ctx: object, inputs: tuple[object, ...], output: object) -> None:
    query, key, value, mask, ctx.scale = inputs[:5]  # type: ignore[attr-defined]
    ctx.save_for_backward(query, key, value, mask)  # type: ignore[attr-defined]


def _derivatives(ctx: object, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    """Those of softmax attention, which both forms compute.

    With ``P = softmax(scale q K^T)`` and ``dP = g V^T``: ``dV = P^T g``, and ``dS = P (dP - sum P dP)`` gives
    ``dq = scale dS K`` and ``dK = scale dS^T q``.
    """
    query, key, value, mask = ctx.saved_tensors  # type: ignore[attr-defined]
    scale = ctx.scale  # type: ignore[attr-defined]
    q, g = (x.unflatten(1, (key.shape[1], -1)) for x in (query, grad))
    logits = scale * (q @ key.mT)
    if mask is not None:
        allowed = mask.unflatten(1, (key.shape[1], -1))
        logits = logits.masked_fill(~allowed, torch.finfo(logits.dtype).min)
    p = torch.softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)
    if mask is not None:
        p = p.masked_fill(~allowed, 0.0)
    dp = (g @ value.mT).to(p.dtype)
    ds = (p * (dp - (p * dp).sum(-1, keepdim=True)) * scale).to(query.dtype)
    in_value = p.to(g.dtype).mT @ g
    return (ds @ key).flatten(1, 2), ds.mT @ q, in_value, *[None] * 7


torch.library.register_autograd("postern::split_decoding", _derivatives, setup_context=_keep_inputs, lib=_LIBRARY)


# -- in tensor operations ---------------------------------------------------------------------------------------------


def _grouped(x: Tensor, heads: int) -> Tensor:
    """``[batch, heads * groups, ...] -> [batch, heads, groups, ...]``."""
    return x.reshape(x.shape[0], heads, -1, x.shape[2])


def _chunks(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, splits: int
) -> list[tuple[Tensor, Tensor, Tensor | None]]:
    """Of each chunk the logits ``[batch, kv_heads, groups, keys]``, the values, and the mask of the logits."""
    heads, keys = key.shape[1], key.shape[2]
    edges = [keys * split // splits for split in range(splits + 1)]
    q = _grouped(query, heads)
    found = []
    for first, last in itertools.pairwise(edges):
        logits = q @ key[:, :, first:last].to(q.dtype).mT
        allowed = None if mask is None else _grouped(mask[:, :, first:last], heads)
        found.append((logits, value[:, :, first:last].to(q.dtype), allowed))
    return found


def _synchronised(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, splits: int) -> Tensor:
    """``m = max_j m_j``, ``l = sum_j e^(m_j - m) l_j``, and the numerators likewise."""
    maxima, numerators, denominators = [], [], []
    for logits, values, allowed in _chunks(query, key, value, mask, splits):
        if allowed is not None:
            # finite, as a row of nothing but minus infinity would be NaN
            logits = logits.masked_fill(~allowed, torch.finfo(logits.dtype).min)
        m = logits.amax(-1, keepdim=True)
        e = torch.exp(logits - m)
        if allowed is not None:
            e = e.masked_fill(~allowed, 0.0)
        maxima.append(m)
        numerators.append(e @ values)
        denominators.append(e.sum(-1, keepdim=True))
    m = torch.stack(maxima)
    factors = torch.exp(m - m.amax(0))
    numerator = (factors * torch.stack(numerators)).sum(0)
    denominator = (factors * torch.stack(denominators)).sum(0)
    return (numerator / torch.where(denominator == 0, 1.0, denominator)).flatten(1, 2)


def _unified(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, splits: int, phi: float, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """``sum_j num_j / sum_j den_j``; rows that leave the range by `_synchronised`."""
    is_safe: Tensor | None = None
    numerator = denominator = query.new_zeros(())
    for logits, values, allowed in _chunks(query, key, value, mask, splits):
        z = logits - phi
        e = torch.exp(z)
        if allowed is not None:
            e = e.masked_fill(~allowed, 0.0)
        if math.isfinite(low) or math.isfinite(high):
            inside = (z > low) & (z < high)
            inside = (inside if allowed is None else inside | ~allowed).all(-1, keepdim=True)
            is_safe = inside if is_safe is None else is_safe & inside
        numerator = numerator + e @ values
        denominator = denominator + e.sum(-1, keepdim=True)
    fits = is_safe_total(denominator) & numerator.isfinite().all(-1, keepdim=True)
    is_safe = fits if is_safe is None else is_safe & fits
    out = (numerator / denominator).flatten(1, 2)
    unsafe = ~is_safe.flatten(1)
    if bool(unsafe.any()):
        batch, head = unsafe.nonzero(as_tuple=True)
        shared = head // (query.shape[1] // key.shape[1])
        rows = None if mask is None else mask[batch, head][:, None]
        out[batch, head] = _synchronised(
            query[batch, head][:, None], key[batch, shared][:, None], value[batch, shared][:, None], rows, splits
        )[:, 0]
        if mask is not None:
            unsafe = unsafe & mask.any(-1)
    return out, unsafe


# -- the layer --------------------------------------------------------------------------------------------------------


class SplitDecodingAttention(SelfAttention):
    """Self-attention with softmax whose steps of a single token run `decode_attention`.

    It has the parameters of `SelfAttention` and gives its results. Longer inputs go through PyTorch's fused kernel, and
    so does training with dropout.

    Args:
        width: features of a token; a multiple of ``num_heads``.
        num_heads: number of heads.
        unified: the constant for all chunks, from `postern.attention.calibrate_unified_max`; it may be set later. None
            for the synchronised form.
        num_splits: see `decode_attention`.
        check: see `decode_attention`.
        options: see `SelfAttention`.

    Raises:
        ValueError: impossible sizes or options, fewer than one chunk, or an unknown check.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        unified: UnifiedMax | None = None,
        num_splits: int | None = None,
        check: RangeCheck = "safe",
        **options: Unpack[HeadOptions],
    ) -> None:
        check_range(check)
        if num_splits is not None and num_splits < 1:
            raise ValueError(f"num_splits is at least 1, got {num_splits}")
        super().__init__(width, num_heads, **options)
        self.unified = unified
        self.num_splits = num_splits
        self.check: RangeCheck = check

    def attend(
        self,
        query: Float[Tensor, "batch heads queries head_dim"],
        key: Float[Tensor, "batch kv_heads keys head_dim"],
        value: Float[Tensor, "batch kv_heads keys head_dim"],
        mask: Bool[Tensor, "*mask"] | None,
    ) -> Float[Tensor, "batch heads queries head_dim"]:
        """Return the heads' outputs."""
        if query.shape[2] != 1 or self.normalise is not None or (self.training and self.dropout):
            return super().attend(query, key, value, mask)
        # Under autocast a normalisation or a rotation may have left them in another dtype.
        query, key = query.to(value.dtype), key.to(value.dtype)
        return decode_attention(
            query, key, value, mask, num_splits=self.num_splits, unified=self.unified, check=self.check
        )

    def extra_repr(self) -> str:
        """Return what the printed module says of its settings."""
        form = "synchronised" if self.unified is None or not self.unified.enabled else f"phi={self.unified.phi:g}"
        return f"{super().extra_repr()}, {form}"
