"""COSMO: combine a seen-class and an unseen-class expert by a gate, each smoothed by as much as the gate doubts it.

Paper: Adaptive Confidence Smoothing for Generalized Zero-Shot Learning (arXiv 1812.09903).

Difference: the threshold of the gate is found exactly. Each sample changes from its best seen to its best unseen class
at one threshold, which has a closed form, so that a sort gives the accuracies at every threshold; the paper's code
combines all probabilities anew at each point of a grid and then refines the grid.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import ArrayLike
from scipy.special import expit
from sklearn.base import clone

from postern.anomaly.confidence_gate import ConfidenceGate, Gate
from postern.anomaly.expert_predictions import ExpertPredictions
from postern.anomaly.gzsl_combiner import DomainBest, GZSLCombiner, domain_best
from postern.anomaly.seen_unseen_curve import SeenUnseenCurve

Mode = Literal["adaptive", "total", "constant", "hard"]

GATE_TEMPERATURES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Temperatures of the gate that tuning tries."""
SMOOTHINGS = tuple(k / 20 for k in range(1, 21))
"""Shares of the expert's own answer that tuning tries in constant smoothing."""

_EPSILON = float(np.finfo(np.float64).eps)
_LARGEST_LOGIT = -math.log(_EPSILON)  # of a gate's probability that is kept within [eps, 1 - eps]


def unseen_probability(
    score_seen: Float[np.ndarray, " samples"], threshold: float, temperature: float
) -> Float[np.ndarray, " samples"]:
    """``p_U = sigmoid((threshold - q) / T)``, kept within ``[eps, 1 - eps]`` of float64.

    Args:
        score_seen: ``q``, higher where the class is more likely a seen one.
        threshold: above it a sample is more likely seen.
        temperature: ``T``, positive; the smaller, the harder the decision.

    Raises:
        ValueError: a temperature that is not positive.
    """
    _check_temperature(temperature)
    probability = expit((threshold - np.asarray(score_seen, dtype=np.float64)) / temperature)
    return np.asarray(probability.clip(_EPSILON, 1 - _EPSILON))


def gzsl_combine(
    seen_expert: Float[np.ndarray, "samples classes"],
    zero_shot: Float[np.ndarray, "samples classes"],
    p_unseen: Float[np.ndarray, " samples"],
    seen: ArrayLike,
    unseen: ArrayLike,
    mode: Mode = "adaptive",
    smoothing: float | None = None,
) -> Float[np.ndarray, "samples classes"]:
    r"""Scores of all classes from two experts and a gate; the class of a sample is their ``argmax``.

    With ``p_U`` from the gate, ``p_S = 1 - p_U``, and ``P'`` an expert's probabilities divided by their sum over its
    domain::

        total:     y in U: p_U P'_ZS(y)                               y in S: p_S P'_S(y)
        adaptive:  y in U: p_U (P_ZS(y) + p_S / |U|)                  y in S: p_S (P_S(y) + p_U / |S|)
        constant:  y in U: p_U (g P'_ZS(y) + (1 - g) / |U|)           y in S: p_S (g P'_S(y) + (1 - g) / |S|)
        hard:      total, with p_U = 1 where it is above 1/2, else 0

    In the adaptive form an expert is smoothed towards uniform by as much as the gate doubts that the sample is its own,
    so that it cannot win there by one over-confident class. Its probabilities are not divided by their sum: what the
    zero-shot expert gives to seen classes counts against its unseen ones. The scores do not sum to one.

    Args:
        seen_expert: probabilities of the expert for seen classes.
        zero_shot: probabilities of the zero-shot expert.
        p_unseen: the gate's probability that the class is an unseen one, see `unseen_probability`.
        seen: columns of the classes with training images.
        unseen: columns of the classes without.
        mode: how to combine.
        smoothing: ``g``, the share of the expert's own answer, in (0, 1]; for constant smoothing only.

    Returns:
        Scores at least 0; 0 for columns in neither list.

    Raises:
        ValueError: sizes that do not agree, probabilities of the gate outside [0, 1], an unknown mode, or a smoothing
            that is missing, not in (0, 1], or not asked for.
    """
    seen, unseen = np.asarray(seen), np.asarray(unseen)
    _check_mode(mode, smoothing)
    p_unseen = np.asarray(p_unseen, dtype=np.float64)
    if np.shape(seen_expert) != np.shape(zero_shot) or p_unseen.shape != np.shape(zero_shot)[:1]:
        raise ValueError(
            "the experts' probabilities have equal shapes and the gate's a number a row, got "
            f"{np.shape(seen_expert)}, {np.shape(zero_shot)} and {p_unseen.shape}"
        )
    if not ((p_unseen >= 0) & (p_unseen <= 1)).all():
        raise ValueError(f"p_unseen lies in [0, 1], got {p_unseen.min():g} to {p_unseen.max():g}")
    p_u = (p_unseen > 0.5).astype(np.float64)[:, None] if mode == "hard" else p_unseen[:, None]
    scores = np.zeros(np.shape(zero_shot))
    for probabilities, columns, own, other in ((zero_shot, unseen, p_u, 1 - p_u), (seen_expert, seen, 1 - p_u, p_u)):
        domain = np.asarray(probabilities[:, columns], dtype=np.float64)
        if mode == "adaptive":
            domain = domain + other / len(columns)
        else:
            domain = _normalised(domain, domain.sum(axis=1, keepdims=True), len(columns))
        if mode == "constant":
            assert smoothing is not None
            domain = smoothing * domain + (1 - smoothing) / len(columns)
        scores[:, columns] = own * domain
    return scores


