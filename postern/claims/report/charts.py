"""Charts that the report draws itself: an interval against its bounds, curves, and members of a comparison.

They are SVG whose horizontal positions are percentages, so that lines stretch with the page while text keeps its size.
Colours are the style sheet's, so they follow the theme. Every chart comes with a sentence that says what it shows.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from postern.claims.report import text

MAX_POINTS = 400
MAX_LINES = 6
LOGARITHMIC_RANGE = 100.0

_DRAWABLE = (1e-100, 1e100)  # magnitudes; what is larger is left out, what is smaller is zero to a logarithmic axis
_EDGE = 0.16  # of the shown range, left free on both sides for labels
_PLOT_HEIGHT = 200
_LANE_HEIGHT = 46
_SCATTER_HEIGHT = 300
_NARROWEST_SCATTER = 220.0  # pixels that its width shrinks to on a phone: labels find their places there
_LABEL_HEIGHT = 15.0
_LETTER_WIDTH = 7.2
_MARK_RADIUS = 7.0
_LEFT_MARGIN, _RIGHT_MARGIN = 40.0, 12.0  # pixels beside a scatter that its labels may use
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


@dataclass(frozen=True)
class Mark:
    """A member of a comparison in a chart.

    Attributes:
        name: the member.
        place: how it came out: a key of `SHAPES`.
        quality: its quality.
        step_time: its step time as a multiple of the baseline's, None where it was not timed.
    """

    name: str
    place: str
    quality: Reading
    step_time: Reading | None = None


def _star(points: int = 5, outer: float = 7.8, inner: float = 3.4) -> str:
    radii = [(outer, inner)[corner % 2] for corner in range(2 * points)]
    angles = [math.pi * corner / points for corner in range(2 * points)]
    corners = [f"{r * math.sin(angle):.1f} {-r * math.cos(angle):.1f}" for r, angle in zip(radii, angles, strict=True)]
    return f"M{'L'.join(corners)}z"


SHAPES: Mapping[str, str] = {
    "best": _star(),
    "level": "M-5.6 0a5.6 5.6 0 1 0 11.2 0a5.6 5.6 0 1 0-11.2 0z",
    "behind": "M0 6.2L-6.6-5.2h13.2z",
}
"""The outline of each place's sign around (0, 0), so that it is told apart without colour."""


@dataclass(frozen=True)
class _Axis:
    """Where numbers lie between the ends of an axis, with its ticks."""

    ticks: tuple[float, ...]
    first: float
    last: float
    is_logarithmic: bool

    def share(self, value: float) -> float:
        """How far ``value`` is from the first end, 0, to the last, 1; what lies outside is moved to the end."""
        value = min(max(value, self.first), self.last)
        if self.is_logarithmic:
            return math.log(value / self.first) / math.log(self.last / self.first)
        return (value - self.first) / (self.last - self.first)


def _axis(low: float, high: float, ticks: Sequence[float], *, is_logarithmic: bool) -> _Axis:
    """Make an axis that shows ``low`` to ``high`` and all ticks; around one number where they are the same."""
    first, last = min(low, ticks[0]), max(high, ticks[-1])
    if len(ticks) == 1:
        margin = abs(ticks[0]) / 2 or 1.0
        first, last = first - margin, last + margin
    return _Axis(tuple(ticks), first, last, is_logarithmic)


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
    axis = _axis(low, high, ticks, is_logarithmic=logarithmic)

    def y(value: float) -> float:
        return 1000 * (1 - axis.share(value))

    def x(step: float) -> float:
        return 1000 * (step - first) / (last - first)

    def path(steps: Sequence[float], values: Sequence[float]) -> str:
        return " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in zip(steps, values, strict=True))

    grid = _rows(axis, _PLOT_HEIGHT)
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


def _rows(axis: _Axis, height: float) -> Markup:
    """Draw the ticks of a vertical axis, with a line across the chart."""
    return Markup("").join(
        Markup(
            '<line class="grid" x1="0" x2="100%" y1="{0:.1f}" y2="{0:.1f}"/>'
            '<text class="tick" x="-8" y="{1:.1f}" text-anchor="end">{2}</text>'
        ).format(y, y + 4, text.plain(tick))
        for tick, y in ((tick, height * (1 - axis.share(tick))) for tick in axis.ticks)
    )


def _columns(axis: _Axis, height: float, unit: str = "") -> Markup:
    """Draw the ticks of a horizontal axis, with a line down the chart."""
    return Markup("").join(
        Markup(
            '<line class="grid" x1="{0:.2f}%" x2="{0:.2f}%" y1="0" y2="{1}"/>'
            '<text class="tick" x="{0:.2f}%" y="{2}" text-anchor="middle">{3}</text>'
        ).format(100 * axis.share(tick), height, height + 18, f"{text.plain(tick)}{unit}")
        for tick in axis.ticks
    )


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


