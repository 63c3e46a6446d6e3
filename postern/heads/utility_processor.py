"""The transforms from utilities to probabilities in ``generate`` of Hugging Face Transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from postern.errors import MissingExtra


def utility_logits_processor(transform: Callable[[Tensor], Tensor]) -> Any:
    """Return a Transformers ``LogitsProcessor`` that transforms the logits of every token (reconstruction).

        model.generate(**inputs, do_sample=True, logits_processor=[utility_logits_processor(PowerTransform(1.5))])

    ``generate`` applies it after its own processors (penalties, forbidden tokens) and, when sampling, before
    temperature, top-k and top-p. These have defaults in some checkpoints, so turn off what is not wanted:
    ``temperature=1.0, top_k=0, top_p=1.0``.

    Args:
        transform: ``(scores [batch, vocabulary]) -> log-probabilities [batch, vocabulary]``, such as
            `PowerTransform`, `DesmoothTransform` or `RankTransform`, on the model's device.

    Raises:
        MissingExtra: Transformers is not installed.
        ValueError: no transform, or (when generating) one that changes the shape.
    """
    if not callable(transform):
        raise ValueError(f"a transform is a function of scores, got {transform!r}")
    try:
        from postern.heads._logits_processor import UtilityLogitsProcessor
    except ImportError:
        raise MissingExtra("transformers", "A logits processor for generate") from None
    return UtilityLogitsProcessor(transform)
