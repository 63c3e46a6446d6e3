"""What the page of a comparison shows, worked out of its ranking before a template sees it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date

from markupsafe import Markup

from postern.claims.comparison import TIMING, Estimate, Place, Quantity, Ranking, Standing
from postern.claims.outcome import JobResult, Status
from postern.claims.paper import Paper
from postern.claims.report import charts, text
from postern.claims.report.member_curves import curve_pictures
from postern.claims.report.views import (
    Failure,
    FigureView,
    MetricRow,
    TableView,
    device_in_words,
    failures_of,
    figure_views,
    import_lines,
    inks_of,
    known_facts,
    table_views,
)
from postern.claims.run import Measurement

PLACE_NAMES: Mapping[Place, str] = {
    Place.BEST: "best",
    Place.LEVEL: "level with the best",
    Place.BEHIND: "behind",
    Place.ERROR: "error",
}


@dataclass(frozen=True)
class Column:
    """A measured quantity.

    Attributes:
        label: its heading.
        note: how to read it.
        readings: one for each standing, None where it has none.
    """

    label: str
    note: str
    readings: tuple[charts.Reading | None, ...]


@dataclass(frozen=True)
class Row:
    """A member's row of the table.

    Attributes:
        standing: how it came out.
        imports: the line that imports its part.
        paper: its paper, if that is in the catalogue.
        learning_rates: the chosen ones, the most frequent first.
    """

    standing: Standing
    imports: str
    paper: Paper | None
    learning_rates: tuple[str, ...]


@dataclass(frozen=True)
class RankingView:
    """One comparison: an entry of the index and a page.

    Attributes:
        ranking: the comparison.
        columns: what was measured: the quality, the difference to the best, other quantities and times.
        rows: its members, best first.
        places: the names of the members at each place that somebody has.
        facts: what all members shared.
        date: when its last job ended, None where none was run.
        lanes: the chart of all qualities, empty where there are none.
        scatter: the chart of quality against step time, empty where nobody was timed.
        curves: drawings with one curve a member.
        figures: what the timing drew, of its first seed.
        tables: what it tabulated.
        inks: colours of curves and figures.
        by_seed: the quality of each member and seed.
        failures: what went wrong, by member.
        remarks: what a reader has to know of these numbers in particular.
    """

    ranking: Ranking
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    places: Mapping[Place, tuple[str, ...]]
    facts: tuple[tuple[str, str], ...]
    date: date | None
    lanes: Markup
    scatter: Markup
    curves: tuple[FigureView, ...]
    figures: tuple[FigureView, ...]
    tables: tuple[TableView, ...]
    inks: tuple[str, ...]
    by_seed: tuple[MetricRow, ...]
    failures: tuple[tuple[str, tuple[Failure, ...]], ...]
    remarks: tuple[str, ...]

    @property
    def family(self) -> str:
        """The family that is compared."""
        return self.ranking.contest.family

    @property
    def data(self) -> str:
        """The data that it is compared on."""
        return self.ranking.setting.data

    @property
    def task(self) -> str:
        """What was trained, in one sentence."""
        return self.ranking.contest.task[self.ranking.setting.kind]

    @property
    def href(self) -> str:
        """Address of the page, relative to the index."""
        return f"comparisons/{self.family}-{self.ranking.setting.identity}.html"

    @property
    def best(self) -> str:
        """The best member, "" where all failed."""
        return self.places.get(Place.BEST, ("",))[0]


def ranking_views(rankings: Sequence[Ranking], papers: Sequence[Paper]) -> list[RankingView]:
    """Work out what the pages of comparisons show, in the order given.

    Raises:
        ValueError: two rankings of one family under one setting.
    """
    known = {paper.slug: paper for paper in papers}
    views = [_view(ranking, known) for ranking in rankings]
    for address, times in Counter(view.href for view in views).items():
        if times > 1:
            raise ValueError(f"expected every comparison once, got {address} {times} times")
    return views


def _better(quantity: Quantity) -> str:
    """Say which end of a quantity is the good one."""
    return "higher is better" if quantity.higher_is_better else "lower is better"


def _view(ranking: Ranking, papers: Mapping[str, Paper]) -> RankingView:
    standings, results = ranking.standings, ranking.results
    columns = tuple(_columns(ranking))
    qualities = columns[0].readings
    times = _readings([standing.step_time for standing in standings])
    marks = [
        charts.Mark(standing.member.name, str(standing.place), quality, time)
        for standing, quality, time in zip(standings, qualities, times, strict=True)
        if quality is not None
    ]
    label = f"{ranking.quality.label} ({_better(ranking.quality)})"
    names = [(standing.member.name, standing.member.name) for standing in standings]
    timed = next((each.measurement for each in _of(TIMING, results) if each.status is Status.DONE), Measurement({}))
    curves = tuple(figure_views(curve_pictures(ranking), "curves"))
    figures = tuple(figure_views(timed.figures, "timing"))
    failures = [(words, tuple(failures_of(_of(name, results)))) for words, name in (*names, ("Times", TIMING))]
    return RankingView(
        ranking=ranking,
        columns=columns,
        rows=tuple(
            Row(
                standing,
                import_lines([standing.member.part]),
                papers.get(standing.member.paper),
                _chosen(standing.learning_rates),
            )
            for standing in standings
        ),
        places={
            place: tuple(standing.member.name for standing in standings if standing.place is place)
            for place in Place
            if any(standing.place is place for standing in standings)
        },
        facts=_facts(ranking),
        date=max(result.finished for result in results).date() if results else None,
        lanes=charts.quality_lanes(marks, label),
        scatter=charts.quality_by_time(marks, label, f"step time, multiple of {ranking.setting.baseline}’s"),
        curves=curves,
        figures=figures,
        tables=tuple(table_views(timed.tables)),
        inks=inks_of([*curves, *figures]),
        by_seed=tuple(
            _by_seed(ranking, standing.member.name, quality)
            for standing, quality in zip(standings, qualities, strict=True)
            if quality is not None
        ),
        failures=tuple((words, failed) for words, failed in failures if failed),
        remarks=tuple(_remarks(ranking)),
    )


def _columns(ranking: Ranking) -> Iterator[Column]:
    standings, quality = ranking.standings, ranking.quality
    yield Column(quality.label, _better(quality), _readings([each.quality for each in standings], quality.scale))
    leads = _readings([each.lead for each in standings], quality.scale)
    yield Column("difference to the best", "paired by seed; below 0 is worse", leads)
    for quantity in ranking.quantities:
        others = _readings([each.others.get(quantity.name) for each in standings], quantity.scale)
        yield Column(quantity.label, _better(quantity), others)
    if any(each.step_time for each in standings):
        times = _readings([each.step_time for each in standings])
        yield Column("step time", f"multiple of {ranking.setting.baseline}’s; lower is better", times)
    for name, label in ranking.paces.items():
        times = _readings([each.paces.get(name) for each in standings])
        yield Column(label, f"multiple of {ranking.setting.baseline}’s; lower is better", times)


def _readings(estimates: Sequence[Estimate | None], scale: float = 1.0) -> tuple[charts.Reading | None, ...]:
    return tuple(
        charts.Reading("", scale * each.mean, scale * each.low, scale * each.high) if each else None
        for each in estimates
    )


def _of(name: str, results: Sequence[JobResult]) -> list[JobResult]:
    return [result for result in results if result.job.claim == name]


def _chosen(learning_rates: Sequence[float]) -> tuple[str, ...]:
    """Write the learning rates that the seeds chose, with how many seeds where they differ."""
    counted = Counter(learning_rates).most_common()
    if len(counted) < 2:
        return tuple(text.plain(rate) for rate, _ in counted)
    return tuple(f"{text.plain(rate)} ({text.count(times, 'seed')})" for rate, times in counted)


def _facts(ranking: Ranking) -> tuple[tuple[str, str], ...]:
    setting, results = ranking.setting, ranking.results
    trained = _devices([result for result in results if result.job.claim != TIMING])
    timed = _devices(_of(TIMING, results))
    return known_facts(
        [
            ("Data", setting.data),
            ("Kind", setting.kind),
            ("Label column", setting.label or ""),
            ("Hash of the data", setting.digest[:12]),
            ("Budget", f"{text.count(setting.steps, 'step')} a training"),
            ("Learning rates to choose from", ", ".join(map(text.plain, setting.learning_rates))),
            ("Seeds", text.seed_list(list(ranking.seeds)) if ranking.seeds else "none"),
            ("Device", trained),
            ("Device of the times", timed if timed != trained else ""),
            ("Date", max(result.finished for result in results).date().isoformat() if results else ""),
            ("Time of all jobs", text.duration(ranking.seconds) if ranking.seconds else ""),
        ]
    )


def _devices(results: Sequence[JobResult]) -> str:
    return "; ".join(sorted({device_in_words(result.job.device, result.job.threads) for result in results}))


def _by_seed(ranking: Ranking, name: str, reading: charts.Reading) -> MetricRow:
    quality = ranking.quality
    values = {
        result.job.seed: quality.scale * result.measurement.metrics[quality.name]
        for result in _of(name, ranking.results)
        if result.status is Status.DONE
    }
    shown = [
        (text.number(values[seed], reading.decimals) if seed in values else "", values.get(seed))
        for seed in ranking.seeds
    ]
    return MetricRow(name, False, reading.estimate_text, tuple(shown))


def _remarks(ranking: Ranking) -> list[str]:
    remarks = []
    if len(ranking.seeds) == 1:
        remarks.append(
            "One seed gives no interval, so it tells nobody apart: the order may be luck. Run it with more seeds."
        )
    remarks += [
        f"Steps were not timed with {text.count(len(failure.seeds), 'seed')}: {failure.message}"
        for failure in failures_of(_of(TIMING, ranking.results))
    ]
    grid = ranking.setting.learning_rates
    at_an_end = [s.member.name for s in ranking.standings if {min(grid), max(grid)} & set(s.learning_rates)]
    if len(grid) > 1 and at_an_end:
        remarks.append(
            f"The best learning rate lies at an end of the grid, in one seed at least, for {', '.join(at_an_end)}: "
            "a wider grid may bring more."
        )
    return remarks
