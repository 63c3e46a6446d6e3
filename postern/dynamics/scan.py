"""The linear recurrence ``h_t = a_t * h_{t-1} + b_t``, elementwise: token by token, or as a tree of pairs.

Two steps of the recurrence are one step of the same kind, ``(a2 a1, a2 b1 + b2)``, so that all prefixes can be found
in a number of rounds that grows with the logarithm of the length ("Prefix Sums and Their Applications", Blelloch 1990;
for this recurrence: "Parallelizing Linear Recurrent Neural Nets Over Sequence Length", arXiv 1709.04057).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

ScanMethod = Literal["sequential", "associative"]


def diagonal_scan(
    decay: Float[Tensor, "*batch time state"],
    inputs: Float[Tensor, "*batch time state"],
    state: Float[Tensor, "*batch state"] | None = None,
    *,
    method: ScanMethod | None = None,
) -> Float[Tensor, "*batch time state"]:
    """``h_t = decay_t * h_{t-1} + inputs_t``, with gradients of any order for all three arguments.

    Both methods take work linear in the length and keep ``decay`` and the result for the backward pass, which is the
    same recurrence run backwards. They never divide, so that decays of 0 and beyond 1 are as good as others.

    Args:
        decay: ``a``; it may broadcast against ``inputs``.
        inputs: ``b``.
        state: ``h`` before the first token; zeros if None.
        method: "sequential" loops over the tokens; "associative" needs about ``2 log2(time)`` rounds on ever shorter
            sequences. None: sequential on a CPU, associative elsewhere. A compiled graph grows with the number of
            tokens or rounds.

    Raises:
        ValueError: another method, fewer than two dimensions, or shapes that do not fit.
    """
    if method not in (None, "sequential", "associative"):
        raise ValueError(f"method is 'sequential', 'associative' or None, got {method!r}")
    try:
        shape = torch.broadcast_shapes(decay.shape, inputs.shape)  # type: ignore[no-untyped-call]
    except RuntimeError:
        shape = torch.Size()
    if len(shape) < 2 or shape[-2] < 1:
        raise ValueError(
            f"a scan needs decays and inputs [..., time, state] of one shape and at least one token, "
            f"got {list(decay.shape)} and {list(inputs.shape)}"
        )
    dtype = torch.promote_types(decay.dtype, inputs.dtype)
    decay, inputs = decay.to(dtype).expand(shape), inputs.to(dtype).expand(shape)
    if state is not None:
        if state.shape != (*shape[:-2], shape[-1]):
            raise ValueError(f"the state has the shape {[*shape[:-2], shape[-1]]}, got {list(state.shape)}")
        first = decay[..., :1, :] * state.to(dtype).unsqueeze(-2) + inputs[..., :1, :]
        inputs = torch.cat([first, inputs[..., 1:, :]], dim=-2)
    if method is None:
        method = "sequential" if inputs.device.type == "cpu" else "associative"
    scanned: Tensor = _Scan.apply(decay, inputs, method == "associative")  # type: ignore[no-untyped-call]
    return scanned


class _Scan(torch.autograd.Function):
    """The recurrence from a state of zeros; backwards, ``g_t = grad_t + a_{t+1} g_{t+1}``."""

    @staticmethod
    def forward(ctx: Any, decay: Tensor, inputs: Tensor, is_associative: bool) -> Tensor:
        states = _associative(decay, inputs) if is_associative else _sequential(decay, inputs)
        ctx.save_for_backward(decay, states)
        ctx.is_associative = is_associative
        return states

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        decay, states = ctx.saved_tensors
        following = torch.cat([decay[..., 1:, :], torch.zeros_like(decay[..., :1, :])], dim=-2)
        backwards: Tensor = _Scan.apply(following.flip(-2), grads[0].flip(-2), ctx.is_associative)  # type: ignore[no-untyped-call]
        carried = backwards.flip(-2)
        before = torch.cat([torch.zeros_like(states[..., :1, :]), states[..., :-1, :]], dim=-2)
        return carried * before, carried, None


def _sequential(decay: Tensor, inputs: Tensor) -> Tensor:
    states = torch.empty(inputs.shape, dtype=inputs.dtype, device=inputs.device)
    state = inputs[..., 0, :]
    states[..., 0, :] = state
    for a, b, place in zip(decay.unbind(-2)[1:], inputs.unbind(-2)[1:], states.unbind(-2)[1:], strict=True):
        state = torch.addcmul(b, a, state)
        place.copy_(state)
    return states


def _associative(decay: Tensor, inputs: Tensor) -> Tensor:
    """Join tokens to pairs, scan these, and fill in what lies between."""
    time = inputs.shape[-2]
    if time == 1:
        return inputs.clone()
    even, odd = slice(0, time - 1, 2), slice(1, None, 2)
    joined = decay[..., odd, :] * inputs[..., even, :] + inputs[..., odd, :]
    states = torch.empty(inputs.shape, dtype=inputs.dtype, device=inputs.device)
    pairs = _associative(decay[..., odd, :] * decay[..., even, :], joined)
    states[..., odd, :] = pairs
    states[..., 0, :] = inputs[..., 0, :]
    if time > 2:
        later = slice(2, None, 2)
        states[..., later, :] = decay[..., later, :] * pairs[..., : (time - 1) // 2, :] + inputs[..., later, :]
    return states
