"""Which constant may stand for the maxima of a model's softmaxes: a range that holds nearly all of its logits.

Paper: "FlashDecoding++: Faster Large Language Model Inference on GPUs", arXiv 2311.01282, section 3. The paper stores
one constant a model; fine-tuning moves the logits, so that a fine-tuned model is calibrated anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from postern.attention.hugging_face import normalised_forward, register_attention
from postern.attention.self_attention import SelfAttention
from postern.attention.unified_softmax import SAFE_EXPONENT, UnifiedMax
from postern.nets.evaluation import evaluating

_OBSERVED = "postern/observed_softmax"


class UnifiedMaxCalibrator:
    """Smallest, greatest and quantiles of logits, in a histogram of fixed size whose bins double where it is too short.

    Entries that are masked do not count: minus infinity, and what lies in the lower half of the dtype's negative
    numbers, as attention functions use for a mask.

    Args:
        num_bins: bins of the histogram, a multiple of 4. A quantile is known to ``4 / num_bins`` of the largest
            magnitude, or of 4 where none is larger.

    Attributes:
        count: logits seen.
        low: the smallest; infinite before the first.
        high: the greatest; minus infinity before the first.

    Raises:
        ValueError: a number of bins that is no positive multiple of 4.
    """

    def __init__(self, num_bins: int = 8192) -> None:
        if num_bins < 4 or num_bins % 4:
            raise ValueError(f"num_bins is a positive multiple of 4, got {num_bins}")
        self.count = 0
        self.low, self.high = math.inf, -math.inf
        self._bin_width = 16.0 / num_bins  # -8 .. 8 at first
        self._counts = torch.zeros(num_bins, dtype=torch.int64)

    @torch.no_grad()
    def update(self, logits: Float[Tensor, "*shape"]) -> None:
        """Add logits as softmax sees them: scaled, and after rotations.

        Args:
            logits: of any shape.

        Raises:
            ValueError: NaN, plus infinity, or a tensor that is not floating point.
        """
        if not logits.is_floating_point():
            raise ValueError(f"logits are floating-point, got {logits.dtype}")
        seen = logits.detach()
        seen = seen[~(seen <= torch.finfo(seen.dtype).min / 2)]
        if not seen.numel():
            return
        low, high = seen.min().item(), seen.max().item()
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError(f"logits are finite, or masked by minus infinity; got some from {low} to {high}")
        self.low, self.high = min(self.low, low), max(self.high, high)
        half = len(self._counts) // 2
        while max(abs(low), abs(high)) >= self._bin_width * (half - 1):
            pairs = self._counts.view(-1, 2).sum(1)
            self._counts.zero_()
            self._counts[half // 2 : half // 2 + half] = pairs
            self._bin_width *= 2
        bins = torch.floor(seen.double() / self._bin_width).long() + half
        self._counts += torch.bincount(bins, minlength=2 * half).cpu()
        self.count += seen.numel()

    def finalize(self, coverage: float = 0.9999) -> UnifiedMax:
        """Return the constant in the middle of a range that holds at least this share of the logits.

        The range leaves out the same share at both ends, and is a bin or two wider than it must be. It is disabled
        where it is wider than 64: a row whose logits lie at one end would be computed again.

        Args:
            coverage: share of the logits, above 0 and at most 1; the paper's is 0.9999.

        Raises:
            ValueError: a coverage outside (0, 1], or no logits.
        """
        if not 0 < coverage <= 1:
            raise ValueError(f"coverage lies in (0, 1], got {coverage}")
        if not self.count:
            raise ValueError("a range needs logits; update was never given any that are not masked")
        left_out = int((1 - coverage) / 2 * self.count)
        below = self._counts.cumsum(0)
        half = len(self._counts) // 2
        first = int((below > left_out).nonzero()[0])
        last = int((below >= self.count - left_out).nonzero()[0])
        # Bins hold their lower edge, the range holds neither of its own.
        low = (first - half - 1) * self._bin_width
        high = (last - half + 1) * self._bin_width
        phi = (low + high) / 2
        return UnifiedMax(phi, low - phi, high - phi, enabled=high - low <= 2 * SAFE_EXPONENT)


def calibrate_unified_max(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    coverage: float = 0.9999,
    call: Callable[[nn.Module, Any], object] | None = None,
) -> UnifiedMax:
    """Run a model over texts and choose the constant for all of its softmaxes.

    The model is one of Transformers whose attention has a name, or any with layers of
    `postern.attention.SelfAttention` that use softmax. It runs in evaluation mode and is left as it was.

    Args:
        model: the model.
        batches: what it is called with; texts like those that it will see.
        coverage: see `UnifiedMaxCalibrator.finalize`.
        call: ``call(model, batch)``, by default ``model(batch)``, or ``model(**batch)`` for a mapping.

    Raises:
        ValueError: no batches, no such layers, or a coverage outside (0, 1].
        MissingExtra: a model of Transformers that is not installed.
    """
    calibrator = UnifiedMaxCalibrator()
    with torch.no_grad(), evaluating(model), _observing(model, calibrator):
        for batch in batches:
            if call is not None:
                call(model, batch)
            elif hasattr(batch, "keys"):
                model(**batch)
            else:
                model(batch)
    return calibrator.finalize(coverage)


@contextmanager
def _observing(model: nn.Module, calibrator: UnifiedMaxCalibrator) -> Iterator[None]:
    def softmax(logits: Tensor, dim: int) -> Tensor:
        calibrator.update(logits)
        return torch.softmax(logits, dim)

    layers = [layer for layer in model.modules() if isinstance(layer, SelfAttention) and layer.normalise is None]
    set_attention = getattr(model, "set_attn_implementation", None)
    if layers:
        for layer in layers:
            layer.normalise = softmax
        try:
            yield
        finally:
            for layer in layers:
                layer.normalise = None
    elif set_attention is not None:
        before = model.config._attn_implementation  # type: ignore[union-attr]
        register_attention(_OBSERVED, partial(normalised_forward, normalise=softmax))
        set_attention(_OBSERVED)
        try:
            yield
        finally:
            set_attention(before)
    else:
        raise ValueError(
            f"{type(model).__name__} has no SelfAttention layers with softmax and is no model of Transformers; feed a "
            "UnifiedMaxCalibrator with its logits"
        )
