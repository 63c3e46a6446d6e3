"""Computing in the precision that a method needs, whatever surrounds it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

__all__ = ["autocast_dtype", "without_autocast"]


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Compute in the dtypes of the tensors, as if autocast were off; for sums and differences that 16 bits spoil.

    Args:
        device: of the tensors.
    """
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()  # on "meta"


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast would multiply matrices in; None where it is off.

    Args:
        device: of the tensors.
    """
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None
