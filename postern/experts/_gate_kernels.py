"""Compiled gates, ``activation(g) * v``, forwards and backwards on the CPU; see ``_native/gates.cpp``."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from postern import _native
from postern.errors import Unavailable
from postern.precision import autocast_dtype

_native.share_threads()  # torch's, which has been imported by now, whoever loaded the kernels

# The codes of the C interface.
_RELU, _SILU, _GELU = 1, 2, 3
_FUNCTIONS = ((F.relu, _RELU), (torch.relu, _RELU), (F.silu, _SILU), (F.gelu, _GELU))
_MODULES: dict[type[nn.Module], int] = {nn.ReLU: _RELU, nn.SiLU: _SILU, nn.GELU: _GELU}


def can_gate(hidden: Tensor, activation: Callable[[Tensor], Tensor]) -> bool:
    """Whether `gate` takes these: float32 on a processor that has vectors, outside autocast, and a known activation.

    Args:
        hidden: gates and values.
        activation: of the gates.
    """
    return (
        not torch.compiler.is_compiling()
        and hidden.dtype == torch.float32
        and hidden.device.type == "cpu"
        and autocast_dtype(hidden.device) is None
        and activation_code(activation) is not None
        and _native.status().instruction_set in ("avx2", "avx512")
    )


def activation_code(activation: Callable[[Tensor], Tensor]) -> int | None:
    """The code by which kernels know an activation; None for one that they do not know.

    Args:
        activation: a function or a module.
    """
    if isinstance(activation, nn.Module):
        is_approximate = getattr(activation, "approximate", "none") != "none"
        return None if is_approximate else _MODULES.get(type(activation))
    return next((code for known, code in _FUNCTIONS if activation is known), None)


def gate(hidden: Float[Tensor, "rows twice"], activation: Callable[[Tensor], Tensor]) -> Float[Tensor, "rows half"]:
    """``activation(g) * v`` of gates and values side by side, ``hidden = [g, v]``, and its gradient in one pass.

    Args:
        hidden: of an even number of columns; float32, on the CPU, as `can_gate` wants it.
        activation: one that the kernel knows.

    Raises:
        ValueError: an odd number of columns, or an unknown activation.
        Unavailable: another thread has chosen instructions meanwhile for which there is no kernel.
    """
    code = activation_code(activation)
    if hidden.dim() != 2 or hidden.shape[1] % 2 or code is None:
        raise ValueError(f"gates and values are [rows, 2 columns], got {list(hidden.shape)}, activated by {activation}")
    output: Tensor = torch.ops.postern.gate.default(hidden, code)
    return output


def _gate(hidden: Tensor, code: int) -> Tensor:
    hidden = hidden.contiguous()
    output = _gate_like(hidden, code)
    _run_rows("postern_gate", code, output, hidden, output)
    return output


def _gate_backward(grad: Tensor, hidden: Tensor, code: int) -> Tensor:
    grad, hidden = grad.contiguous(), hidden.contiguous()
    output = torch.empty_like(hidden)
    _run_rows("postern_gate_backward", code, grad, grad, hidden, output)
    return output


def _run_rows(name: str, code: int, like: Tensor, *operands: Tensor) -> None:
    function = bound(name, *[ctypes.c_void_p] * len(operands), *[ctypes.c_int64] * 2, *[ctypes.c_int] * 2)
    check(function(*(x.data_ptr() for x in operands), *like.shape, code, torch.get_num_threads()), like)


def _gate_like(hidden: Tensor, code: int) -> Tensor:
    return hidden.new_empty(len(hidden), hidden.shape[1] // 2)


def _save(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.code = inputs[1]


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return torch.ops.postern.gate_backward.default(grad, *ctx.saved_tensors, ctx.code), None


_LIBRARY = torch.library.Library("postern", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("gate(Tensor hidden, int code) -> Tensor")  # type: ignore[no-untyped-call]
_LIBRARY.define("gate_backward(Tensor grad, Tensor hidden, int code) -> Tensor")  # type: ignore[no-untyped-call]
_LIBRARY.impl("gate", _gate, "CPU")  # type: ignore[no-untyped-call]
_LIBRARY.impl("gate_backward", _gate_backward, "CPU")  # type: ignore[no-untyped-call]
torch.library.register_fake("postern::gate", _gate_like, lib=_LIBRARY)
torch.library.register_fake("postern::gate_backward", lambda grad, hidden, code: torch.empty_like(hidden), lib=_LIBRARY)
torch.library.register_autograd("postern::gate", _differentiate, setup_context=_save, lib=_LIBRARY)


def check(failure: int, operand: Tensor) -> None:
    """Raise what a kernel's code for a failure means, if it is one.

    Args:
        failure: 0 for none.
        operand: what the kernel worked on.
    """
    if failure == 1:
        raise MemoryError(f"no memory to work on {tuple(operand.shape)}")
    if failure:
        raise Unavailable(_native.status().reason)


@functools.cache
def bound(name: str, *arguments: Any) -> ctypes._NamedFuncPointer:
    """A kernel, ready to be called.

    Args:
        name: of the C function, which returns a code for a failure.
        arguments: their types in C.
    """
    function: ctypes._NamedFuncPointer = getattr(_native.library(), name)
    function.restype = ctypes.c_int
    function.argtypes = [*arguments]
    return function
