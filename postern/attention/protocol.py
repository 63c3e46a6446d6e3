"""What a self-attention layer is, so that one can replace another under the same network.

A layer is called as ``layer(x, mask=None, cache=None)`` and gives ``[batch, time, width]`` back.

- ``x`` is the layer's input, already normalised where the network normalises first.
- ``mask`` is boolean, true where a token may be attended to: ``[batch, keys]`` for padding, or anything that
  broadcasts to ``[batch, heads, queries, keys]``. A causal layer applies its own order on top. With a cache, keys are
  those of the cache followed by those of ``x``. A query that may attend to nothing gets nothing: zeros.
- ``cache`` is what the layer's ``new_cache()`` gave. It is changed in place: the layer adds what later tokens need of
  ``x``. Fed token by token, or chunk by chunk, a causal layer gives what it gives for the whole sequence.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Bool, Float
from torch import Tensor


@runtime_checkable
class Attention(Protocol):
    """A self-attention layer. Layers are `torch.nn.Module`s.

    Attributes:
        width: features of a token.
        is_causal: whether a token sees itself and earlier ones only.
    """

    width: int
    is_causal: bool

    def new_cache(self) -> Any:
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


def check_input(x: Tensor, width: int) -> None:
    """Check that tokens fit a layer.

    Raises:
        ValueError: not ``[batch, time, width]``, or not floating point.
    """
    if x.dim() != 3 or x.shape[-1] != width:
        raise ValueError(f"attention needs tokens of shape [batch, time, {width}], got {list(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"attention needs floating-point tokens, got {x.dtype}")
