"""The compiled convolution of chosen filters on chosen channels, for the CPU; see ``_native/filtered_conv.cpp``."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from postern import _native
from postern.adaptive.cost import report_macs
from postern.errors import Unavailable

_Sizes = ctypes.c_int64 * 16

_native.share_threads()  # torch's, which has been imported by now, whoever loaded the kernels

# What activations clamp to.
_BOUNDS: Mapping[type[nn.Module], tuple[float, float]] = {nn.ReLU: (0.0, math.inf), nn.ReLU6: (0.0, 6.0)}


def can_run(inputs: Tensor, act: nn.Module | None) -> bool:
    """Whether the kernel takes these: float32 on a processor that has vectors, and an activation that clamps.

    Args:
        inputs: of the convolution.
        act: its activation, or None.
    """
    return (
        inputs.dtype == torch.float32
        and inputs.device.type == "cpu"
        and (act is None or type(act) in _BOUNDS)
        and _native.status().instruction_set in ("avx2", "avx512")
    )


def output_size(conv: nn.Conv2d, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of a convolution's output.

    Args:
        conv: the convolution.
        height: pixels of the input.
        width: likewise.
    """

    def along(axis: int, pixels: int) -> int:
        reach = conv.dilation[axis] * (conv.kernel_size[axis] - 1)
        return (pixels + 2 * int(conv.padding[axis]) - reach - 1) // conv.stride[axis] + 1

    return along(0, height), along(1, width)


def filtered_conv(
    conv: nn.Conv2d,
    weight: Float[Tensor, "out in_per_group kernel_rows kernel_columns"],
    shift: Float[Tensor, " out"],
    act: nn.Module | None,
    inputs: Float[Tensor, "batch in height width"],
    active_in: Bool[Tensor, "batch in"] | None,
    mask: Bool[Tensor, "batch out"],
    residual: Float[Tensor, "batch out rows columns"] | None,
) -> Float[Tensor, "batch out rows columns"]:
    """``act(conv(inputs) + shift [+ residual])`` of the filters in the mask, 0 for the others.

    Args:
        conv: gives stride, padding and dilation; ordinary or depth-wise.
        weight: in the place of its own.
        shift: likewise.
        act: None, ReLU or ReLU6.
        inputs: of the convolution; what is in channels that are off does not count.
        active_in: which input channels are on; None for all.
        mask: which filters are on.
        residual: added before the activation.

    Raises:
        ValueError: operands that do not fit each other, or an input that is smaller than the filters.
        MemoryError: no memory for a copy of the inputs.
        Unavailable: another thread has chosen instructions meanwhile for which there is no kernel.
    """
    batch, channels, height, width = inputs.shape
    size = output_size(conv, height, width)
    if channels != conv.in_channels or min(size) < 1:
        raise ValueError(f"{conv} does not take inputs of the shape {tuple(inputs.shape)}")
    shape = (batch, len(weight), *size)
    for name, each, wanted in (
        ("active_in", active_in, (batch, channels)),
        ("mask", mask, shape[:2]),
        ("residual", residual, shape),
    ):
        if each is not None and each.shape != wanted:
            raise ValueError(f"{name} has the shape {wanted}, got {tuple(each.shape)}")
    output = inputs.new_empty(shape)
    dense = [each if each is None else each.contiguous() for each in (inputs, active_in, mask, weight, shift, residual)]
    padding = (int(conv.padding[0]), int(conv.padding[1]))
    sizes = (batch, channels, height, width, len(weight), *size, *conv.kernel_size, *conv.stride, *padding)
    low, high = (-math.inf, math.inf) if act is None else _BOUNDS[type(act)]
    pairs = _function()(
        *(None if each is None else each.data_ptr() for each in dense),
        output.data_ptr(),
        _Sizes(*sizes, *conv.dilation, int(conv.groups > 1)),
        low,
        high,
        torch.get_num_threads(),
    )
    if pairs == -1:
        raise MemoryError(f"no memory for the channels that are on of inputs {tuple(inputs.shape)}")
    if pairs < 0:
        raise Unavailable(_native.status().reason)
    report_macs(pairs * math.prod(conv.kernel_size) * math.prod(size))
    return output


@functools.cache
def _function() -> ctypes._NamedFuncPointer:
    function = _native.library().postern_filtered_conv
    function.restype = ctypes.c_int64
    number = ctypes.c_float
    function.argtypes = [*[ctypes.c_void_p] * 7, ctypes.POINTER(ctypes.c_int64), number, number, ctypes.c_int]
    return function
