"""Two-pass softmax: sum the exponentials as numbers that cannot overflow, so no pass is needed to find the maximum.

Softmax over a long row is limited by memory, not by arithmetic. The first pass sums pairs (m, n) that stand for
``m 2^n``; the second takes each exponential again and divides. That is two reads and a write of the row, where the
textbook form needs three or more reads (`three_pass_softmax`) at equal safety.

Paper: "The Two-Pass Softmax Algorithm" (arXiv 2001.04438). Differences from it and from its code:
gradients, log-softmax, formats other than float32, several threads in one row, infinities and NaN as in torch, denormal
probabilities kept (the code's AVX2 kernels flush them); n is rounded by one fused multiply-add, which keeps the
polynomial in its interval up to ``|x| = 1.45e6``, beyond which a row falls back to subtracting its maximum; the second
pass goes backwards, so that what the caches still hold of the row is read from there.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from postern.softmax import _operators, _rows

TrafficVariant = Literal["two_pass", "three_pass_recompute", "three_pass_reload", "online"]

# Below so many elements torch.softmax is called at once, and below many more if it vectorises.
_FEW = 1 << 13
_MANY = 1 << 16
_NARROW = 16  # columns

# What torch.softmax calls; a microsecond is too short for looking things up. It keeps the dtype, under autocast too.
_torch_softmax = torch._softmax


def two_pass_softmax(
    logits: Float[Tensor, "*shape"],
    dim: int = -1,
    *,
    block: int = 4096,
    backend: _rows.Backend = "auto",
    out: Float[Tensor, "*shape"] | None = None,
) -> Float[Tensor, "*shape"]:
    """Return the softmax ``exp(x_i) / sum_k exp(x_k)`` without overflow, in two passes over each row.

    ``(M, E) = sum_k ExtExp(x_k)``, then ``y_i = m_i / M * 2^(n_i - E)`` with ``(m_i, n_i) = ExtExp(x_i)``.

    Differentiable any number of times, and one operator to ``torch.compile``. The result does not depend on the number
    of threads, which is torch's (``torch.set_num_threads``). Under ``torch.func.grad`` and its kin only "auto" works.

    Args:
        logits: float32, float64, bfloat16 or float16, of any shape and layout.
        dim: the dimension that sums to one.
        block: elements that share a rescaling in the "torch" backend; the kernels' blocks are a few vectors.
        backend: "native" for the compiled two-pass kernels, "torch" for plain tensor operations, "auto" for whatever
            is fastest: ``torch.softmax`` for small tensors and where there are no kernels, the kernels for large ones.
        out: where to write; it may be the logits themselves.

    Returns:
        Probabilities in the logits' shape and dtype. Rows that hold NaN or plus infinity, or minus infinity alone,
        are NaN, as in torch.

    Raises:
        ValueError: an integer tensor, a dimension that is not there, an unknown backend, a block below 1, an ``out``
            of another shape, dtype or device, or one whose inputs require gradients.
        Unavailable: the native backend was asked for and is not installed.

    Source: arXiv 2001.04438, algorithm 3.
    """
    if backend == "auto":
        algorithm = None if logits.numel() < _FEW else _fastest(logits, dim, False)
        if algorithm is None:
            try:
                if out is None:
                    return _torch_softmax(logits, dim, False)
                if out.shape == logits.shape:
                    return _torch_softmax(logits, dim, False, out=out)
            except (IndexError, RuntimeError):
                # Only now, since torch takes less than a microsecond for a small tensor.
                _rows.check(logits, dim, backend, block, out)
                raise
    else:
        algorithm = "two_pass"
    _rows.check(logits, dim, backend, block, out)
    assert algorithm is not None, "only an out that the check refuses is left to torch and not taken"
    return _rows.run(logits, dim, algorithm, False, backend, block, out)


def two_pass_log_softmax(
    logits: Float[Tensor, "*shape"],
    dim: int = -1,
    *,
    block: int = 4096,
    backend: _rows.Backend = "auto",
    out: Float[Tensor, "*shape"] | None = None,
) -> Float[Tensor, "*shape"]:
    """Return the log-softmax ``x_i - (ln M + E ln 2)`` with ``(M, E) = sum_k ExtExp(x_k)``, in two passes.

    The second pass takes no exponentials. See `two_pass_softmax` for the arguments and for what it raises.

    Args:
        logits: float32, float64, bfloat16 or float16, of any shape and layout.
        dim: the dimension whose probabilities sum to one.
        block: elements that share a rescaling in the "torch" backend.
        backend: "native", "torch", or "auto" for whatever is fastest, ``torch.log_softmax`` included.
        out: where to write; it may be the logits themselves.

    Returns:
        Logarithms of probabilities in the logits' shape and dtype.

    Raises:
        ValueError: as `two_pass_softmax`.
        Unavailable: the native backend was asked for and is not installed.
    """
    _rows.check(logits, dim, backend, block, out)
    algorithm = _fastest(logits, dim, True) if backend == "auto" else "two_pass"
    if algorithm is None:
        return torch.log_softmax(logits, dim) if out is None else torch.log_softmax(logits, dim, out=out)
    return _rows.run(logits, dim, algorithm, True, backend, block, out)


class TwoPassSoftmax(nn.Module):
    """`two_pass_softmax` as a layer, in the place of ``torch.nn.Softmax``.

    Args:
        dim: the dimension that sums to one.
        backend: "auto", "torch" or "native".

    Raises:
        ValueError: an unknown backend.
    """

    def __init__(self, dim: int = -1, backend: _rows.Backend = "auto") -> None:
        super().__init__()
        if backend not in _rows.BACKENDS:
            raise ValueError(f"backend is one of {', '.join(_rows.BACKENDS)}; got {backend!r}")
        self.dim = dim
        self.backend = backend

    def forward(self, logits: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return the probabilities, in the logits' shape and dtype."""
        return two_pass_softmax(logits, self.dim, backend=self.backend)

    def extra_repr(self) -> str:
        """Return the arguments, for the layer's description."""
        return f"dim={self.dim}, backend={self.backend!r}"


