"""What all ways to combine two experts share: a critical threshold a sample, and its choice on validation classes."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Self

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator
from sklearn.exceptions import NotFittedError

from postern.anomaly.expert_predictions import ExpertPredictions
from postern.anomaly.seen_unseen_curve import SeenUnseenCurve, seen_unseen_curve


class DomainBest(NamedTuple):
    """The best class of a domain for each sample, which stays the best at every threshold.

    Attributes:
        column: which.
        confidence: its probability, in float64.
        mass: the probability of the whole domain.
    """

    column: Int[np.ndarray, " samples"]
    confidence: Float[np.ndarray, " samples"]
    mass: Float[np.ndarray, " samples"]


def domain_best(probabilities: Float[np.ndarray, "samples classes"], columns: Int[np.ndarray, " domain"]) -> DomainBest:
    """Best class among the given columns; the lowest column of equals, as ``argmax`` over all columns has it."""
    columns = np.sort(columns)
    domain = probabilities[:, columns]
    place = domain.argmax(axis=1)
    confidence = domain[np.arange(len(domain)), place].astype(np.float64)
    return DomainBest(columns[place], confidence, domain.sum(axis=1, dtype=np.float64))


class GZSLCombiner(BaseEstimator, ABC):  # type: ignore[misc, unused-ignore]  # scikit-learn is untyped
    """Decides between the best seen and the best unseen class of each sample by a threshold.

    Within the seen classes, and within the unseen ones, no threshold changes the order. So a sample has one critical
    threshold, up to which it is given its best seen class and above which its best unseen one.

    Attributes:
        threshold_: the threshold in use, chosen by `tune`.
        tuned_acc_h_: harmonic mean at the chosen setting on the validation samples.
    """

    thresholds: Sequence[float] | None
    threshold_: float
    tuned_acc_h_: float

    def tune(self, validation: ExpertPredictions) -> Self:
        """Choose the settings with the best harmonic mean on samples that no expert was trained on.

        Args:
            validation: labelled predictions, of held-out samples of seen classes and of classes that the experts were
                not trained on; never of the classes to be tested.

        Raises:
            ValueError: no labels, or samples of only seen or only unseen classes.
        """
        self._fit(validation)
        setting, curve = max(self._curves(validation, self.thresholds), key=lambda pair: pair[1].acc_h[pair[1].best])
        for name, value in setting.items():
            setattr(self, name, value)
        self.threshold_ = float(curve.thresholds[curve.best])
        self.tuned_acc_h_ = float(curve.acc_h[curve.best])
        last = len(curve.thresholds) - 1
        if not curve.is_complete and last and curve.best in (0, last):
            edge = "highest" if curve.best else "lowest"
            warnings.warn(
                f"the best threshold, {self.threshold_:g}, is the {edge} of the range: widen the range, or leave "
                "thresholds at None",
                stacklevel=2,
            )
        return self

    def predict(self, predictions: ExpertPredictions) -> Int[np.ndarray, " samples"]:
        """Return a class, as a column, for each sample.

        Raises:
            NotFittedError: not tuned yet.
        """
        self._check_tuned()
        seen, unseen = self._domains(predictions)
        is_unseen = self._critical(predictions, seen, unseen) < self.threshold_
        return np.where(is_unseen, unseen.column, seen.column)

    def evaluate(self, predictions: ExpertPredictions) -> dict[str, float]:
        """Accuracies at the chosen threshold, and over all thresholds.

        Returns:
            ``acc_tr``, ``acc_ts`` and ``acc_h`` at the chosen threshold; ``ausuc``; and ``best_acc_h``, the harmonic
            mean at the best threshold for these very samples, which tuning on others can but come near.

        Raises:
            NotFittedError: not tuned yet.
            ValueError: no labels, or samples of only seen or only unseen classes.
        """
        self._check_tuned()
        chosen, everything = self.curve(predictions, [self.threshold_]), self.curve(predictions)
        return {
            "acc_tr": float(chosen.acc_tr[0]),
            "acc_ts": float(chosen.acc_ts[0]),
            "acc_h": float(chosen.acc_h[0]),
            "ausuc": everything.ausuc(),
            "best_acc_h": float(everything.acc_h[everything.best]),
        }

    def curve(self, predictions: ExpertPredictions, thresholds: ArrayLike | None = None) -> SeenUnseenCurve:
        """Accuracies over thresholds, at the other settings that were chosen.

        Args:
            predictions: labelled.
            thresholds: where; None for all at which anything changes.

        Raises:
            NotFittedError: not tuned yet.
            ValueError: no labels, or samples of only seen or only unseen classes.
        """
        self._check_tuned()
        seen, unseen = self._domains(predictions)
        return self._curve(predictions, seen, unseen, self._critical(predictions, seen, unseen), thresholds)

    def _check_tuned(self) -> None:
        if not hasattr(self, "threshold_"):
            raise NotFittedError(
                f"this {type(self).__name__} has no threshold yet: call tune with predictions on validation classes"
            )

    @staticmethod
    def _curve(
        predictions: ExpertPredictions,
        seen: DomainBest,
        unseen: DomainBest,
        critical: Float[np.ndarray, " samples"],
        thresholds: ArrayLike | None,
    ) -> SeenUnseenCurve:
        return seen_unseen_curve(
            critical,
            seen.column,
            unseen.column,
            predictions.known_labels,
            predictions.seen,
            predictions.unseen,
            thresholds,
        )

    def _fit(self, validation: ExpertPredictions) -> None:
        """Learn what `tune` needs before it compares settings."""

    @abstractmethod
    def _domains(self, predictions: ExpertPredictions) -> tuple[DomainBest, DomainBest]:
        """Best seen and best unseen class, of the experts that the method asks."""

    @abstractmethod
    def _critical(
        self, predictions: ExpertPredictions, seen: DomainBest, unseen: DomainBest
    ) -> Float[np.ndarray, " samples"]:
        """Critical thresholds at the chosen settings."""

    @abstractmethod
    def _curves(
        self, predictions: ExpertPredictions, thresholds: Any
    ) -> Iterator[tuple[Mapping[str, float | None], SeenUnseenCurve]]:
        """The settings to choose from, by the attributes that they set, each with its curve."""
