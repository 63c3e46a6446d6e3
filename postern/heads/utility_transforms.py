"""Maps from utilities to probabilities, each with a number or two that is fitted on validation data (reconstruction).

The paper says that an equation turns learned utilities back into "a new kind of probability estimation", with which
rules that need probabilities (sampling, minimum Bayes risk) do much better. That equation was not available to us.
These four maps are a reconstruction of what it must be like: for a fixed input they keep the order of the utilities,
and change the mass.

Paper: "Utility-Probability Duality of Neural Networks" (arXiv 2305.14859).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

RankLaw = Literal["zipf", "geometric"]
_GOLDEN = (math.sqrt(5) - 1) / 2


def mean_log_likelihood(transform: Callable[..., Tensor], validation: Sequence[Tensor]) -> float:
    """Mean log-probability that a transform gives to what is right: the default aim of `UtilityTransform.fit`.

    Args:
        transform: ``(*inputs) -> log-probabilities [*batch, outcomes]``.
        validation: the inputs, and last the indices ``[*batch]`` of the right outcomes.

    Raises:
        ValueError: not one index for each row.
    """
    *inputs, target = validation
    with torch.no_grad():
        log_probabilities = transform(*inputs)
    if target.shape != log_probabilities.shape[:-1] or target.is_floating_point() or not target.numel():
        raise ValueError(
            f"log-probabilities {list(log_probabilities.shape)} need integer targets of shape "
            f"{list(log_probabilities.shape[:-1])}, at least one; got {target.dtype} {list(target.shape)}"
        )
    return log_probabilities.gather(-1, target.long().unsqueeze(-1)).double().mean().item()


class UtilityTransform(nn.Module):
    """A map from utilities to log-probabilities, with one fitted number (reconstruction).

    Utilities may be logits or log-probabilities; minus infinity excludes an outcome and stays as it is. The fitted
    number is a buffer, so that a state dict holds it.

    Attributes:
        fitted: name of the buffer.
        grid: values that `fit` tries by default, from the gentlest map to the strongest.
    """

    fitted: ClassVar[str] = "exponent"
    grid: ClassVar[tuple[float, ...]] = (1.0,)

    def __init__(self, value: float) -> None:
        super().__init__()
        self._check(value)
        self.register_buffer(self.fitted, torch.tensor(float(value)))

    @property
    def value(self) -> float:
        """The fitted number."""
        return float(self.get_buffer(self.fitted))

    def set_value(self, value: float) -> Self:
        """Set the fitted number.

        Raises:
            ValueError: a number that makes no transform.
        """
        self._check(value)
        self.get_buffer(self.fitted).fill_(value)
        return self

    def fit(
        self,
        validation: Any,
        metric: Callable[[Self, Any], float] = mean_log_likelihood,
        *,
        grid: Sequence[float] | None = None,
        refinements: int | None = None,
    ) -> Self:
        """Set the number to what makes ``metric(self, validation)`` largest; of equals, the first of the grid.

        Maximum likelihood on clean held-out pairs is the default. To tune for a rule, give its own metric: one that
        decodes with the transform and returns the quality of what comes out. Validation data is neither training data,
        to which the network is adapted, nor test data.

        Args:
            validation: what the metric needs; by default a pair ``(utilities [*batch, outcomes], right [*batch])``.
            metric: ``(transform, validation) -> number``, larger is better; minus infinity is allowed.
            grid: values to try, ascending. A best value at an end of the grid asks for a longer one.
            refinements: further values to try between the neighbours of the best one, by golden section; two at
                least, if any. By default 30 for the likelihood, which is smooth, and 0 for other metrics, which may be
                noisy.

        Raises:
            ValueError: a grid that is empty, not ascending, or has impossible values, a metric that is NaN, or one
                that is minus infinity everywhere.
        """
        values = list(self.grid if grid is None else grid)
        if not values or any(after <= before for before, after in itertools.pairwise(values)):
            raise ValueError(f"a grid has at least one value and ascends, got {values}")
        for value in values:
            self._check(value)
        if refinements is None:
            refinements = 30 if metric is mean_log_likelihood else 0

        def score(value: float) -> float:
            result = float(metric(self.set_value(value), validation))
            if math.isnan(result):
                raise ValueError(f"the metric must be a number, got NaN at {value:g}")
            return result

        scores = [score(value) for value in values]
        best = max(range(len(values)), key=scores.__getitem__)
        if scores[best] == -math.inf:
            raise ValueError(f"the metric is minus infinity for every value of the grid {values}")
        chosen, highest = values[best], scores[best]
        low, high = values[max(best - 1, 0)], values[min(best + 1, len(values) - 1)]
        for found, at in _golden_section(score, low, high, refinements):
            if found > highest:
                chosen, highest = at, found
        return self.set_value(chosen)

    def extra_repr(self) -> str:
        """Return what the printed module says of its fitted number."""
        return f"{self.fitted}={self.value:.6g}"

    def _check(self, value: float) -> None:
        """Raise ValueError for a number that makes no transform."""
        raise NotImplementedError


class PowerTransform(UtilityTransform):
    """``P(y) ∝ P_w(y)^beta``: the Gibbs distribution of the utilities (reconstruction).

    ``beta = 1`` is the standard reading, above 1 mass moves to what is preferred; it is a temperature of ``1 / beta``.
    On tokens it is not the power of the distribution of sequences: each token is normalised on its own.

    Args:
        exponent: ``beta``, positive.

    Raises:
        ValueError: an exponent that is not positive and finite.
    """

    grid = (0.5, 0.7, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.3, 2.6, 3.0, 3.5, 4.0, 5.0, 7.0, 10.0)
    exponent: Tensor

    def __init__(self, exponent: float = 1.0) -> None:
        super().__init__(exponent)

    def forward(self, utilities: Float[Tensor, "*batch outcomes"]) -> Float[Tensor, "*batch outcomes"]:
        """Return log-probabilities.

        Raises:
            ValueError: utilities without outcomes, or not floating point.
        """
        check_utilities(utilities)
        return F.log_softmax(self.exponent * utilities, -1)

    def _check(self, value: float) -> None:
        if not 0 < value < math.inf:
            raise ValueError(f"an exponent is positive and finite, got {value}")


class DesmoothTransform(UtilityTransform):
    """``P(y) ∝ max(P_w(y) - floor, 0)``: takes the mass of uniform noise away (reconstruction).

    Label smoothing of ``epsilon`` over ``n`` outcomes, or targets that are random with probability ``epsilon``, leave
    every outcome a floor of ``epsilon / n``. Where both are there the floor is their sum, which has to be known or
    fitted. Outcomes below it become impossible and lose their order among each other.

    Args:
        floor: probability of each outcome that is noise, at least 0 and below 1. In a row where no outcome is above
            the floor, the most probable one takes all.

    Raises:
        ValueError: a floor outside [0, 1).
    """

    fitted = "floor"
    grid = (0.0, 3e-4, 6e-4, 0.001, 0.002, 0.003, 0.005, 0.007, 0.01, 0.013, 0.017, 0.022, 0.03, 0.05, 0.08, 0.12)
    floor: Tensor

    def __init__(self, floor: float = 0.0) -> None:
        super().__init__(floor)

    def forward(self, utilities: Float[Tensor, "*batch outcomes"]) -> Float[Tensor, "*batch outcomes"]:
        """Return log-probabilities, minus infinity for what is below the floor.

        Raises:
            ValueError: utilities without outcomes, or not floating point.
        """
        check_utilities(utilities)
        log_probabilities = F.log_softmax(utilities, -1)
        log_floor = self.floor.log()
        above = log_probabilities > log_floor
        best = log_probabilities == log_probabilities.amax(-1, keepdim=True)
        kept = above | (best & ~above.any(-1, keepdim=True))
        # log(P - floor) = log P + log(1 - floor / P), exact where the floor is 0; twice masked for finite gradients
        share = torch.where(above, log_floor - log_probabilities.masked_fill(~above, 0.0), -torch.inf).exp()
        share = share.clamp_max(1 - torch.finfo(share.dtype).eps)
        excess = log_probabilities.masked_fill(~kept, 0.0) + torch.log1p(-share)
        return F.log_softmax(excess.masked_fill(~kept, -torch.inf), -1)

    def _check(self, value: float) -> None:
        if not 0 <= value < 1:
            raise ValueError(f"a floor is a probability in [0, 1), got {value}")


class RankTransform(UtilityTransform):
    """``P(y) ∝ r(rank of u(y))``: uses the order of the utilities and nothing else (reconstruction).

    With rank 1 for the best, and equal ranks for equal utilities: ``r = rank^-s`` (Zipf) or ``r = exp(-s rank)``
    (geometric). Nothing flows back through ranks: the output has no gradient.

    Args:
        exponent: ``s``, not negative.
        law: "zipf" or "geometric".

    Raises:
        ValueError: an exponent that is negative or not finite, or an unknown law.
    """

    grid = (0.5, 1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0, 5.5, 6.0, 7.0, 8.0, 10.0, 12.0)
    exponent: Tensor

    def __init__(self, exponent: float = 1.0, law: RankLaw = "zipf") -> None:
        if law not in ("zipf", "geometric"):
            raise ValueError(f"law must be zipf or geometric, got {law!r}")
        super().__init__(exponent)
        self.law: RankLaw = law

    def forward(self, utilities: Float[Tensor, "*batch outcomes"]) -> Float[Tensor, "*batch outcomes"]:
        """Return log-probabilities.

        Raises:
            ValueError: utilities without outcomes, or not floating point.
        """
        check_utilities(utilities)
        utilities = utilities.detach().contiguous()
        ascending = utilities.sort(-1).values
        better = (utilities.shape[-1] - torch.searchsorted(ascending, utilities, right=True)).to(utilities.dtype)
        log_law = -self.exponent * (better.log1p() if self.law == "zipf" else better)
        return F.log_softmax(log_law.masked_fill(utilities == -torch.inf, -torch.inf), -1)

    def extra_repr(self) -> str:
        """Return what the printed module says of its settings."""
        return f"{super().extra_repr()}, law={self.law!r}"

    def _check(self, value: float) -> None:
        if not 0 <= value < math.inf:
            raise ValueError(f"an exponent is at least 0 and finite, got {value}")


class CandidateSetTransform(UtilityTransform):
    """``P(y) ∝ exp(beta u(x, y) / |y|^gamma)`` over a set of candidate outputs (reconstruction).

    The one map for complete sequences: candidates come from sampling or beam search, and each stands in the set once
    (see `repeats`), else it would count several times.

    Args:
        exponent: ``beta``, positive.
        length_power: ``gamma``, not negative; 0 takes lengths as they come, 1 the mean over the tokens.

    Raises:
        ValueError: an exponent that is not positive and finite, or a length power that is negative or not finite.
    """

    grid = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0)
    exponent: Tensor
    length_power: Tensor

    def __init__(self, exponent: float = 1.0, length_power: float = 0.0) -> None:
        super().__init__(exponent)
        self.register_buffer("length_power", torch.tensor(0.0))
        self.set_length_power(length_power)

    def set_length_power(self, length_power: float) -> Self:
        """Set ``gamma``.

        Raises:
            ValueError: it is negative or not finite.
        """
        if not 0 <= length_power < math.inf:
            raise ValueError(f"a length power is at least 0 and finite, got {length_power}")
        self.length_power.fill_(length_power)
        return self

    def fit(
        self,
        validation: Any,
        metric: Callable[[Self, Any], float] = mean_log_likelihood,
        *,
        grid: Sequence[float] | None = None,
        refinements: int | None = None,
        length_powers: Sequence[float] = (0.0, 0.5, 1.0),
    ) -> Self:
        """Set both numbers: the exponent as in `UtilityTransform.fit`, for each of some length powers.

        Args:
            validation: by default ``(utilities [*batch, candidates], lengths [*batch, candidates], right [*batch])``.
            metric: see `UtilityTransform.fit`.
            grid: of the exponent.
            refinements: see `UtilityTransform.fit`.
            length_powers: values of ``gamma`` to try.

        Raises:
            ValueError: see `UtilityTransform.fit`; or no length powers.
        """
        if not length_powers:
            raise ValueError("a fit needs at least one length power, got none")
        found = []
        for length_power in length_powers:
            self.set_length_power(length_power)
            super().fit(validation, metric, grid=grid, refinements=refinements)
            found.append((float(metric(self, validation)), self.value, length_power))
        _, exponent, length_power = max(found, key=lambda entry: entry[0])
        return self.set_length_power(length_power).set_value(exponent)

    def forward(
        self,
        utilities: Float[Tensor, "*batch candidates"],
        lengths: Int[Tensor, "*batch candidates"],
    ) -> Float[Tensor, "*batch candidates"]:
        """Return the log-probabilities of the candidates.

        Args:
            utilities: of each candidate, such as `UtilityView.utilities` gives them; minus infinity leaves one out.
            lengths: tokens of each candidate, such as `sequence_lengths` counts them; less than one counts as one.

        Raises:
            ValueError: utilities without candidates or not floating point, or lengths of another shape.
        """
        check_utilities(utilities)
        if lengths.shape != utilities.shape:
            raise ValueError(f"utilities {list(utilities.shape)} need as many lengths, got {list(lengths.shape)}")
        scale = lengths.to(utilities.dtype).clamp_min(1.0) ** self.length_power
        return F.log_softmax(self.exponent * utilities / scale, -1)

    def extra_repr(self) -> str:
        """Return what the printed module says of its fitted numbers."""
        return f"{super().extra_repr()}, length_power={float(self.length_power):.6g}"

    def _check(self, value: float) -> None:
        if not 0 < value < math.inf:
            raise ValueError(f"an exponent is positive and finite, got {value}")


def repeats(candidates: Int[Tensor, "*batch candidates time"]) -> Bool[Tensor, "*batch candidates"]:
    """Mark the candidates that stand earlier in their set already: exclude them before `CandidateSetTransform`.

    Args:
        candidates: sequences, those that ended filled up with the same token.

    Raises:
        ValueError: fewer than two dimensions.
    """
    if candidates.dim() < 2:
        raise ValueError(f"candidates are [*batch, candidates, time], got {list(candidates.shape)}")
    equal = (candidates.unsqueeze(-2) == candidates.unsqueeze(-3)).all(-1)
    return equal.tril(-1).any(-1)


def _golden_section(score: Callable[[float], float], low: float, high: float, steps: int) -> list[tuple[float, float]]:
    """Narrow a bracket around a maximum by so many scores; return them, each with its value."""
    found: list[tuple[float, float]] = []
    if steps < 2 or high <= low:
        return found

    def look(value: float) -> float:
        found.append((score(value), value))
        return found[-1][0]

    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    at_left, at_right = look(left), look(right)
    for _ in range(steps - 2):
        if at_left >= at_right:
            high, right, at_right = right, left, at_left
            left = high - _GOLDEN * (high - low)
            at_left = look(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + _GOLDEN * (high - low)
            at_right = look(right)
    return found


def check_utilities(utilities: Tensor) -> None:
    """Check that there is something to transform.

    Raises:
        ValueError: utilities without outcomes, or not floating point.
    """
    if utilities.dim() == 0 or utilities.shape[-1] == 0:
        raise ValueError(f"utilities need at least one outcome, got the shape {list(utilities.shape)}")
    if not utilities.is_floating_point():
        raise ValueError(f"utilities must be floating point, got {utilities.dtype}")