def quality_lanes(marks: Sequence[Mark], label: str) -> Markup:
    """Draw the quality of each member with its interval, one below the other on one axis.

    Args:
        marks: the members; those whose quality is too large to be drawn are left out.
        label: what the axis shows.

    Returns:
        An ``<svg role="img">`` with an accessible name, empty where nobody is left.
    """
    drawn = [mark for mark in marks if _is_drawable(mark.quality)]
    if not drawn:
        return Markup("")
    axis = _shared_axis([mark.quality for mark in drawn])
    height = _LANE_HEIGHT * len(drawn)
    lanes = []
    for index, mark in enumerate(drawn):
        top = index * _LANE_HEIGHT
        lanes.append(
            Markup(
                '<text class="member" x="0" y="{:d}">{} <tspan class="value">{}</tspan></text>'
                '<g class="{}">{}<svg class="mark" x="{:.2f}%" y="{:d}" overflow="visible">{}</svg></g>'
            ).format(
                top + 15,
                mark.name,
                mark.quality.estimate_text,
                mark.place,
                _across(mark.quality, axis, top + 31),
                100 * axis.share(mark.quality.estimate),
                top + 31,
                _shape(mark.place),
            )
        )
    return Markup('<svg class="lanes" role="img" aria-label="{}" width="100%" height="{}">{}{}</svg>').format(
        f"{label}: {'; '.join(map(_in_words, drawn))}.", height, _columns(axis, height), Markup("").join(lanes)
    )


def quality_by_time(marks: Sequence[Mark], label: str, time_label: str) -> Markup:
    """Draw the quality of each member against its step time, both with their intervals.

    Args:
        marks: the members; those that were not timed are left out, as are those that are too large to be drawn.
        label: what the vertical axis shows.
        time_label: what the horizontal axis shows.

    Returns:
        An ``<svg role="img">`` with an accessible name, empty where nobody was timed.
    """
    timed = [(mark, mark.step_time) for mark in marks if mark.step_time and _is_drawable(mark.quality)]
    if not timed:
        return Markup("")
    vertical = _shared_axis([mark.quality for mark, _ in timed])
    horizontal = _ratio_axis([time for _, time in timed])
    spots = [
        (100 * horizontal.share(time.estimate), _SCATTER_HEIGHT * (1 - vertical.share(mark.quality.estimate)))
        for mark, time in timed
    ]
    bars, points = [], []
    for (mark, time), (x, y), place in zip(timed, spots, _label_places([m.name for m, _ in timed], spots), strict=True):
        bars.append(Markup('<g class="{}">{}').format(mark.place, _across(time, horizontal, y)))
        if mark.quality.is_known:
            ends = [_SCATTER_HEIGHT * (1 - vertical.share(end)) for end in (mark.quality.low, mark.quality.high)]
            bars.append(
                Markup('<line class="interval" x1="{0:.2f}%" x2="{0:.2f}%" y1="{1:.1f}" y2="{2:.1f}"/>').format(
                    x, *ends
                )
            )
        bars.append(Markup("</g>"))
        points.append(
            Markup('<svg class="mark {}" x="{:.2f}%" y="{:.1f}" overflow="visible">{}{}{}</svg>').format(
                mark.place, x, y, _leader(place), _shape(mark.place), _name(mark.name, place)
            )
        )
    words = "; ".join(f"{_in_words(mark)}, {time.estimate_text} times" for mark, time in timed)
    return Markup(
        '<svg class="scatter" role="img" aria-label="{}" height="{}">{}{}'
        '<text class="axis" x="0" y="-14">{}</text>'
        '<text class="axis" x="100%" y="{}" text-anchor="end">{}</text>{}{}</svg>'
    ).format(
        f"{label} against {time_label}: {words}.",
        _SCATTER_HEIGHT,
        _rows(vertical, _SCATTER_HEIGHT),
        _columns(horizontal, _SCATTER_HEIGHT, "×"),
        label,
        _SCATTER_HEIGHT + 38,
        time_label,
        Markup("").join(bars),
        Markup("").join(points),
    )


def _in_words(mark: Mark) -> str:
    return f"{mark.name} {mark.quality.estimate_text} ({mark.quality.interval_text}), {mark.place}"


def _is_drawable(reading: Reading) -> bool:
    return all(abs(value) <= _DRAWABLE[1] for value in _span(reading))


def _span(reading: Reading) -> tuple[float, ...]:
    """Return the ends of what is drawn of a reading."""
    return (reading.low, reading.estimate, reading.high) if reading.is_known else (reading.estimate,)


def _shared_axis(readings: Sequence[Reading]) -> _Axis:
    """Make the axis that shows all readings: logarithmic where the estimates are a hundred times apart."""
    estimates = [reading.estimate for reading in readings]
    ends = [end for reading in readings for end in _span(reading)]
    if min(estimates) > _DRAWABLE[0] and max(estimates) / min(estimates) >= LOGARITHMIC_RANGE:
        low = min([end for end in ends if end >= min(estimates) / LOGARITHMIC_RANGE])
        return _axis(low, max(ends), _logarithmic_ticks(low, max(ends)), is_logarithmic=True)
    return _axis(min(ends), max(ends), _ticks(min(ends), max(ends)), is_logarithmic=False)


