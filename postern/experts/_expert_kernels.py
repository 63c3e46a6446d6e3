"""The compiled bank of feed-forward experts, for inference on the CPU; see ``_native/experts.cpp``."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from postern.experts._gate_kernels import activation_code, bound, can_gate, check

_Sizes = ctypes.c_int64 * 7


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
    code = activation_code(activation)
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
    function = bound("postern_experts", *[ctypes.c_void_p] * 8, ctypes.POINTER(ctypes.c_int64), ctypes.c_int)
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
    check(failure, tokens)
    return output
