"""Calibrated stacking: one zero-shot expert for all classes, with a constant subtracted from the seen ones.

Paper: An Empirical Study and Analysis of Generalized Zero-Shot Learning for Object Recognition in the Wild (arXiv
1605.04253).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from postern.anomaly.expert_predictions import ExpertPredictions
from postern.anomaly.gzsl_combiner import DomainBest, GZSLCombiner, domain_best
from postern.anomaly.seen_unseen_curve import SeenUnseenCurve


class CalibratedStacking(GZSLCombiner):
    r"""``argmax_c P_ZS(c | x) - gamma [c seen]``, with ``gamma`` chosen on validation classes.

    It asks the zero-shot expert alone. The critical threshold of a sample is ``max_S P_ZS - max_U P_ZS``.

    Args:
        thresholds: values of ``gamma`` to choose from; None for all at which a validation sample changes.

    Attributes:
        threshold_: the chosen ``gamma``.
        tuned_acc_h_: harmonic mean at it on the validation samples.
    """

    def __init__(self, thresholds: Sequence[float] | None = None) -> None:
        self.thresholds = thresholds

    def scores(self, predictions: ExpertPredictions) -> Float[np.ndarray, "samples classes"]:
        """``P_ZS - gamma [c seen]``, and minus infinity for classes of neither list; its ``argmax`` is `predict`.

        Raises:
            NotFittedError: not tuned yet.
        """
        self._check_tuned()
        scores = np.full(predictions.zero_shot.shape, -np.inf)
        for columns, constant in ((predictions.seen, self.threshold_), (predictions.unseen, 0.0)):
            scores[:, columns] = predictions.zero_shot[:, columns] - constant
        return scores

    def _domains(self, predictions: ExpertPredictions) -> tuple[DomainBest, DomainBest]:
        return domain_best(predictions.zero_shot, predictions.seen), domain_best(
            predictions.zero_shot, predictions.unseen
        )

    def _critical(
        self, predictions: ExpertPredictions, seen: DomainBest, unseen: DomainBest
    ) -> Float[np.ndarray, " samples"]:
        return np.asarray(seen.confidence - unseen.confidence)

    def _curves(
        self, predictions: ExpertPredictions, thresholds: Any
    ) -> Iterator[tuple[Mapping[str, float | None], SeenUnseenCurve]]:
        seen, unseen = self._domains(predictions)
        yield {}, self._curve(predictions, seen, unseen, self._critical(predictions, seen, unseen), thresholds)
