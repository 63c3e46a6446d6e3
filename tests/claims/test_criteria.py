"""Criteria: worked by hand, against SciPy and NumPy, by simulation, and by what must not change a verdict."""

import math
import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from postern.claims import AllOf, AtLeast, AtMost, Criterion, Difference, Given, Metrics, Ratio, Slope, Verdict, Within
from postern.claims.criteria import mean_interval

HOLDS, REFUTED, INCONCLUSIVE = Verdict.HOLDS, Verdict.REFUTED, Verdict.INCONCLUSIVE
# Student's quantile at 0.975; with 2 degrees of freedom it has a closed form.
T_2 = 0.95 * math.sqrt(2 / (1 - 0.95**2))


def seeds(**metrics: Sequence[float]) -> list[Metrics]:
    """Metrics by name, each with one value a seed, as the criteria read them: one mapping a seed."""
    return [dict(zip(metrics, values, strict=True)) for values in zip(*metrics.values(), strict=True)]


numbers = st.floats(-1e3, 1e3, allow_nan=False).map(lambda value: round(value, 3))
samples = st.lists(numbers, min_size=2, max_size=6)
pairs = st.lists(st.tuples(numbers, numbers), min_size=2, max_size=6)


class TestInterval:
    def test_worked_by_hand(self) -> None:
        mean, low, high = mean_interval([1.0, 2.0, 3.0])
        half = T_2 * 1.0 / math.sqrt(3)
        assert mean == 2.0
        assert (low, high) == pytest.approx((2 - half, 2 + half), rel=1e-9)

    def test_of_one_value_is_unknown(self) -> None:
        assert mean_interval([5.0]) == (5.0, -math.inf, math.inf)

    def test_of_equal_values_is_a_point(self) -> None:
        assert mean_interval([0.1, 0.1, 0.1]) == pytest.approx((0.1, 0.1, 0.1), abs=1e-15)

    @pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf, 1.0], [1e308, 1e308], [1e200, -1e200]])
    def test_refuses_what_has_no_interval(self, values: list[float]) -> None:
        with pytest.raises(ValueError, match="an interval needs"):
            mean_interval(values)

    @pytest.mark.parametrize("count", [3, 5])
    def test_covers_the_truth_in_95_of_100_runs(self, count: int) -> None:
        draws = np.random.default_rng(count).normal(loc=0.7, scale=2.0, size=(10_000, count))
        covered = sum(low <= 0.7 <= high for _, low, high in map(mean_interval, draws.tolist()))
        assert covered / len(draws) == pytest.approx(0.95, abs=0.01)

    @given(samples)
    def test_agrees_with_scipy(self, values: list[float]) -> None:
        assume(np.std(values) > 1e-6)
        expected = stats.t.interval(0.95, len(values) - 1, loc=np.mean(values), scale=stats.sem(values))
        assert mean_interval(values)[1:] == pytest.approx(expected, rel=1e-9, abs=1e-9)


