"""Matrix products of rows with the matrix of their group: what experts are made of.

PyTorch's `torch.nn.functional.grouped_mm` does the work where it can: in at most 32 bits, and where rows begin at
multiples of 16 bytes. Elsewhere, e.g. in float64, each group is multiplied by itself; so are the gradients of matrices
on the CPU, where they are written into memory that is mapped in large pages.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from postern._native import memory
from postern.precision import autocast_dtype, without_autocast


def grouped_mm(
    x: Float[Tensor, "rows inputs"],
    weight: Float[Tensor, "groups inputs outputs"],
    ends: Int[Tensor, " groups"],
) -> Float[Tensor, "rows outputs"]:
    """``y_r = x_r W_g`` for rows ``ends[g-1] <= r < ends[g]``, and 0 for rows from ``ends[-1]`` on.

    Args:
        x: rows, those of a group in a row.
        weight: a matrix a group.
        ends: where each group ends, ascending.

    Raises:
        ValueError: shapes that do not fit; on the CPU, groups that end behind the last row.
    """
    if x.dim() != 2 or weight.dim() != 3 or weight.shape[1] != x.shape[1] or ends.shape != weight.shape[:1]:
        raise ValueError(
            "rows [rows, inputs] need weights [groups, inputs, outputs] and as many ends, got "
            f"{list(x.shape)}, {list(weight.shape)} and {list(ends.shape)}"
        )
    dtype = autocast_dtype(x.device) or torch.promote_types(x.dtype, weight.dtype)
    is_tracked = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    run = _operator if is_tracked or torch.compiler.is_compiling() else _multiply
    output: Tensor = run(x.to(dtype), weight.to(dtype), ends.to(torch.int32))
    return output


def groups_of(ends: Int[Tensor, " groups"], num_rows: int) -> Int[Tensor, " rows"]:
    """The group of each row; the number of groups for rows that have none.

    Args:
        ends: where each group ends.
        num_rows: how many rows there are.
    """
    return torch.searchsorted(ends, torch.arange(num_rows, dtype=ends.dtype, device=ends.device), right=True)


def _is_taken(*tensors: Tensor) -> bool:
    """Whether PyTorch's product takes them, which lie by rows or by columns."""
    return all(
        x.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and x.numel() > 0
        and 1 in x.stride()[-2:]
        and all(stride * x.element_size() % 16 == 0 for stride in x.stride() if stride != 1)
        for x in tensors
    )


def _slices(ends: Tensor) -> list[slice]:
    return [slice(start, end) for start, end in itertools.pairwise([0, *ends.tolist()])]


def _multiply(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    x = x.contiguous()
    if x.device.type == "cpu" and not 0 <= (last := int(ends[-1])) <= len(x):
        raise ValueError(f"the last group of {len(x)} rows ends at {len(x)} or before, got {last}")
    with without_autocast(x.device):
        if _is_taken(x, weight) and weight.shape[2] * weight.element_size() % 16 == 0:
            output = F.grouped_mm(x, weight, offs=ends)
            if x.device.type == "cpu":
                output[last:].zero_()
                return output
            return output.masked_fill_(torch.arange(len(x), device=x.device)[:, None] >= ends[-1], 0.0)
        output = x.new_zeros(len(x), weight.shape[2])
        for group, rows in enumerate(_slices(ends)):
            output[rows] = x[rows] @ weight[group]
        return output


def _differentiate(grad: Tensor, x: Tensor, weight: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    grad, x = grad.contiguous(), x.contiguous()
    of_x = _multiply(grad, weight.transpose(1, 2), ends)
    with without_autocast(x.device):
        if x.device.type != "cpu" and _is_taken(x, grad):
            return of_x, F.grouped_mm(x.t(), grad, offs=ends)
        of_weight = memory.empty(weight.shape, weight.dtype, weight.device)
        sizes = [rows.stop - rows.start for rows in _slices(ends)]
        sizes.append(len(x) - sum(sizes))
        for rows, of_rows, out in zip(torch.split(x, sizes), torch.split(grad, sizes), of_weight, strict=False):
            torch.mm(rows.t(), of_rows, out=out)
        return of_x, of_weight


_LIBRARY = torch.library.Library("postern", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("grouped_mm(Tensor x, Tensor weight, Tensor ends) -> Tensor")  # type: ignore[no-untyped-call]
_LIBRARY.define("grouped_mm_backward(Tensor grad, Tensor x, Tensor weight, Tensor ends) -> (Tensor, Tensor)")  # type: ignore[no-untyped-call]
_LIBRARY.impl("grouped_mm", _multiply, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
_LIBRARY.impl("grouped_mm_backward", _differentiate, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
_operator = torch.ops.postern.grouped_mm.default
_backward_operator = torch.ops.postern.grouped_mm_backward.default


def _output_like(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[2])


def _gradients_like(grad: Tensor, x: Tensor, weight: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_backward_operator(grad, *ctx.saved_tensors), None)


torch.library.register_fake("postern::grouped_mm", _output_like, lib=_LIBRARY)
torch.library.register_fake("postern::grouped_mm_backward", _gradients_like, lib=_LIBRARY)
torch.library.register_autograd("postern::grouped_mm", _backward, setup_context=_save, lib=_LIBRARY)
