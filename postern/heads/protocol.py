"""What an output layer is: logits from hidden vectors, and the loss that goes with them.

A head owns the parameters that turn hidden vectors into class scores, so that one head can replace another under the
same network, whatever its loss: softmax, a margin, a codebook.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor


@runtime_checkable
class Head(Protocol):
    """An output layer with its loss. Heads are `torch.nn.Module`s; calling one returns its logits.

    Attributes:
        in_features: width of the hidden vectors.
        num_classes: number of classes.
    """

    in_features: int
    num_classes: int

    def logits(self, hidden: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch num_classes"]:
        """Return one score a class; the largest is the prediction."""
        ...

    def loss(self, hidden: Float[Tensor, "*batch in_features"], target: Int[Tensor, "*batch"]) -> Float[Tensor, ""]:
        """Return the mean loss over the batch, to minimise.

        Raises:
            ValueError: hidden vectors of another width, or targets of another shape or not integer.
        """
        ...


def check_hidden(hidden: Tensor, in_features: int) -> None:
    """Check that hidden vectors fit a head.

    Args:
        hidden: what the head is given.
        in_features: the width that it expects.

    Raises:
        ValueError: no vectors, of another width, or not floating point.
    """
    if hidden.dim() == 0 or hidden.shape[-1] != in_features:
        raise ValueError(f"hidden vectors must have {in_features} features, got the shape {tuple(hidden.shape)}")
    if not hidden.is_floating_point():
        raise ValueError(f"hidden vectors must be floating point, got {hidden.dtype}")


def check_target(hidden: Tensor, target: Tensor) -> None:
    """Check that there is one class index for each hidden vector.

    Args:
        hidden: vectors, features last.
        target: class indices.

    Raises:
        ValueError: targets of another shape than the batch, not integer, or none at all.
    """
    if target.shape != hidden.shape[:-1]:
        raise ValueError(
            f"hidden vectors of shape {tuple(hidden.shape)} need targets of shape {tuple(hidden.shape[:-1])}, "
            f"got {tuple(target.shape)}"
        )
    if target.is_floating_point() or target.is_complex():
        raise ValueError(f"targets must be class indices of an integer type, got {target.dtype}")
    if target.numel() == 0:
        raise ValueError("a mean loss needs at least one target, got none")