class TestVerdict:
    """The interval of 1, 2, 3 is 2 +- 2.484."""

    @pytest.mark.parametrize(
        ("criterion", "verdict"),
        [
            (AtLeast("x", -0.5), HOLDS),
            (AtLeast("x", 0.0), INCONCLUSIVE),
            (AtLeast("x", 4.0), INCONCLUSIVE),
            (AtLeast("x", 4.5), REFUTED),
            (AtMost("x", 4.5), HOLDS),
            (AtMost("x", 4.0), INCONCLUSIVE),
            (AtMost("x", 0.0), INCONCLUSIVE),
            (AtMost("x", -0.5), REFUTED),
            (Within("x", -0.5, 4.5), HOLDS),
            (Within("x", 0.0, 4.5), INCONCLUSIVE),
            (Within("x", -0.5, 4.0), INCONCLUSIVE),
            (Within("x", 1.9, 2.1), INCONCLUSIVE),
            (Within("x", 4.5, 9.0), REFUTED),
            (Within("x", -9.0, -0.5), REFUTED),
        ],
        ids=str,
    )
    def test_follows_from_the_interval_alone(self, criterion: Criterion, verdict: Verdict) -> None:
        judgement = criterion.judge(seeds(x=[1.0, 2.0, 3.0]))
        half = T_2 / math.sqrt(3)
        assert judgement.verdict is verdict
        assert judgement.estimate == 2.0
        assert judgement.interval == pytest.approx((2 - half, 2 + half))
        assert judgement.criterion == criterion.describe()

    @pytest.mark.parametrize(
        "criterion",
        [
            AtLeast("x", -1e9),
            AtMost("x", 1e9),
            Within("x", -1e9, 1e9),
            AtLeast("x", 1e9),
            Difference("x", "y", at_least=-1e9),
            Ratio("x", "y", at_most=1e9),
            Slope({1: "x", 2: "y"}, at_least=-1e9, at_most=1e9),
            AllOf(AtLeast("x", 0.0), AtMost("y", 9.0)),
        ],
        ids=str,
    )
    def test_of_one_seed_is_inconclusive(self, criterion: Criterion) -> None:
        assert criterion.judge(seeds(x=[1.0], y=[2.0])).verdict is INCONCLUSIVE

    def test_touching_the_bound_passes(self) -> None:
        assert AtLeast("x", 1.0).judge(seeds(x=[1.0, 1.0])).verdict is HOLDS
        assert AtMost("x", 1.0).judge(seeds(x=[1.0, 1.0])).verdict is HOLDS

    def test_errs_in_no_more_than_5_of_200_runs_at_the_bound(self) -> None:
        """Where the truth is the bound itself, each wrong verdict comes up in 2.5 % of runs, else inconclusive."""
        draws = np.random.default_rng(0).normal(loc=1.0, scale=0.3, size=(10_000, 5))
        verdicts = [AtLeast("x", 1.0).judge(seeds(x=draw)).verdict for draw in draws.tolist()]
        for verdict in (HOLDS, REFUTED):
            assert verdicts.count(verdict) / len(verdicts) == pytest.approx(0.025, abs=0.005)

    @given(samples, numbers, numbers)
    def test_moves_one_way_with_the_bound(self, values: list[float], one: float, other: float) -> None:
        low, high = sorted((one, other))
        order = [REFUTED, INCONCLUSIVE, HOLDS]
        harder, easier = (AtLeast("x", bound).judge(seeds(x=values)).verdict for bound in (high, low))
        assert order.index(harder) <= order.index(easier)

    @given(samples, numbers, st.integers(-3, 3))
    def test_shifts_and_scales_with_the_unit(self, values: list[float], bound: float, power: int) -> None:
        criterion = AtLeast("x", bound).judge(seeds(x=values))
        assume(all(abs(edge - bound) > 1e-6 for edge in criterion.interval))
        scale = 2.0**power
        moved = AtLeast("x", bound * scale + 64.0).judge(seeds(x=[value * scale + 64.0 for value in values]))
        assert moved.verdict is criterion.verdict
        assert moved.estimate == pytest.approx(criterion.estimate * scale + 64.0)