def critical_thresholds(
    seen: DomainBest,
    unseen: DomainBest,
    score_seen: Float[np.ndarray, " samples"],
    num_seen: int,
    num_unseen: int,
    temperature: float,
    mode: Mode = "adaptive",
    smoothing: float | None = None,
) -> Float[np.ndarray, " samples"]:
    r"""The gate's threshold at which each sample changes from its best seen to its best unseen class.

    With ``a`` and ``b`` the best confidences among unseen and seen classes (as the mode has them) and
    ``d = 1/|U| - 1/|S|`` (0 but for adaptive smoothing), the unseen class wins where

    ::

        p (a + (1 - p)/|U|) > (1 - p)(b + p/|S|),    that is    -b + p (a + b + d) - p^2 d > 0.

    The left side goes from ``-b`` at ``p = 0`` to ``a`` at ``p = 1`` and is quadratic, so it has one root ``p*``
    between them. As ``p = sigmoid((threshold - q) / T)``, the sample changes at ``q + T log(p* / (1 - p*))``, where

    ::

        p* = 2b / (a + b + d + r),   1 - p* = 2a / (a + b - d + r),   r^2 = a^2 + 2a(b + d) + (b - d)^2.

    Hard gating changes at ``q``.

    Args:
        seen: best seen classes, of the seen expert.
        unseen: best unseen classes, of the zero-shot expert.
        score_seen: ``q`` of the gate.
        num_seen: ``|S|``.
        num_unseen: ``|U|``.
        temperature: ``T`` of the gate; without effect on hard gating.
        mode: how the experts are combined, see `gzsl_combine`.
        smoothing: ``g`` of constant smoothing.

    Returns:
        Thresholds; infinite where not even a probability of ``eps`` or ``1 - eps`` makes the sample change.

    Raises:
        ValueError: an unknown mode, a temperature that is not positive, or a smoothing as in `gzsl_combine`.
    """
    _check_mode(mode, smoothing)
    q = np.asarray(score_seen, dtype=np.float64)
    if mode == "hard":
        return q
    _check_temperature(temperature)
    a, b, d = unseen.confidence, seen.confidence, 0.0
    if mode == "adaptive":
        d = 1 / num_unseen - 1 / num_seen
    else:
        a, b = _normalised(a, unseen.mass, num_unseen), _normalised(b, seen.mass, num_seen)
    if mode == "constant":
        assert smoothing is not None
        a = smoothing * a + (1 - smoothing) / num_unseen
        b = smoothing * b + (1 - smoothing) / num_seen
    logit = _log_odds(a, b, d)
    return np.where(np.abs(logit) < _LARGEST_LOGIT, q + temperature * logit, np.copysign(np.inf, logit))


