"""Is it of a class with training images? A gate that looks at the experts' confidences and not at which class has them.

Paper: Adaptive Confidence Smoothing for Generalized Zero-Shot Learning (arXiv 1812.09903), section 4.2.

Difference: the temperature is applied among the seen classes alone. The paper's code includes classes that the expert
does not know, each with a probability of 1e-12, which at a temperature of 3 weighs 1e-4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
from jaxtyping import Float
from scipy.special import softmax
from sklearn.base import BaseEstimator
from sklearn.linear_model import LogisticRegression
from sklearn.utils.validation import check_is_fitted

from postern.anomaly.expert_predictions import ExpertPredictions

# As in the paper's code: keeps the logarithm of a probability of zero finite.
_EPSILON = 1e-12


@runtime_checkable
class Gate(Protocol):
    """Scores samples by how likely their class is a seen one; higher is more likely seen."""

    def fit(self, predictions: ExpertPredictions, labels: Any = None) -> Self:
        """Learn from labelled predictions of samples of seen and unseen classes."""
        ...

    def score_seen(self, predictions: ExpertPredictions) -> Float[np.ndarray, " samples"]:
        """Return one number a sample."""
        ...


def soften(
    probabilities: Float[np.ndarray, "samples classes"], temperature: float
) -> Float[np.ndarray, "samples classes"]:
    """``softmax(log(p + 1e-12) / T)``: probabilities as if their logits had been divided by the temperature.

    Args:
        probabilities: rows that sum to one.
        temperature: ``T``, positive; above one it evens the probabilities out.

    Raises:
        ValueError: a temperature that is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"a temperature is positive, got {temperature}")
    return np.asarray(softmax(np.log(np.asarray(probabilities, dtype=np.float64) + _EPSILON) / temperature, axis=1))


def sorted_confidences(probabilities: Float[np.ndarray, "samples classes"], k: int) -> Float[np.ndarray, "samples k"]:
    """The ``k`` largest of each row, in descending order.

    Raises:
        ValueError: ``k`` below one, or more than there are classes.
    """
    classes = probabilities.shape[1]
    if not 1 <= k <= classes:
        raise ValueError(f"the number of confidences lies between 1 and the {classes} classes, got {k}")
    return np.asarray(-np.sort(np.partition(-probabilities, k - 1, axis=1)[:, :k], axis=1))


class ConfidenceGate(BaseEstimator):  # type: ignore[misc, unused-ignore]  # scikit-learn is untyped
    r"""A logistic regression on sorted confidences, so that it can be fitted on some classes and used on others.

    ::

        f(x) = [top k of P_ZS(. | x) over unseen classes; top k of softmax(log P_S(. | x) / T) over seen classes]
        q(x) = sigmoid(w . f(x) + b)

    Args:
        top_seen: confidences of the seen expert; fewer where there are fewer seen classes.
        top_unseen: confidences of the zero-shot expert; fewer where there are fewer unseen classes.
        temperatures: ``T``, one block of the seen expert's confidences each.
        use_zero_shot: whether the zero-shot expert's confidences count.
        C: inverse of the regression's penalty.

    Attributes:
        regression_: the fitted regression.
        top_seen_: confidences of the seen expert that it was fitted on.
        top_unseen_: confidences of the zero-shot expert that it was fitted on.
    """

    def __init__(
        self,
        top_seen: int = 5,
        top_unseen: int = 5,
        temperatures: Sequence[float] = (3.0,),
        use_zero_shot: bool = True,
        C: float = 1.0,
    ) -> None:
        self.top_seen = top_seen
        self.top_unseen = top_unseen
        self.temperatures = temperatures
        self.use_zero_shot = use_zero_shot
        self.C = C

    def fit(self, predictions: ExpertPredictions, labels: Any = None) -> Self:
        """Learn from experts' predictions on samples that neither expert was trained on.

        Args:
            predictions: labelled, of seen and of unseen classes.
            labels: not used; the predictions have them.

        Raises:
            ValueError: no temperatures or one that is not positive, fewer than one confidence, or samples of only
                seen or only unseen classes.
        """
        is_seen = predictions.is_seen
        if is_seen.all() or not is_seen.any():
            raise ValueError(
                f"the gate learns from samples of both kinds, got {is_seen.sum()} of seen classes among {len(is_seen)}"
            )
        if not len(self.temperatures):
            raise ValueError("the gate needs at least one temperature, got none")
        self.top_seen_ = min(self.top_seen, len(predictions.seen))
        self.top_unseen_ = min(self.top_unseen, len(predictions.unseen))
        self.regression_ = LogisticRegression(C=self.C, max_iter=1000).fit(self._features(predictions), is_seen)
        return self

    def score_seen(self, predictions: ExpertPredictions) -> Float[np.ndarray, " samples"]:
        """``q(x)``, the probability that the sample's class is a seen one.

        Raises:
            NotFittedError: not fitted yet.
            ValueError: fewer classes than confidences that the gate was fitted on.
        """
        check_is_fitted(self, "regression_")
        return np.asarray(self.regression_.predict_proba(self._features(predictions))[:, 1])

    def _features(self, predictions: ExpertPredictions) -> Float[np.ndarray, "samples features"]:
        for name, wanted, classes in (
            ("seen", self.top_seen_, predictions.seen),
            ("unseen", self.top_unseen_, predictions.unseen),
        ):
            if wanted > len(classes):
                raise ValueError(
                    f"the gate was fitted on the top {wanted} confidences of {name} classes, and here are "
                    f"{len(classes)}: fit it with top_{name}={len(classes)}"
                )
        seen = predictions.seen_expert[:, predictions.seen]
        blocks = [sorted_confidences(soften(seen, temperature), self.top_seen_) for temperature in self.temperatures]
        if self.use_zero_shot:
            blocks.insert(0, sorted_confidences(predictions.zero_shot[:, predictions.unseen], self.top_unseen_))
        return np.concatenate(blocks, axis=1)


class MaxProbGate(BaseEstimator):  # type: ignore[misc, unused-ignore]  # scikit-learn is untyped
    """``q(x) = max_c softmax(log P_S(. | x) / T)_c``: the seen expert's largest probability; nothing is learned.

    Args:
        temperature: ``T``, positive.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        self.temperature = temperature

    def fit(self, predictions: ExpertPredictions, labels: Any = None) -> Self:
        """Nothing to learn; there for the protocol."""
        return self

    def score_seen(self, predictions: ExpertPredictions) -> Float[np.ndarray, " samples"]:
        """Return the largest probability of each sample.

        Raises:
            ValueError: a temperature that is not positive.
        """
        return np.asarray(soften(predictions.seen_expert[:, predictions.seen], self.temperature).max(axis=1))