class TestDifference:
    def test_worked_by_hand(self) -> None:
        """Differences 1, 1, 4: mean 2, standard deviation sqrt(3), so the half width is t."""
        judgement = Difference("a", "b", at_least=0.0).judge(seeds(a=[11.0, 21.0, 34.0], b=[10.0, 20.0, 30.0]))
        assert judgement.estimate == 2.0
        assert judgement.interval == pytest.approx((2 - T_2, 2 + T_2))
        assert judgement.verdict is INCONCLUSIVE
        assert judgement.criterion == "a - b >= 0"

    def test_pairs_by_seed(self) -> None:
        """Seeds differ by hundreds, the metrics of one seed by one: only a paired interval sees it."""
        base = [0.0, 300.0, 700.0, 100.0]
        paired = seeds(a=[value + 1 + 0.01 * i for i, value in enumerate(base)], b=base)
        crossed = seeds(a=[metrics["a"] for metrics in paired], b=base[::-1])
        criterion = Difference("a", "b", at_least=0.5)
        assert criterion.judge(paired).verdict is HOLDS
        assert criterion.judge(crossed).verdict is INCONCLUSIVE
        assert criterion.judge(crossed).estimate == pytest.approx(criterion.judge(paired).estimate)

    @given(pairs)
    def test_agrees_with_scipys_paired_test(self, values: list[tuple[float, float]]) -> None:
        a, b = map(list, zip(*values, strict=True))
        assume(np.std(np.subtract(a, b)) > 1e-6)
        expected = stats.ttest_rel(a, b).confidence_interval(0.95)
        interval = Difference("a", "b", at_least=0.0).judge(seeds(a=a, b=b)).interval
        assert interval == pytest.approx((expected.low, expected.high), rel=1e-9, abs=1e-9)

    @given(pairs, st.lists(st.integers(-1000, 1000), min_size=6, max_size=6), st.integers(-9, 9))
    def test_does_not_see_what_a_seed_adds_to_both(
        self, values: list[tuple[float, float]], shifts: list[int], bound: int
    ) -> None:
        a, b = map(list, zip(*values, strict=True))
        plain = Difference("a", "b", at_least=bound).judge(seeds(a=a, b=b))
        shifted = [[x + shift for x, shift in zip(side, shifts, strict=False)] for side in (a, b)]
        moved = Difference("a", "b", at_least=bound).judge(seeds(a=shifted[0], b=shifted[1]))
        assume(all(abs(edge - bound) > 1e-6 for edge in plain.interval))
        assert moved.verdict is plain.verdict
        assert moved.interval == pytest.approx(plain.interval, abs=1e-6)

    @given(pairs, st.integers(-9, 9))
    def test_read_from_the_other_side_says_the_same(self, values: list[tuple[float, float]], bound: int) -> None:
        a, b = map(list, zip(*values, strict=True))
        one = Difference("a", "b", at_least=bound).judge(seeds(a=a, b=b))
        other = Difference("b", "a", at_most=-bound).judge(seeds(a=a, b=b))
        assert one.verdict is other.verdict
        assert one.estimate == -other.estimate

    @given(pairs, st.randoms(use_true_random=False))
    def test_does_not_depend_on_the_order_of_the_seeds(
        self, values: list[tuple[float, float]], shuffler: random.Random
    ) -> None:
        criterion = Difference("a", "b", at_least=1.0)
        rows = [{"a": a, "b": b} for a, b in values]
        shuffled = rows[:]
        shuffler.shuffle(shuffled)
        one, other = criterion.judge(rows), criterion.judge(shuffled)
        assert one.interval == pytest.approx(other.interval, abs=1e-9)