class COSMOClassifier(GZSLCombiner):
    r"""A gate, and two experts' predictions combined by it.

    `tune` fits the gate on two thirds of the validation predictions (every third sample is left out) and chooses the
    gate's threshold and temperature by the harmonic mean on all of them. Nothing is fitted again for other classes:
    `predict` takes predictions of experts that were trained on more classes, for other unseen ones.

    Args:
        gate: scores how likely a class is a seen one; `ConfidenceGate` if None. It is copied, not changed.
        mode: how to combine, see `gzsl_combine`.
        thresholds: thresholds of the gate to choose from; None for all at which a validation sample changes.
        temperatures: temperatures of the gate to choose from.
        smoothings: shares to choose from in constant smoothing.

    Attributes:
        gate_: the fitted gate.
        threshold_: the chosen threshold.
        gate_temperature_: the chosen temperature of the gate.
        smoothing_: the chosen share in constant smoothing, else None.
        tuned_acc_h_: harmonic mean at these on the validation samples.
    """

    def __init__(
        self,
        gate: Gate | None = None,
        mode: Mode = "adaptive",
        thresholds: Sequence[float] | None = None,
        temperatures: Sequence[float] = GATE_TEMPERATURES,
        smoothings: Sequence[float] = SMOOTHINGS,
    ) -> None:
        self.gate = gate
        self.mode = mode
        self.thresholds = thresholds
        self.temperatures = temperatures
        self.smoothings = smoothings

    def p_unseen(self, predictions: ExpertPredictions) -> Float[np.ndarray, " samples"]:
        """The gate's probability that each sample is of an unseen class, at the chosen threshold and temperature.

        Raises:
            NotFittedError: not tuned yet.
        """
        self._check_tuned()
        return unseen_probability(self.gate_.score_seen(predictions), self.threshold_, self.gate_temperature_)

    def scores(self, predictions: ExpertPredictions) -> Float[np.ndarray, "samples classes"]:
        """Scores of all classes, see `gzsl_combine`; their ``argmax`` is `predict`.

        Raises:
            NotFittedError: not tuned yet.
        """
        return gzsl_combine(
            predictions.seen_expert,
            predictions.zero_shot,
            self.p_unseen(predictions),
            predictions.seen,
            predictions.unseen,
            self.mode,
            self.smoothing_,
        )

    def _fit(self, validation: ExpertPredictions) -> None:
        if not len(self.temperatures) or not len(self.smoothings):
            raise ValueError("tuning needs at least one temperature and one smoothing to choose from, got none")
        self.gate_: Gate = clone(ConfidenceGate() if self.gate is None else self.gate)
        self.gate_.fit(validation.take(gate_training_rows(len(validation))))

    def _domains(self, predictions: ExpertPredictions) -> tuple[DomainBest, DomainBest]:
        return domain_best(predictions.seen_expert, predictions.seen), domain_best(
            predictions.zero_shot, predictions.unseen
        )

    def _critical(
        self, predictions: ExpertPredictions, seen: DomainBest, unseen: DomainBest
    ) -> Float[np.ndarray, " samples"]:
        return critical_thresholds(
            seen,
            unseen,
            self.gate_.score_seen(predictions),
            len(predictions.seen),
            len(predictions.unseen),
            self.gate_temperature_,
            self.mode,
            self.smoothing_,
        )

    def _curves(
        self, predictions: ExpertPredictions, thresholds: Any
    ) -> Iterator[tuple[Mapping[str, float | None], SeenUnseenCurve]]:
        seen, unseen = self._domains(predictions)
        q = self.gate_.score_seen(predictions)
        sizes = len(predictions.seen), len(predictions.unseen)
        # the temperature of a hard gate changes nothing
        for temperature in self.temperatures[:1] if self.mode == "hard" else self.temperatures:
            for smoothing in self.smoothings if self.mode == "constant" else (None,):
                critical = critical_thresholds(seen, unseen, q, *sizes, temperature, self.mode, smoothing)
                curve = self._curve(predictions, seen, unseen, critical, thresholds)
                yield {"gate_temperature_": temperature, "smoothing_": smoothing}, curve


def gate_training_rows(num_samples: int) -> Bool[np.ndarray, " samples"]:
    """Which validation samples the gate is fitted on: all but those whose index three divides."""
    return np.asarray(np.arange(num_samples) % 3 != 0)


def _log_odds(
    a: Float[np.ndarray, " samples"], b: Float[np.ndarray, " samples"], d: float
) -> Float[np.ndarray, " samples"]:
    """``log(p* / (1 - p*))`` of `critical_thresholds`, with no difference of nearly equal numbers."""
    if d < 0:  # the same with the domains exchanged
        return -_log_odds(b, a, -d)
    tiny = np.finfo(np.float64).tiny
    a, b = np.maximum(a, tiny), np.maximum(b, tiny)
    r = np.sqrt(a * a + 2 * a * (b + d) + (b - d) ** 2)
    p = 2 * b / (a + b + d + r)
    rest = a + b - d  # below 0, (rest + r) (r - rest) = 4 a d helps
    complement = np.where(rest >= 0, 2 * a / (np.maximum(rest, 0) + r), (r - rest) / (2 * d) if d else 1.0)
    return np.asarray(np.log(p) - np.log(complement))


def _normalised(
    values: Float[np.ndarray, "*shape"], mass: Float[np.ndarray, "*shape"], num_classes: int
) -> Float[np.ndarray, "*shape"]:
    """Probabilities divided by their domain's; uniform where an expert gives the whole domain nothing."""
    uniform = np.full_like(values, 1 / num_classes)
    return np.asarray(np.divide(values, mass, out=uniform, where=np.broadcast_to(mass > 0, values.shape)))


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"the gate's temperature is positive, got {temperature}")


def _check_mode(mode: str, smoothing: float | None) -> None:
    if mode not in get_args(Mode):
        raise ValueError(f"experts are combined by {', '.join(map(repr, get_args(Mode)))}, got {mode!r}")
    if (mode == "constant") != (smoothing is not None):
        raise ValueError(f"constant smoothing, and it alone, has a smoothing; got {mode!r} with {smoothing}")
    if smoothing is not None and not 0 < smoothing <= 1:
        raise ValueError(f"smoothing lies in (0, 1], got {smoothing}")
