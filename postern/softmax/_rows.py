"""What the softmax functions share: checks of their arguments, any dimension, and the choice of a backend."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from postern import _native
from postern.errors import Unavailable
from postern.softmax import _operators

Backend = Literal["auto", "torch", "native"]
BACKENDS = get_args(Backend)


def check(logits: Tensor, dim: int, backend: str, block: int, out: Tensor | None) -> None:
    """Raise ValueError unless the arguments make sense."""
    if logits.dtype not in _operators.FORMATS:
        raise ValueError(f"logits are float32, float64, bfloat16 or float16; got {logits.dtype}")
    if not -max(logits.dim(), 1) <= dim < max(logits.dim(), 1):
        raise ValueError(f"logits of shape {tuple(logits.shape)} have no dimension {dim}")
    if backend not in BACKENDS:
        raise ValueError(f"backend is one of {', '.join(BACKENDS)}; got {backend!r}")
    if backend == "native" and logits.device.type != "cpu":
        raise ValueError(f"the native kernels need logits on the CPU, got {logits.device}; use backend='auto'")
    if block < 1:
        raise ValueError(f"block is at least 1 element, got {block}")
    if out is None:
        return
    if out.shape != logits.shape:
        raise ValueError(f"out has the logits' shape, {tuple(logits.shape)}; got {tuple(out.shape)}")
    if out.dtype != logits.dtype or out.device != logits.device:
        raise ValueError(f"out is {logits.dtype} on {logits.device}, as the logits; got {out.dtype} on {out.device}")
    if torch.is_grad_enabled() and (logits.requires_grad or out.requires_grad):
        raise ValueError("out= cannot be differentiated through: use it under torch.no_grad(), or leave it out")


# Asked once, at import: torch.compile cannot look through the loading of a library.
_STATUS = _native.status()
IS_FAST = _STATUS.instruction_set in ("avx2", "avx512")


def run(logits: Tensor, dim: int, algorithm: str, is_log: bool, backend: str, block: int, out: Tensor | None) -> Tensor:
    """Softmax by one algorithm over one dimension; "auto" is "native" where the kernels are fast, else "torch".

    Raises:
        Unavailable: the native backend was asked for and is not installed.
    """
    if backend == "native" and not _STATUS.available:
        raise Unavailable(_STATUS.reason)
    if backend == "auto" and not (IS_FAST and logits.device.type == "cpu"):
        backend = "torch"
    if logits.dim() == 0:
        row = run(logits.unsqueeze(0), 0, algorithm, is_log, backend, block, None if out is None else out.unsqueeze(0))
        return row.squeeze(0) if out is None else out
    is_last = dim == -1 or dim == logits.dim() - 1
    rows = logits if is_last else logits.movedim(dim, -1)
    if out is not None:
        _operators.softmax_into(rows, algorithm, is_log, backend, block, out if is_last else out.movedim(dim, -1))
        return out
    result: Tensor
    if backend == "torch" or torch.compiler.is_compiling() or _is_tracked(rows):
        result = _operators.softmax(rows, algorithm, is_log, backend, block)
    else:
        # Dispatched in a third of the time of an operator that autograd knows.
        result = _operators.empty(rows)
        _operators.softmax_into(rows, algorithm, is_log, backend, block, result)
    return result if is_last else result.movedim(-1, dim).contiguous()


def _is_tracked(x: Tensor) -> bool:
    """Whether autograd or a transform of torch.func follows what is computed from x."""
    return (x.requires_grad and torch.is_grad_enabled()) or torch._C._are_functorch_transforms_active()