class TestRatio:
    def test_is_geometric(self) -> None:
        """Ratios 2 and 1/2 are 1 on average, not 1.25."""
        judgement = Ratio("a", "b", at_least=1.0).judge(seeds(a=[2.0, 1.0], b=[1.0, 2.0]))
        assert judgement.estimate == pytest.approx(1.0)
        assert judgement.interval[0] * judgement.interval[1] == pytest.approx(1.0)

    def test_worked_by_hand(self) -> None:
        """Log ratios 0, 1, 2: mean 1, standard deviation 1."""
        judgement = Ratio("a", "b", at_least=0.2).judge(seeds(a=[5.0, 5 * math.e, 5 * math.e**2], b=[5.0, 5.0, 5.0]))
        half = T_2 / math.sqrt(3)
        assert judgement.estimate == pytest.approx(math.e)
        assert judgement.interval == pytest.approx((math.exp(1 - half), math.exp(1 + half)))
        assert judgement.verdict is HOLDS

    @given(st.lists(st.tuples(*[st.floats(0.01, 100)] * 2), min_size=2, max_size=6), st.floats(0.01, 100))
    def test_does_not_see_the_unit_and_inverts(self, values: list[tuple[float, float]], unit: float) -> None:
        a, b = map(list, zip(*values, strict=True))
        plain = Ratio("a", "b", at_least=1.0).judge(seeds(a=a, b=b))
        scaled = Ratio("a", "b", at_least=1.0).judge(seeds(a=[unit * x for x in a], b=[unit * x for x in b]))
        inverse = Ratio("b", "a", at_most=1.0).judge(seeds(a=a, b=b))
        assert scaled.interval == pytest.approx(plain.interval, rel=1e-9)
        assert plain.estimate == pytest.approx(stats.gmean(np.divide(a, b)), rel=1e-9)
        assert inverse.estimate == pytest.approx(1 / plain.estimate)

    def test_covers_the_truth_in_95_of_100_runs(self) -> None:
        draws = np.exp(np.random.default_rng(1).normal(loc=math.log(2.0), scale=0.5, size=(5_000, 3)))
        judged = [Ratio("a", "b", at_least=1.0).judge(seeds(a=draw, b=[1.0] * 3)).interval for draw in draws.tolist()]
        assert np.mean([low <= 2.0 <= high for low, high in judged]) == pytest.approx(0.95, abs=0.01)

    def test_of_hugely_different_metrics_is_still_judged(self) -> None:
        judgement = Ratio("a", "b", at_least=1.0).judge(seeds(a=[1e200, 1e300], b=[1e-200, 1.0]))
        assert judgement.interval[0] < 1.0
        assert judgement.interval[1] == math.inf
        assert judgement.verdict is INCONCLUSIVE

    @pytest.mark.parametrize("metrics", [{"a": 0.0, "b": 1.0}, {"a": 1.0, "b": -2.0}])
    def test_refuses_metrics_that_are_not_positive(self, metrics: Metrics) -> None:
        with pytest.raises(ValueError, match="positive metrics, got a="):
            Ratio("a", "b", at_least=1.0).judge([metrics, metrics])


class TestSlope:
    sizes = (10.0, 40.0, 90.0, 1000.0)

    def test_of_a_power_law_is_its_exponent(self) -> None:
        metrics = {f"x{size:g}": 3.0 * size**-0.5 for size in self.sizes}
        criterion = Slope({size: f"x{size:g}" for size in self.sizes}, at_least=-0.51, at_most=-0.49)
        judgement = criterion.judge([metrics, metrics])
        assert judgement.estimate == pytest.approx(-0.5)
        assert judgement.verdict is HOLDS

    @given(st.lists(st.lists(st.floats(0.01, 100), min_size=4, max_size=4), min_size=2, max_size=5), st.booleans())
    def test_agrees_with_numpys_polyfit(self, heights: list[list[float]], logarithmic: bool) -> None:
        names = [f"x{size:g}" for size in self.sizes]
        transform = np.log if logarithmic else np.asarray
        expected = [np.polyfit(transform(self.sizes), transform(row), 1)[0] for row in heights]
        criterion = Slope(dict(zip(self.sizes, names, strict=True)), at_least=0.0, logarithmic=logarithmic)
        judgement = criterion.judge([dict(zip(names, row, strict=True)) for row in heights])
        assert judgement.estimate == pytest.approx(np.mean(expected), rel=1e-6, abs=1e-9)
        assert judgement.interval == pytest.approx(mean_interval(expected)[1:], rel=1e-6, abs=1e-8)

    def test_does_not_depend_on_the_order_of_the_sizes(self) -> None:
        metrics = {"a": 1.0, "b": 5.0, "c": 4.0}
        one = Slope({1: "a", 2: "b", 4: "c"}, at_least=0.0)
        other = Slope({4: "c", 1: "a", 2: "b"}, at_least=0.0)
        assert one.value(metrics) == other.value(metrics)
        assert one.describe() == other.describe() == "log-log slope of a .. c over 1 .. 4 >= 0"

    def test_on_a_logarithmic_axis_refuses_what_is_not_positive(self) -> None:
        with pytest.raises(ValueError, match="positive metrics, got 0"):
            Slope({1: "a", 2: "b"}, at_least=0.0).judge([{"a": 0.0, "b": 1.0}])