def softmax_traffic(n: int, variant: TrafficVariant, *, element_bytes: int = 4, streams: bool = True) -> int:
    """Return the bytes that a softmax of one row moves between processor and memory, if no cache holds the row.

    Reads and writes of the row: two-pass and online ``2 + 1``, three-pass recomputing ``3 + 1``, reloading ``3 + 2``.

    Args:
        n: elements of the row.
        variant: "two_pass", "three_pass_recompute", "three_pass_reload" or "online".
        element_bytes: bytes of an element.
        streams: whether stores bypass the caches. If not, a line is read before it is overwritten, one read more for
            each pass that writes what it has not read.

    Returns:
        Bytes.

    Raises:
        ValueError: a negative length, elements without bytes, or an unknown variant.
    """
    if variant not in get_args(TrafficVariant):
        raise ValueError(f"variant is one of {', '.join(get_args(TrafficVariant))}; got {variant!r}")
    if n < 0 or element_bytes < 1:
        raise ValueError(f"a row has 0 or more elements of 1 or more bytes; got n={n}, element_bytes={element_bytes}")
    sweeps = {"two_pass": 3, "online": 3, "three_pass_recompute": 4, "three_pass_reload": 5}[variant]
    return (sweeps + (not streams)) * n * element_bytes


def _num_threads() -> int:
    return torch.get_num_threads()


# As torch.compiler.assume_constant_result does, which takes a second to import.
_num_threads._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _fastest(logits: Tensor, dim: int, is_log: bool) -> str | None:
    """The algorithm that "auto" runs, or None for torch's own softmax.

    Measured on a Zen 4 server processor (two cores, 1 MB second-level cache each, 32 MB third-level cache) with
    torch 2.13 in one and in two threads:

    - torch's kernel is limited by arithmetic even out of cache, and leaves a row to one thread. It is at its worst
      below 16 columns, where it does not vectorise.
    - An operator of ours costs about 7 microseconds more than one of torch's, threads that meet cost a few more, and
      gradients through Python about 60: each thread of torch's must have more work than that.
    - Rows that fit into the second-level cache are read from memory once by any kernel. The blocked one takes each
      exponential once as well, and writes past the caches what does not fit into them.
    - With shorter rows, and with longer ones while logits and result fill less than half of the last cache, which
      others use too, taking each exponential once matters most, so the reloading three-pass kernel wins. Beyond, rows
      that leave the second-level cache need the fewest sweeps, which the two-pass kernel has.
    - In 16-bit formats a kept exponential would be rounded twice; the two-pass kernel is left, and wins on long rows.
    - Over another dimension than the last, bringing it last would cost two more sweeps.
    """
    numel = logits.numel()
    if numel < _FEW:
        return None
    columns = logits.shape[-1]
    least = _FEW if columns <= _NARROW and not is_log else _MANY
    work = numel // min(_num_threads(), numel // columns)  # of one of torch's threads
    if work < least:
        return None
    if not _rows.IS_FAST or logits.device.type != "cpu" or dim not in (-1, logits.dim() - 1):
        return None
    if logits.requires_grad and torch.is_grad_enabled() and work < 8 * least:
        return None
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return None  # torch.func cannot take gradients through operators that are registered from Python
    element_bytes = logits.element_size()
    if element_bytes == 2:
        return "two_pass" if columns >= 4096 and work >= 1 << 19 else None
    if is_log:
        return "two_pass" if columns >= 512 else None
    row_bytes = columns * element_bytes
    if _operators.STREAMING_ROW_BYTES <= row_bytes <= _operators.BLOCKED_ROW_BYTES and columns < 1 << 16:
        return "blocked"
    if row_bytes > _operators.BLOCKED_ROW_BYTES and numel * element_bytes > _operators.STREAMING_BYTES // 2:
        return "two_pass"
    return "three_pass_reload"
