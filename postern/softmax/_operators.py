"""Softmax over the last dimension as torch operators, so that autograd, torch.compile and vmap know them.

``postern::softmax`` computes, ``postern::softmax_into`` writes into a tensor that is there, and
``postern::softmax_backward`` is the product with the Jacobian, which can be differentiated again. Each runs the
compiled kernels ("native") or plain tensor operations ("torch"); with "auto" the kernels run forward, and backward
where they are faster than torch's.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from postern import _native
from postern._native import memory
from postern.softmax import _reference

# The codes of the C interface.
_ALGORITHMS = {"two_pass": 0, "three_pass_recompute": 1, "three_pass_reload": 2, "online": 3, "blocked": 4}
FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}

# Stores that bypass the caches save reading what is overwritten, and cost the reader of the result its cache hits.
# They pay where the result would not stay in the last cache anyway, and where rows are long, since a row's first and
# last cache line are written in the ordinary way.
STREAMING_BYTES = _native.cache_bytes("last") // 2
STREAMING_ROW_BYTES = 2048
# The longest row that the blocked kernel takes: the second-level cache holds it and its exponentials.
BLOCKED_ROW_BYTES = 1 << 18

_native.share_threads()  # torch's, which has been imported by now, whoever loaded the kernels

_LIBRARY = torch.library.Library("postern", "FRAGMENT")  # type: ignore[no-untyped-call]


@functools.cache
def _functions() -> tuple[Any, Any]:
    """The library's functions, with the types of their arguments."""
    library = _native.library()
    number, pointer, size = ctypes.c_int, ctypes.c_void_p, ctypes.c_int64
    forward, backward = library.postern_softmax, library.postern_softmax_gradient
    forward.argtypes = [number, number, number, pointer, pointer, size, size, size, number, number]
    backward.argtypes = [number, number, pointer, pointer, pointer, size, size, number, number]
    return forward, backward


def _run_kernel(logits: Tensor, algorithm: str, is_log: bool, out: Tensor) -> None:
    """Write the softmax of each row of logits into out, which is dense."""
    rows, columns = _shape(logits)
    stride = columns
    if not logits.is_contiguous():
        if logits.dim() == 2 and logits.stride(1) == 1 and logits.stride(0) >= columns:
            stride = logits.stride(0)
        else:
            logits = logits.contiguous()
    forward, _ = _functions()
    _check(
        forward(
            _ALGORITHMS[algorithm],
            is_log,
            FORMATS[logits.dtype],
            logits.data_ptr(),
            out.data_ptr(),
            rows,
            columns,
            stride,
            torch.get_num_threads(),
            _streams(out),
        )
    )


def _streams(out: Tensor) -> bool:
    size = out.element_size()
    return out.numel() * size > STREAMING_BYTES and out.shape[-1] * size >= STREAMING_ROW_BYTES


def _shape(x: Tensor) -> tuple[int, int]:
    columns = x.shape[-1]
    return x.numel() // columns, columns


def _check(error: int) -> None:
    if error:
        raise MemoryError("softmax found no memory for its partial sums")


def empty(like: Tensor) -> Tensor:
    """A dense tensor of the same shape, dtype and device, for a kernel to write."""
    return memory.empty(like.shape, like.dtype, like.device)


def _softmax(logits: Tensor, algorithm: str, is_log: bool, backend: str, block: int) -> Tensor:
    if backend == "torch":
        return _reference.softmax(logits, algorithm, is_log, block)
    out = empty(logits)
    if out.numel():
        _run_kernel(logits, algorithm, is_log, out)
    return out


def _softmax_into(logits: Tensor, algorithm: str, is_log: bool, backend: str, block: int, out: Tensor) -> None:
    if out.numel() == 0:
        return
    if backend != "torch" and out.is_contiguous():
        _run_kernel(logits, algorithm, is_log, out)
    else:
        out.copy_(_softmax(logits, algorithm, is_log, backend, block))


def _softmax_backward(grad: Tensor, output: Tensor, is_log: bool, backend: str) -> Tensor:
    if backend == "torch" or grad.dtype != output.dtype or (backend == "auto" and not _pays_backward(output)):
        product = torch._log_softmax_backward_data if is_log else torch._softmax_backward_data
        return product(grad, output, -1, output.dtype).contiguous()
    out = empty(output)
    if out.numel():
        grad, output = grad.contiguous(), output.contiguous()
        rows, columns = _shape(output)
        _, backward = _functions()
        _check(
            backward(
                is_log,
                FORMATS[output.dtype],
                grad.data_ptr(),
                output.data_ptr(),
                out.data_ptr(),
                rows,
                columns,
                torch.get_num_threads(),
                _streams(out),
            )
        )
    return out


