"""The compiled form of the selection loop, for the CPU; see ``postern/_native/soft_nms.cpp``."""

from __future__ import annotations

import ctypes
import functools

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from postern import _native
from postern.boxes._options import Options

# The codes of the C interface.
_DECAYS = {"gaussian": 0, "linear": 1, "hard": 2}


def is_available() -> bool:
    """Whether the compiled kernels are loaded."""
    return _native.status().available


def select_by_group(
    boxes: Float[Tensor, "n 4"],
    scores: Float[Tensor, " n"],
    starts: Int64[Tensor, " groups_and_end"],
    options: Options,
) -> Float[Tensor, " n"]:
    """Return the score of each box when it was selected, or 0 where it was dropped.

    Args:
        boxes: in double precision, one group after the other, in each by rising index.
        scores: likewise.
        starts: where each group begins, and the number of boxes.
        options: everything else; ``max_out`` is for each group, and a decay function of one's own is not used.
    """
    boxes, scores, starts = boxes.contiguous(), scores.contiguous(), starts.contiguous()
    selected = torch.empty_like(scores)
    failed = _function()(
        _DECAYS[options.method],
        boxes.data_ptr(),
        scores.data_ptr(),
        selected.data_ptr(),
        starts.data_ptr(),
        len(starts) - 1,
        options.iou_threshold,
        options.sigma,
        options.score_threshold,
        len(scores) if options.max_out is None else options.max_out,
        float(options.is_pixel_inclusive),
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(f"no memory to select among {len(scores)} boxes")
    return selected


@functools.cache
def _function() -> ctypes._NamedFuncPointer:
    function = _native.library().postern_soft_nms
    function.restype = ctypes.c_int
    function.argtypes = [
        ctypes.c_int,
        *[ctypes.c_void_p] * 4,
        ctypes.c_int64,
        *[ctypes.c_double] * 3,
        ctypes.c_int64,
        ctypes.c_double,
        ctypes.c_int,
    ]
    return function
