"""What recurrent layers keep of the tokens that they have seen."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Int
from torch import Tensor


@dataclass
class RecurrentState:
    """The cache of a recurrent layer; its size does not depend on the number of tokens.

    Attributes:
        state: of the recurrence after the last token, ``[batch, ...]``.
        recent: the last inputs of a short convolution, ``[batch, channels, width - 1]``, where the layer has one.
        length: number of tokens.
    """

    state: Tensor | None = None
    recent: Tensor | None = None
    length: int = 0

    def __len__(self) -> int:
        return self.length

    def reorder(self, rows: Int[Tensor, " batch"]) -> None:
        """Keep these sequences of the batch, in this order."""
        if self.state is not None:
            self.state = self.state.index_select(0, rows)
        if self.recent is not None:
            self.recent = self.recent.index_select(0, rows)
