"""Softmax over the last dimension in plain tensor operations, algorithm by algorithm: what the kernels are held to.

Correct, not fast: every operation is a sweep of its own. Computed in float32 at least, in blocks as the kernels do.
"""

from __future__ import annotations

import torch
from torch import Tensor

from postern.softmax.extended import EXACT_EXPONENT, ext_add, ext_exp, ext_sum, minus_logarithm


def softmax(logits: Tensor, algorithm: str, is_log: bool, block: int) -> Tensor:
    """Softmax, or its logarithm, over the last dimension, in the logits' dtype."""
    x = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if x.numel() == 0:
        return torch.empty_like(logits, memory_format=torch.contiguous_format)
    if algorithm == "two_pass":
        result = _two_pass(x, is_log, block)
    elif algorithm == "online":
        result = _online(x, is_log, block)
    else:
        result = _three_pass(x, is_log)
    return result.to(logits.dtype).contiguous()


def _two_pass(x: Tensor, is_log: bool, block: int) -> Tensor:
    total = (x.new_zeros((*x.shape[:-1], 1)), x.new_full((*x.shape[:-1], 1), -torch.inf))
    for part in torch.split(x, block, -1):
        total = ext_add(total, ext_sum(*ext_exp(part), -1, keepdim=True))
    mantissa, exponent = total
    if is_log:
        result = minus_logarithm(x, *ext_sum(*ext_exp(x.double()), -1, keepdim=True))
    else:
        m, n = ext_exp(x)
        result = (m / mantissa) * torch.exp2((n - exponent).clamp_min(-1100))
    inexact = ~(exponent.abs() <= EXACT_EXPONENT)
    if inexact.any():
        result = torch.where(inexact, _three_pass(x, is_log), result)
    return result


def _three_pass(x: Tensor, is_log: bool) -> Tensor:
    shifted = x - x.amax(-1, keepdim=True)
    m, n = ext_exp(shifted)
    exponential = m * torch.exp2(n.clamp_min(-1100))
    total = exponential.sum(-1, keepdim=True)
    return shifted - torch.log(total) if is_log else exponential / total


def _online(x: Tensor, is_log: bool, block: int) -> Tensor:
    greatest = x.new_full((*x.shape[:-1], 1), torch.finfo(x.dtype).min)
    total = torch.zeros_like(greatest)
    for part in torch.split(x, block, -1):
        before, greatest = greatest, torch.maximum(greatest, part.amax(-1, keepdim=True))
        total = total * torch.exp(before - greatest) + torch.exp(part - greatest).sum(-1, keepdim=True)
    result = (x - greatest) - torch.log(total) if is_log else torch.exp(x - greatest) / total
    return torch.where(total > 0, result, torch.nan)
