"""The compiled bank of feed-forward experts, for inference on the CPU, and gates; see ``_native/experts.cpp``."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from postern import _native
from postern.errors import Unavailable
from postern.precision import autocast_dtype

_Sizes = ctypes.c_int64 * 7

_native.share_threads()  # torch's, which has been imported by now, whoever loaded the kernels

# The codes of the C interface.
_RELU, _SILU, _GELU = 1, 2, 3
_FUNCTIONS = ((F.relu, _RELU), (torch.relu, _RELU), (F.silu, _SILU), (F.gelu, _GELU))
_MODULES: dict[type[nn.Module], int] = {nn.ReLU: _RELU, nn.SiLU: _SILU, nn.GELU: _GELU}


def can_infer(tokens: Tensor, activation: Callable[[Tensor], Tensor], *weights: Tensor | None) -> bool:
    """Whether `feed_forward` takes these: what `can_gate` does, and without gradients.

    Args:
        tokens: what the experts see.
        activation: of the hidden features.
        weights: of the experts; None for those that are missing.
    """
    operands = [tokens, *(weight for weight in weights if weight is not None)]
    is_tracked = torch.is_grad_enabled() and any(x.requires_grad for x in operands)
    return not is_tracked and all(can_gate(x, activation) for x in operands)


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
        and _code(activation) is not None
        and _native.status().instruction_set in ("avx2", "avx512")
    )


def _code(activation: Callable[[Tensor], Tensor]) -> int | None:
    if isinstance(activation, nn.Module):
        is_approximate = getattr(activation, "approximate", "none") != "none"
        return None if is_approximate else _MODULES.get(type(activation))
    return next((code for known, code in _FUNCTIONS if activation is known), None)


def feed_forward(
    tokens: Float[Tensor, "tokens width"],
    order: Int[Tensor, " assignments"],
    ends: Int[Tensor, " experts"],
    expand: Float[Tensor, "experts width expanded"],
    contract: Float[Tensor, "experts hidden width"],
    expand_bias: Float[Tensor, "experts expanded"] | None,
    contract_bias: Float[Tensor, "experts width"] | None,
    activation: Callable[[Tensor], Tensor],
) -> Float[Tensor, "assignments width"]:
    """What each expert makes of the tokens that are assigned to it; see `postern.experts.FeedForwardExperts`.

    The result for a token is the same to the bit, whatever tokens are with it and on however many threads.

    Args:
        tokens: each has as many assignments as the others.
        order: the assignments, sorted by expert; assignment ``a`` is of token ``a // (assignments / tokens)``.
        ends: where those of each expert end in the order; assignments from the last end on give zeros.
        expand: first weights, of gates first where there are twice as many columns as hidden features.
        contract: second weights.
        expand_bias: added to what the first make; None for nothing.
        contract_bias: likewise; None where the other is.
        activation: of the hidden features, or of the gates.

    Raises:
        ValueError: operands that do not fit each other, or assignments that do not exist.
        MemoryError: no memory for copies of a few rows and weights.
        Unavailable: another thread has chosen instructions meanwhile for which there is no kernel.
    """
    num_experts, hidden_dim, width = contract.shape
    expanded = expand.shape[2]
    top_k = len(order) // max(len(tokens), 1)
    biases = [expand_bias, contract_bias]
    code = _code(activation)
    if code is None:
        raise ValueError(f"the activation is ReLU, SiLU or GELU, got {activation}")
    if (
        tokens.shape[1:] != (width,)
        or len(order) != top_k * len(tokens)
        or ends.shape != (num_experts,)
        or expand.shape[:2] != (num_experts, width)
        or expanded not in (hidden_dim, 2 * hidden_dim)
        or [None if bias is None else bias.shape for bias in biases]
        not in ([None, None], [(num_experts, expanded), (num_experts, width)])
    ):
        operands = (tokens, order, ends, expand, contract, *biases)
        shapes = [None if x is None else tuple(x.shape) for x in operands]
        raise ValueError(f"tokens, order, ends, weights and biases do not fit each other: {shapes}")
    output = tokens.new_empty(len(order), width)
    order, ends = order.to(torch.int64), ends.to(torch.int64)
    operands = (tokens, order, ends, expand, contract, *biases)
    dense = [None if x is None else x.contiguous() for x in operands]
    is_gated = expanded == 2 * hidden_dim
    function = _bound("postern_experts", *[ctypes.c_void_p] * 8, ctypes.POINTER(ctypes.c_int64), ctypes.c_int)
    failure = function(
        *(None if x is None else x.data_ptr() for x in dense),
        output.data_ptr(),
        _Sizes(len(order), top_k, num_experts, width, hidden_dim, is_gated, code),
        torch.get_num_threads(),
    )
    if failure == 3:
        raise ValueError(
            f"the order and ends are of {len(order)} assignments, got numbers from {int(order.min())} to "
            f"{int(order.max())} and ends {ends.tolist()}"
        )
    _check(failure, tokens)
    return output


def _check(failure: int, operand: Tensor) -> None:
    if failure == 1:
        raise MemoryError(f"no memory to work on {tuple(operand.shape)}")
    if failure:
        raise Unavailable(_native.status().reason)


def gate(hidden: Float[Tensor, "rows twice"], activation: Callable[[Tensor], Tensor]) -> Float[Tensor, "rows half"]:
    """``activation(g) * v`` of gates and values side by side, ``hidden = [g, v]``, and its gradient in one pass.

    Args:
        hidden: of an even number of columns; float32, on the CPU, as `can_gate` wants it.
        activation: one that the kernel knows.

    Raises:
        ValueError: an odd number of columns, or an unknown activation.
        Unavailable: another thread has chosen instructions meanwhile for which there is no kernel.
    """
    code = _code(activation)
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
    function = _bound(name, *[ctypes.c_void_p] * len(operands), *[ctypes.c_int64] * 2, *[ctypes.c_int] * 2)
    _check(function(*(x.data_ptr() for x in operands), *like.shape, code, torch.get_num_threads()), like)


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


@functools.cache
def _bound(name: str, *arguments: Any) -> ctypes._NamedFuncPointer:
    function: ctypes._NamedFuncPointer = getattr(_native.library(), name)
    function.restype = ctypes.c_int
    function.argtypes = [*arguments]
    return function
