"""The baseline of out-of-distribution detection: how probable the network finds its own answer.

Paper: A Baseline for Detecting Misclassified and Out-of-Distribution Examples in Neural Networks (arXiv 1610.02136).
"""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from postern.anomaly.detector import OutlierDetector


class MaxSoftmax(OutlierDetector):
    """``max_c softmax(z(x))_c``.

    Args:
        model: a trained classifier that returns logits.
        batch_size: inputs in one pass.
    """

    def __init__(self, model: nn.Module, batch_size: int = 256) -> None:
        self.model = model
        self.batch_size = batch_size

    def fit(self, inputs: Any = None, labels: Any = None) -> Self:
        """Nothing to learn; there for the protocol."""
        return self

    def score_samples(self, inputs: Tensor) -> Float[np.ndarray, " batch"]:
        """Return the largest class probability of each input.

        Raises:
            ValueError: inputs that are empty or not finite, or a network that does not return logits.
        """
        with torch.no_grad():
            scores = [self._logits(batch).softmax(dim=1).amax(dim=1).cpu() for batch in self._batches(inputs)]
        return torch.cat(scores).numpy()
