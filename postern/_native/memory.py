"""Large tensors that are about to be written for the first time.

Fresh memory is mapped page by page as it is written, which takes longer than a softmax; huge pages are hundreds of
times fewer. Small ones are not worth it: the C library may hand out memory that has been written before.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from postern import _native

HUGE_PAGES_BYTES = 1 << 25


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A dense tensor to write; the system is asked for huge pages where it is large, on the CPU of a Linux machine.

    Args:
        shape: sizes.
        dtype: of its elements.
        device: where.
    """
    out = torch.empty(shape, dtype=dtype, device=device)
    if out.nbytes >= HUGE_PAGES_BYTES and out.device.type == "cpu":
        advise = _advise()
        if advise is not None:
            advise(out.data_ptr(), out.nbytes)
    return out


@functools.cache
def _advise() -> Any:
    if not _native.status().available:
        return None
    advise = _native.library().postern_expect_writes
    advise.argtypes = [ctypes.c_void_p, ctypes.c_int64]
    advise.restype = None
    return advise
