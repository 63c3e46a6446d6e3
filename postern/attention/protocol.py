"""What a self-attention layer is, so that one can replace another under the same network.

A layer is called as ``layer(x, mask=None, cache=None)`` and gives ``[batch, time, width]`` back.

- ``x`` is the layer's input, already normalised where the network normalises first.
- ``mask`` is boolean, true where a token may be attended to: ``[batch, keys]`` for padding, or anything that
  broadcasts to ``[batch, heads, queries, keys]``. A causal layer applies its own order on top. With a cache, keys are
  those of the cache followed by those of ``x``. A query that may attend to nothing gets nothing: zeros.
- ``cache`` is what the layer's ``new_cache()`` gave. It is changed in place: the layer adds what later tokens need of
  ``x``. Fed token by token, or chunk by chunk, a causal layer gives what it gives for the whole sequence.

Layers whose cost grows with the time alone keep sums over the tokens instead of the tokens, and layers that choose
blocks of tokens let the blocks begin with the first real one. They take masks ``[batch, keys]``; one that differs by
query or head is refused.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@runtime_checkable
class Cache(Protocol):
    """What a layer keeps of the tokens that it has seen; ``len`` is their number."""

    def __len__(self) -> int: ...

    def reorder(self, rows: Int[Tensor, " batch"]) -> None:
        """Keep these sequences of the batch, in this order; for beam search."""
        ...


@runtime_checkable
class Attention(Protocol):
    """A self-attention layer. Layers are `torch.nn.Module`s.

    Attributes:
        width: features of a token.
        is_causal: whether a token sees itself and earlier ones only.
    """

    width: int
    is_causal: bool

    def new_cache(self) -> Cache:
        """Return an empty cache, for one sequence or one batch of them."""
        ...

    def __call__(
        self,
        x: Float[Tensor, "batch time width"],
        mask: Bool[Tensor, "*mask"] | None = None,
        cache: Any = None,
    ) -> Float[Tensor, "batch time width"]:
        """Attend.

        Raises:
            ValueError: an input of another width, or a mask of another shape or dtype.
        """
        ...


def check_padding(mask: Tensor | None, batch: int, num_keys: int) -> None:
    """Check the mask of a layer that cannot take one by query or head.

    Raises:
        ValueError: not boolean, or not ``[batch, keys]``.
    """
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (batch, num_keys)):
        raise ValueError(
            f"this attention treats keys alike for all queries, so that its mask is boolean and [{batch}, {num_keys}], "
            f"true where a key may be attended to; got {mask.dtype} {list(mask.shape)}"
        )


def check_input(x: Tensor, width: int) -> None:
    """Check that tokens fit a layer.

    Raises:
        ValueError: not ``[batch, time, width]``, or not floating point.
    """
    if x.dim() != 3 or x.shape[-1] != width:
        raise ValueError(f"attention needs tokens of shape [batch, time, {width}], got {list(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"attention needs floating-point tokens, got {x.dtype}")