def _pays_backward(output: Tensor) -> bool:
    """Whether the kernel beats torch's: in fresh memory, and on long rows that torch leaves to one thread each."""
    rows, columns = _shape(output) if output.numel() else (0, 0)
    row_bytes = columns * output.element_size()
    if rows * row_bytes >= memory.HUGE_PAGES_BYTES:
        return row_bytes >= STREAMING_ROW_BYTES
    return columns >= 1 << 20 and rows < torch.get_num_threads()


def _dense_like(x: Tensor, *others: Any) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


_ARGUMENTS = "str algorithm, bool is_log, str backend, int block"
for _schema, _implementation in (
    (f"softmax(Tensor logits, {_ARGUMENTS}) -> Tensor", _softmax),
    (f"softmax_into(Tensor logits, {_ARGUMENTS}, Tensor(a!) out) -> ()", _softmax_into),
    ("softmax_backward(Tensor grad, Tensor output, bool is_log, str backend) -> Tensor", _softmax_backward),
):
    _LIBRARY.define(_schema)  # type: ignore[no-untyped-call]
    _LIBRARY.impl(_schema.partition("(")[0], _implementation, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]

softmax = torch.ops.postern.softmax.default
softmax_into = torch.ops.postern.softmax_into.default
softmax_backward = torch.ops.postern.softmax_backward.default

torch.library.register_fake("postern::softmax", _dense_like, lib=_LIBRARY)
torch.library.register_fake("postern::softmax_into", lambda *arguments: None, lib=_LIBRARY)
torch.library.register_fake(
    "postern::softmax_backward", lambda grad, output, is_log, backend: _dense_like(output), lib=_LIBRARY
)


def _keep_output(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, _, ctx.is_log, ctx.backend, _ = inputs
    ctx.save_for_backward(output)


def _first_derivative(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (output,) = ctx.saved_tensors
    return softmax_backward(grad, output, ctx.is_log, ctx.backend), None, None, None, None


def _keep_product(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    grad, probabilities, ctx.is_log, ctx.backend = inputs
    ctx.save_for_backward(grad, probabilities)


def _second_derivative(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
    """Derivatives of ``v . softmax_backward(g, y)``, in operations that can be differentiated again.

    Softmax: ``f = sum_i v_i y_i (g_i - s)`` with ``s = sum_k g_k y_k``, whose Jacobian in g is symmetric.
    Its logarithm: ``f = sum_i v_i (g_i - exp(y_i) sum_k g_k)``.
    """
    g, y = ctx.saved_tensors
    if ctx.is_log:
        probabilities = y.exp()
        weighted = v * probabilities
        return v - weighted.sum(-1, keepdim=True), -weighted * g.sum(-1, keepdim=True), None, None
    in_g = softmax_backward(v, y, False, ctx.backend)
    in_y = v * (g - (g * y).sum(-1, keepdim=True)) - g * (v * y).sum(-1, keepdim=True)
    return in_g, in_y, None, None


torch.library.register_autograd("postern::softmax", _first_derivative, setup_context=_keep_output, lib=_LIBRARY)
torch.library.register_autograd(
    "postern::softmax_backward", _second_derivative, setup_context=_keep_product, lib=_LIBRARY
)


def _batched_softmax(info: Any, dims: tuple[Any, ...], logits: Tensor, *arguments: Any) -> tuple[Tensor, int]:
    return softmax(logits.movedim(dims[0], 0), *arguments), 0


def _batched_backward(
    info: Any, dims: tuple[Any, ...], grad: Tensor, output: Tensor, *arguments: Any
) -> tuple[Tensor, int]:
    both = [
        tensor.expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        for tensor, dim in zip((grad, output), dims[:2], strict=True)
    ]
    return softmax_backward(*both, *arguments), 0


torch.library.register_vmap("postern::softmax", _batched_softmax, lib=_LIBRARY)
torch.library.register_vmap("postern::softmax_backward", _batched_backward, lib=_LIBRARY)
