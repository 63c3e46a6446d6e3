"""Charts that the report draws itself: an interval against its bounds, and curves.

They are SVG whose horizontal positions are percentages, so that lines stretch with the page while text keeps its size.
Colours are the style sheet's, so they follow the theme. Every chart comes with a sentence that says what it shows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from postern.claims.report import text

MAX_POINTS = 400
MAX_LINES = 6
LOGARITHMIC_RANGE = 100.0

_DRAWABLE = (1e-100, 1e100)  # magnitudes; what is larger is left out, what is smaller is zero to a logarithmic axis
_EDGE = 0.16  # of the shown range, left free on both sides for labels
_PLOT_HEIGHT = 200
_RANGE_FACTOR = 8.0
_RANGE_FACTOR_OF_NAMESAKES = 1000.0


@dataclass(frozen=True)
class Reading:
    """An estimate with its interval, and the bounds it was compared with.

    Attributes:
        criterion: the criterion in words.
        estimate: the mean over the seeds.
        low: lower end of the 95 % interval, ``-inf`` where unknown.
        high: its upper end, ``inf`` where unknown.
        floor: lowest value that passes, ``-inf`` where there is no such bound, None where it is not known.
        ceiling: highest value that passes, ``inf`` where there is no such bound, None where it is not known.
        verdict: what the reading says by itself, "" where it says nothing (smoke).
    """

    criterion: str
    estimate: float
    low: float
    high: float
    floor: float | None = None
    ceiling: float | None = None
    verdict: str = ""

    @property
    def is_known(self) -> bool:
        """Whether there is an interval: one seed gives none."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    @property
    def decimals(self) -> int:
        """How many decimals its numbers are written with."""
        return text.shared_decimals(self.estimate, self.low, self.high)

    @property
    def estimate_text(self) -> str:
        """The estimate as a reader sees it."""
        return text.number(self.estimate, self.decimals)

    @property
    def interval_text(self) -> str:
        """The interval as a reader sees it."""
        return text.interval(self.low, self.high, self.decimals)

    @property
    def passing(self) -> tuple[float, float] | None:
        """The finite or infinite ends of the region that passes, or None where the bounds are not known."""
        return None if self.floor is None or self.ceiling is None else (self.floor, self.ceiling)