def _ratio_axis(readings: Sequence[Reading]) -> _Axis:
    """Make the axis of ratios, in doublings where they are far apart."""
    low, high = min(min(_span(each)) for each in readings), max(max(_span(each)) for each in readings)
    estimates = [reading.estimate for reading in readings]
    if min(estimates) > _DRAWABLE[0] and max(estimates) / min(estimates) >= _RANGE_FACTOR:
        low = max(low, min(estimates) / 2)
        first, last = math.floor(math.log2(low)), math.ceil(math.log2(high))
        stride = max(1, math.ceil((last - first) / 5))
        ticks = [2.0**exponent for exponent in range(first, last + stride, stride)]
        return _axis(low, high, ticks, is_logarithmic=True)
    return _axis(low, high, _ticks(low, high), is_logarithmic=False)


def _across(reading: Reading, axis: _Axis, y: float) -> Markup:
    """Draw an interval along a horizontal axis, or nothing where it is unknown."""
    if not reading.is_known:
        return Markup("")
    ends = [100 * axis.share(end) for end in (reading.low, reading.high)]
    return Markup('<line class="interval" x1="{:.2f}%" x2="{:.2f}%" y1="{y:.1f}" y2="{y:.1f}"/>').format(*ends, y=y)


def _shape(place: str) -> Markup:
    return Markup('<path class="shape" d="{}"/>').format(SHAPES[place])


@dataclass(frozen=True)
class _LabelPlace:
    """Where a label begins or ends: pixels to the right of its mark and below it."""

    offset: float
    fall: float
    ends_there: bool


def _label_places(names: Sequence[str], spots: Sequence[tuple[float, float]]) -> list[_LabelPlace]:
    """Find a place beside each mark where its label covers no mark and no other label.

    The chart is taken to be as narrow as on a phone. Where it is wider, labels on the same side of their marks move
    apart and those on facing sides do too, so what is free there is free everywhere.
    """
    taken = [_box(x / 100 * _NARROWEST_SCATTER, y, _MARK_RADIUS, _MARK_RADIUS, _MARK_RADIUS) for x, y in spots]
    places = []
    for name, (x, y) in zip(names, spots, strict=True):
        beside = list(_beside(x / 100 * _NARROWEST_SCATTER, y, _LETTER_WIDTH * len(name)))
        inside = [each for each in beside if _is_inside(each[1])] or beside
        free = (each for each in inside if not any(_overlap(each[1], other) for other in taken))
        place, box = next(free, inside[0])
        places.append(place)
        taken.append(box)
    return places


def _beside(x: float, y: float, width: float) -> Iterator[tuple[_LabelPlace, _Box]]:
    """Yield where a label can lie beside a mark, the nearest first, with the box that it fills there."""
    sides = (False, True) if x < _NARROWEST_SCATTER / 2 else (True, False)
    for step in range(round(_SCATTER_HEIGHT / _LABEL_HEIGHT)):
        beyond = _LABEL_HEIGHT * (step + 0.8)  # above or below the interval of the time
        for fall in (-beyond, beyond):
            for ends_there in sides:
                place = _LabelPlace(-9.0 if ends_there else 9.0, fall, ends_there)
                left, right = (width, 0.0) if ends_there else (0.0, width)
                yield place, _box(x + place.offset, y + fall, left, right, _LABEL_HEIGHT / 2)


_Box = tuple[float, float, float, float]


def _box(x: float, y: float, left: float, right: float, half_height: float) -> _Box:
    return x - left, x + right, y - half_height, y + half_height


def _is_inside(box: _Box) -> bool:
    left, right, top, bottom = box
    return (
        left >= -_LEFT_MARGIN and right <= _NARROWEST_SCATTER + _RIGHT_MARGIN and top >= 0 and bottom <= _SCATTER_HEIGHT
    )


def _overlap(first: _Box, second: _Box) -> bool:
    return first[0] < second[1] and second[0] < first[1] and first[2] < second[3] and second[2] < first[3]


def _leader(place: _LabelPlace) -> Markup:
    """Draw the line from a mark to a label that had to move away from it."""
    if abs(place.fall) <= _LABEL_HEIGHT:
        return Markup("")
    return Markup('<line class="leader" x2="{:.0f}" y2="{:.1f}"/>').format(place.offset * 0.8, place.fall)


def _name(name: str, place: _LabelPlace) -> Markup:
    return Markup('<text class="member" x="{:.0f}" y="{:.1f}" text-anchor="{}">{}</text>').format(
        place.offset, place.fall + 4, "end" if place.ends_there else "start", name
    )