ROWS = seeds(x=[1.0, 2.0, 3.0], y=[10.0, 10.0, 10.0])
CONDITIONS = {HOLDS: AtLeast("x", -9.0), INCONCLUSIVE: AtLeast("x", 2.0), REFUTED: AtLeast("x", 9.0)}


class TestGiven:
    @pytest.mark.parametrize("condition", [INCONCLUSIVE, REFUTED])
    @pytest.mark.parametrize("bound", [5.0, 50.0])
    def test_is_inconclusive_unless_the_condition_holds(self, condition: Verdict, bound: float) -> None:
        judgement = Given(CONDITIONS[condition], AtLeast("y", bound)).judge(ROWS)
        assert judgement.verdict is INCONCLUSIVE
        assert judgement.estimate == 2.0
        assert [part.verdict for part in judgement.parts] == [condition, HOLDS if bound < 10 else REFUTED]

    @pytest.mark.parametrize("bounds", [(5.0, 7.0), (5.0, 50.0), (50.0, 5.0)])
    def test_is_all_of_its_parts_where_it_does(self, bounds: tuple[float, float]) -> None:
        parts = [AtLeast("y", bound) for bound in bounds]
        judgement = Given(CONDITIONS[HOLDS], *parts).judge(ROWS)
        expected = AllOf(*parts).judge(ROWS)
        assert (judgement.verdict, judgement.estimate) == (expected.verdict, expected.estimate)
        assert judgement.parts[1:] == expected.parts
        assert judgement.criterion == f"given that x >= -9: y >= {bounds[0]:g} and y >= {bounds[1]:g}"

    def test_reads_the_metrics_of_both_and_needs_parts(self) -> None:
        assert Given(AtLeast("x", 0.0), AtLeast("y", 0.0)).metrics() == {"x", "y"}
        with pytest.raises(ValueError, match="given that x >= 0, at least one criterion must hold; got none"):
            Given(AtLeast("x", 0.0))


