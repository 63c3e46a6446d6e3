"""The logits processor itself; apart, as it needs Transformers to be imported."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from transformers import LogitsProcessor


class UtilityLogitsProcessor(LogitsProcessor):  # type: ignore[misc]
    """Gives ``generate`` the transformed log-probabilities of each token; see `utility_logits_processor`."""

    # each row is transformed on its own, whatever sequence it belongs to
    supports_continuous_batching = True

    def __init__(self, transform: Callable[[Tensor], Tensor]) -> None:
        self.transform = transform

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return ``transform(scores)``."""
        transformed = self.transform(scores)
        if transformed.shape != scores.shape:
            raise ValueError(f"a transform keeps the shape {list(scores.shape)}, got {list(transformed.shape)}")
        return transformed