@dataclass(frozen=True)
class Curve:
    """One metric over the steps: the mean over the seeds that logged it, and their range.

    Attributes:
        name: the metric.
        steps: where it was logged, ascending.
        mean: mean over the seeds at each step.
        low: lowest seed at each step.
        high: highest seed at each step.
        seeds: number of seeds.
    """

    name: str
    steps: tuple[float, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    seeds: int


@dataclass(frozen=True)
class CurveChart:
    """Curves that share their axes.

    Attributes:
        curves: what is drawn.
        markup: the chart.
        description: its text alternative.
        columns: heading of the numbers behind it.
        rows: these numbers, at no more than a dozen steps.
        is_logarithmic: whether the vertical axis is.
    """

    curves: tuple[Curve, ...]
    markup: Markup
    description: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    is_logarithmic: bool


def describe_reading(reading: Reading) -> str:
    """Say in one sentence what `interval_plot` shows."""
    parts = [f"Estimate {reading.estimate_text}, 95 % interval {reading.interval_text}."]
    if reading.passing is not None:
        parts.append(f"The claim holds {_region_in_words(*reading.passing)}.")
    return " ".join(parts)


def interval_plot(reading: Reading) -> Markup:
    """Draw an estimate and its interval against the bounds of its criterion.

    Args:
        reading: what to draw.

    Returns:
        An ``<svg role="img">`` with an accessible name. The region that passes is tinted and labelled.
    """
    ends = (reading.low, reading.high) if reading.is_known else (-math.inf, math.inf)  # a ratio's unknown low end is 0
    marks = [reading.estimate, *ends, *(reading.passing or ())]
    finite = [mark for mark in marks if math.isfinite(mark)]
    first, last = min(finite), max(finite)
    span = (last - first) or abs(last) or 1.0
    start, width = first - _EDGE * span, (1 + 2 * _EDGE) * span

    def at(value: float) -> float:
        return float(100 * min(max((value - start) / width, 0.0), 1.0))

    pieces: list[Markup] = []
    if reading.passing is not None:
        floor, ceiling = reading.passing
        left, right = at(floor), at(ceiling)
        pieces.append(
            Markup('<rect class="passes" x="{:.2f}%" y="22" width="{:.2f}%" height="20"/>').format(left, right - left)
        )
        pieces += [
            Markup('<line class="bound" x1="{0:.2f}%" x2="{0:.2f}%" y1="18" y2="46"/>').format(at(bound))
            for bound in (floor, ceiling)
            if math.isfinite(bound)
        ]
        pieces += _bound_labels(floor, ceiling, left, right)
    known = "" if reading.is_known else " unknown"
    low, high, here = at(ends[0]), at(ends[1]), at(reading.estimate)
    pieces.append(
        Markup('<line class="interval{}" x1="{:.2f}%" x2="{:.2f}%" y1="32" y2="32"/>').format(known, low, high)
    )
    if reading.is_known:
        pieces += [
            Markup('<line class="cap" x1="{0:.2f}%" x2="{0:.2f}%" y1="27" y2="37"/>').format(end) for end in (low, high)
        ]
    pieces.append(Markup('<circle class="estimate" cx="{:.2f}%" cy="32" r="5"/>').format(here))
    pieces.append(_label(reading.estimate_text, here, 13, "estimate-label"))
    return Markup('<svg class="interval-plot" role="img" aria-label="{}" width="100%" height="64">{}</svg>').format(
        describe_reading(reading), Markup("").join(pieces)
    )


def _region_in_words(floor: float, ceiling: float) -> str:
    if math.isinf(ceiling):
        return f"from {text.plain(floor)} upwards"
    if math.isinf(floor):
        return f"up to {text.plain(ceiling)}"
    return f"from {text.plain(floor)} to {text.plain(ceiling)}"


def _bound_labels(floor: float, ceiling: float, left: float, right: float) -> list[Markup]:
    if math.isinf(ceiling):
        return [_label(f"holds from {text.plain(floor)}", left, 60, "bound-label", "start" if left < 60 else "end")]
    if math.isinf(floor):
        return [
            _label(f"holds up to {text.plain(ceiling)}", right, 60, "bound-label", "end" if right > 40 else "start")
        ]
    words = f"holds from {text.plain(floor)} to {text.plain(ceiling)}"
    return [_label(words, (left + right) / 2, 60, "bound-label", "middle" if 30 <= (left + right) / 2 <= 70 else None)]


def _label(words: str, percent: float, y: int, kind: str, anchor: str | None = None) -> Markup:
    if anchor is None:
        anchor = "start" if percent < 15 else "end" if percent > 85 else "middle"
    return Markup('<text class="{}" x="{:.2f}%" y="{}" text-anchor="{}">{}</text>').format(
        kind, percent, y, anchor, words
    )


def curves_of(logs: Mapping[int, Sequence[Mapping[str, float]]]) -> list[Curve]:
    """Gather the logs of the seeds into one curve a metric.

    A curve is drawn at the steps that every seed logged; where seeds share fewer than two, the first seed stands alone.
    Values that are not finite, or too large to draw, are left out. Metrics with fewer than two points make no curve.

    Args:
        logs: what each seed logged, in order: ``{"step": 10, "loss": 0.3}``.
    """
    by_metric: dict[str, dict[int, dict[float, float]]] = {}
    for seed, entries in logs.items():
        for entry in entries:
            for name, value in entry.items():
                if name != "step" and abs(value) <= _DRAWABLE[1]:
                    by_metric.setdefault(name, {}).setdefault(seed, {})[entry["step"]] = value
    curves = []
    for name, seeds in by_metric.items():
        chosen = list(seeds.values())
        steps = sorted(set.intersection(*(set(points) for points in chosen)))
        if len(steps) < 2:
            chosen = chosen[:1]
            steps = sorted(chosen[0])
        if len(steps) < 2:
            continue
        columns = [[points[step] for points in chosen] for step in steps]
        curves.append(
            Curve(
                name=name,
                steps=tuple(steps),
                mean=tuple(sum(column) / len(column) for column in columns),
                low=tuple(min(column) for column in columns),
                high=tuple(max(column) for column in columns),
                seeds=len(chosen),
            )
        )
    return curves


def curve_charts(logs: Mapping[int, Sequence[Mapping[str, float]]]) -> list[CurveChart]:
    """Draw the curves of a claim's seeds, those of like range together.

    A curve joins a chart if it and the others each still take an eighth of its height; so losses of several methods
    are seen against each other, and a learning rate is not flattened by a loss. Curves whose names begin with the same
    word (``test_adam``, ``test_sgd``) are taken to be one quantity, of which one may well be flat, unless they are a
    thousand times apart.

    Args:
        logs: what each seed logged.
    """
    groups: list[list[Curve]] = []
    for curve in curves_of(logs):
        for group in groups:
            if len(group) < MAX_LINES and _read_together(group, curve):
                group.append(curve)
                break
        else:
            groups.append([curve])
    return [_curve_chart(group) for group in groups]


def _read_together(group: Sequence[Curve], curve: Curve) -> bool:
    words = {each.name.split("_")[0] for each in group}
    factor = _RANGE_FACTOR_OF_NAMESAKES if curve.name.split("_")[0] in words else _RANGE_FACTOR
    whole = _extent([*group, curve])
    return all(whole <= factor * extent for extent in (_extent(group), _extent([curve])) if extent)


def _extent(curves: Sequence[Curve]) -> float:
    return max(max(curve.high) for curve in curves) - min(min(curve.low) for curve in curves)


def _curve_chart(curves: Sequence[Curve]) -> CurveChart:
    low, high = min(min(curve.low) for curve in curves), max(max(curve.high) for curve in curves)
    logarithmic = low > _DRAWABLE[0] and high / low >= LOGARITHMIC_RANGE
    first, last = min(curve.steps[0] for curve in curves), max(curve.steps[-1] for curve in curves)
    ticks = _logarithmic_ticks(low, high) if logarithmic else _ticks(low, high)
    bottom, top = min(low, ticks[0]), max(high, ticks[-1])
    if len(ticks) == 1:
        margin = abs(ticks[0]) / 2 or 1.0
        bottom, top = bottom - margin, top + margin

    def y(value: float) -> float:
        if logarithmic:
            return 1000 * math.log(top / value) / math.log(top / bottom)
        return 1000 * (top - value) / (top - bottom)

    def x(step: float) -> float:
        return 1000 * (step - first) / (last - first)

    def path(steps: Sequence[float], values: Sequence[float]) -> str:
        return " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in zip(steps, values, strict=True))

    grid = Markup("").join(
        Markup(
            '<line class="grid" x1="0" x2="100%" y1="{0:.1f}" y2="{0:.1f}"/>'
            '<text class="tick" x="-8" y="{1:.1f}" text-anchor="end">{2}</text>'
        ).format(y(tick) / 1000 * _PLOT_HEIGHT, y(tick) / 1000 * _PLOT_HEIGHT + 4, text.plain(tick))
        for tick in ticks
    )
    labels = Markup("").join(
        Markup('<text class="tick" x="{:.1f}%" y="{}" text-anchor="{}">{}</text>').format(
            percent, _PLOT_HEIGHT + 18, anchor, words
        )
        for percent, anchor, words in (
            (0, "start", text.plain(first)),
            (50, "middle", "step"),
            (100, "end", text.plain(last)),
        )
    )
    bands, lines = [], []
    for index, curve in enumerate(curves, start=1):
        kept = _thinned(curve)
        steps = [curve.steps[i] for i in kept]
        if curve.seeds > 1:
            around = [*zip(steps, [curve.high[i] for i in kept], strict=True)]
            around += [*zip(steps, [curve.low[i] for i in kept], strict=True)][::-1]
            points = path([step for step, _ in around], [value for _, value in around])
            bands.append(Markup('<polygon class="band series-{}" points="{}"/>').format(index, points))
        points = path(steps, [curve.mean[i] for i in kept])
        lines.append(Markup('<polyline class="line series-{}" points="{}"/>').format(index, points))
    description = " ".join(
        f"{curve.name}: from {text.number(curve.mean[0])} at step {text.plain(curve.steps[0])} to "
        f"{text.number(curve.mean[-1])} at step {text.plain(curve.steps[-1])}, "
        f"lowest {text.number(min(curve.mean))}, highest {text.number(max(curve.mean))}."
        for curve in curves
    )
    markup = Markup(
        '<svg class="curves" role="img" aria-label="{label}" height="{height}">{grid}{labels}'
        '<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" width="100%" height="100%" overflow="visible">'
        "{bands}{lines}</svg></svg>"
    ).format(
        label=description,
        height=_PLOT_HEIGHT,
        grid=grid,
        labels=labels,
        bands=Markup("").join(bands),
        lines=Markup("").join(lines),
    )
    columns, rows = _numbers_behind(curves)
    return CurveChart(tuple(curves), markup, description, columns, rows, logarithmic)


def _thinned(curve: Curve) -> list[int]:
    """Choose at most `MAX_POINTS` points that keep the outline: the lowest and highest of equal stretches."""
    size = len(curve.mean)
    if size <= MAX_POINTS:
        return list(range(size))
    stretches = MAX_POINTS // 2 - 1
    kept = {0, size - 1}
    for stretch in range(stretches):
        indices = range(stretch * size // stretches, (stretch + 1) * size // stretches)
        kept |= {min(indices, key=curve.mean.__getitem__), max(indices, key=curve.mean.__getitem__)}
    return sorted(kept)


def _numbers_behind(curves: Sequence[Curve], rows: int = 12) -> tuple[tuple[str, ...], tuple[tuple[str, ...], ...]]:
    steps = sorted({step for curve in curves for step in curve.steps})
    if len(steps) > rows:
        steps = [steps[round(i * (len(steps) - 1) / (rows - 1))] for i in range(rows)]
    values = [dict(zip(curve.steps, curve.mean, strict=True)) for curve in curves]
    table = [
        (text.plain(step), *(text.number(value[step]) if step in value else "" for value in values)) for step in steps
    ]
    return ("step", *(curve.name for curve in curves)), tuple(table)


def _ticks(low: float, high: float, wanted: int = 4) -> list[float]:
    """Round numbers at equal distances that enclose ``low`` to ``high``; one number where they are the same."""
    if high - low <= max(1e-12 * max(abs(low), abs(high)), _DRAWABLE[0]):
        return [low]
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    distance = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    return [tick * distance for tick in range(math.floor(low / distance), math.ceil(high / distance) + 1)]


def _logarithmic_ticks(low: float, high: float, most: int = 6) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    stride = max(1, math.ceil((last - first) / (most - 1)))
    return [10.0**exponent for exponent in range(first, last + stride, stride)]