class TestAllOf:
    def test_is_as_good_as_its_worst_part(self) -> None:
        parts = {HOLDS: AtLeast("x", -9.0), INCONCLUSIVE: AtLeast("x", 2.0), REFUTED: AtLeast("x", 9.0)}
        rows = seeds(x=[1.0, 2.0, 3.0])
        for verdicts, expected in [
            ((HOLDS, HOLDS), HOLDS),
            ((HOLDS, INCONCLUSIVE), INCONCLUSIVE),
            ((INCONCLUSIVE, REFUTED), REFUTED),
            ((HOLDS, REFUTED, INCONCLUSIVE), REFUTED),
        ]:
            judgement = AllOf(*(parts[verdict] for verdict in verdicts)).judge(rows)
            assert judgement.verdict is expected
            assert tuple(part.verdict for part in judgement.parts) == verdicts

    def test_shows_the_numbers_of_the_part_that_decides(self) -> None:
        rows = seeds(x=[1.0, 2.0, 3.0], y=[10.0, 10.0, 10.0])
        assert AllOf(AtLeast("x", -9.0), AtMost("y", 5.0)).judge(rows).estimate == 10.0
        assert AllOf(AtLeast("x", -9.0), AtMost("y", 50.0)).judge(rows).estimate == 2.0

    @given(samples, st.lists(numbers, min_size=1, max_size=4), st.randoms(use_true_random=False))
    def test_does_not_depend_on_the_order_of_its_parts(
        self, values: list[float], bounds: list[float], shuffler: random.Random
    ) -> None:
        parts = [AtLeast("x", bound) for bound in bounds]
        rows = seeds(x=values)
        verdict = AllOf(*parts).judge(rows).verdict
        strictest = AtLeast("x", max(bounds)).judge(rows).verdict
        shuffler.shuffle(parts)
        assert AllOf(*parts).judge(rows).verdict is verdict is strictest

    @given(samples, numbers, numbers)
    def test_of_both_sides_is_within(self, values: list[float], one: float, other: float) -> None:
        low, high = sorted((one, other))
        both = AllOf(AtLeast("x", low), AtMost("x", high)).judge(seeds(x=values)).verdict
        assert both is Within("x", low, high).judge(seeds(x=values)).verdict

    def test_wrongly_holds_in_no_more_than_25_of_1000_runs(self) -> None:
        """An intersection-union test: with both truths at their bounds it is stricter than each part, never laxer."""
        draws = np.random.default_rng(3).normal(size=(4_000, 2, 4))
        criterion = AllOf(AtLeast("x", 0.0), AtLeast("y", 0.0))
        verdicts = [criterion.judge(seeds(x=x, y=y)).verdict for x, y in draws.tolist()]
        assert verdicts.count(HOLDS) / len(verdicts) < 0.025

    def test_reads_the_metrics_of_all_parts(self) -> None:
        criterion = AllOf(Difference("a", "b", at_least=0.5), AllOf(Slope({1: "c", 2: "d"}, at_most=1.0)))
        assert criterion.metrics() == {"a", "b", "c", "d"}
        assert criterion.describe() == "a - b >= 0.5 and log-log slope of c .. d over 1 .. 2 <= 1"


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (lambda: Difference("a", "b"), "at_least, at_most or both"),
        (lambda: Difference("a", "b", at_least=math.nan), "finite"),
        (lambda: Difference("a", "b", at_least=2.0, at_most=1.0), "nothing can pass"),
        (lambda: Ratio("a", "b", at_least=0.0), "positive; got 0"),
        (lambda: Ratio("a", "b", at_most=math.inf), "finite"),
        (lambda: AtLeast("a", math.inf), "finite"),
        (lambda: AtMost("a", -math.inf), "finite"),
        (lambda: Within("a", 2.0, 1.0), "nothing can pass"),
        (lambda: Slope({1: "a"}, at_least=0.0), "at least two sizes"),
        (lambda: Slope({0: "a", 1: "b"}, at_least=0.0), "positive, got 0"),
        (lambda: Slope({1: "a", math.inf: "b"}, at_least=0.0), "finite sizes"),
        (lambda: Slope({1: "a", 2: "b"}), "at_least, at_most or both"),
        (lambda: AllOf(), "at least one criterion"),
    ],
)
def test_a_criterion_that_makes_no_sense_is_refused(build, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        build()


@pytest.mark.parametrize(
    "criterion",
    [AtLeast("lost", 0.0), Difference("x", "lost", at_least=0.0), Ratio("lost", "x", at_least=1.0)],
)
def test_a_metric_that_is_not_there_is_named_beside_those_that_are(criterion: Criterion) -> None:
    with pytest.raises(ValueError, match="no metric 'lost'; it returned: x, y"):
        criterion.judge([{"x": 1.0, "y": 2.0}] * 2)


@pytest.mark.parametrize(
    ("criterion", "words"),
    [
        (AtLeast("x", 0.25), "x >= 0.25"),
        (AtMost("x", 3), "x <= 3"),
        (Within("x", 0, 1), "0 <= x <= 1"),
        (Ratio("a", "b", at_least=1.5, at_most=2), "1.5 <= a / b <= 2"),
        (Slope({1: "a", 100: "b"}, at_most=-0.4, logarithmic=False), "slope of a .. b over 1 .. 100 <= -0.4"),
    ],
)
def test_a_criterion_reads_as_a_sentence(criterion: Criterion, words: str) -> None:
    assert criterion.describe() == words


def test_criteria_are_values() -> None:
    assert AtLeast("x", 1.0) == AtLeast("x", 1.0) != AtMost("x", 1.0)
    assert len({Slope({1: "a", 2: "b"}, at_least=0.0), Slope({1: "a", 2: "b"}, at_least=0.0)}) == 1
