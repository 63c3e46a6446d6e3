"""What the pages show, worked out of papers, outcomes and published evidence before a template sees it."""

from __future__ import annotations

import dataclasses
import inspect
import math
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from markupsafe import Markup

from postern.claims.criteria import AllOf, Criterion, Judgement, Metrics, Verdict, mean_interval
from postern.claims.outcome import JobResult, Outcome, Status
from postern.claims.paper import SCALES, Claim, Paper
from postern.claims.report import charts, figures, highlight, text
from postern.claims.run import Picture

Evidence = Outcome | Mapping[str, Any]

MEANINGS: Mapping[Verdict, str] = {
    Verdict.HOLDS: "The whole 95 % interval passes.",
    Verdict.REFUTED: "The whole 95 % interval fails.",
    Verdict.INCONCLUSIVE: "The 95 % interval neither passes nor fails as a whole.",
    Verdict.ERROR: "A seed ended in an error, so there is no verdict.",
    Verdict.SMOKE: "The code ran through at toy size; the numbers are no evidence.",
    Verdict.NOT_RUN: "It was not measured.",
}

_MEANINGS_OF_PARTS: Mapping[Verdict, str] = {
    Verdict.HOLDS: "The whole 95 % interval of every part passes.",
    Verdict.REFUTED: "The whole 95 % interval of at least one part fails.",
    Verdict.INCONCLUSIVE: "No part fails as a whole, but not every part passes.",
}
_DECIDED = (Verdict.HOLDS, Verdict.REFUTED, Verdict.INCONCLUSIVE, Verdict.ERROR)
_LINE_LENGTH = 88
_REQUIRED = ("paper", "claim", "scale", "verdict")


@runtime_checkable
class _Bounded(Protocol):
    def bounds(self) -> tuple[float, float]: ...


@dataclass(frozen=True)
class MetricRow:
    """One metric over the seeds."""

    name: str
    is_judged: bool
    mean: str
    values: tuple[tuple[str, float | None], ...]


@dataclass(frozen=True)
class FigureView:
    """One figure of a claim."""

    name: str
    identifier: str
    description: str
    figure: figures.InlineFigure | None


@dataclass(frozen=True)
class TableView:
    """One table of a claim: cells as text, with whether a column is numeric."""

    name: str
    columns: tuple[tuple[str, bool], ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Failure:
    """Seeds without a result, for the same reason; the output is the first one's."""

    seeds: tuple[int, ...]
    is_error: bool
    message: str
    output: str


@dataclass(frozen=True)
class Measured:
    """One measurement of a claim: this run's at one scale, or a published one."""

    identifier: str
    is_published: bool
    scale: str
    verdict: Verdict
    meaning: str
    readings: tuple[charts.Reading, ...]
    seeds: tuple[int, ...]
    metrics: tuple[MetricRow, ...]
    facts: tuple[tuple[str, str], ...]
    provenance: tuple[tuple[str, str], ...]
    curves: tuple[charts.CurveChart, ...] = ()
    figures: tuple[FigureView, ...] = ()
    tables: tuple[TableView, ...] = ()
    pictured_seed: int | None = None
    message: str = ""
    failures: tuple[Failure, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def has_evidence(self) -> bool:
        """Whether there is more to see than its head."""
        return bool(self.metrics or self.curves or self.figures or self.tables)

    @property
    def is_smoke(self) -> bool:
        """Whether it only proves that the code runs."""
        return self.scale == "smoke"


@dataclass(frozen=True)
class ClaimView:
    """One claim with all that is known of it.

    Attributes:
        claim: the claim.
        criterion: the parts of its criterion in words.
        verdict: what to say of it in one word.
        standing: where that word comes from: "this run", "published" or "".
        scale: the scale of that measurement, "" if there is none.
        measured: this run's measurements, the largest scale first.
        published: the published ones, the largest scale first.
        configurations: what the experiment is given at each scale.
        source: the experiment's source, or "" where it cannot be read.
    """

    claim: Claim
    criterion: tuple[str, ...]
    verdict: Verdict
    standing: str
    scale: str
    measured: tuple[Measured, ...]
    published: tuple[Measured, ...]
    configurations: tuple[tuple[str, str], ...]
    source: Markup

    @property
    def label(self) -> str:
        """The verdict as a reader sees it."""
        if self.verdict is Verdict.NOT_RUN and not self.measured:
            return "not run yet"
        return str(self.verdict)

    @property
    def measurements(self) -> tuple[Measured, ...]:
        """All of them: this run's, the published ones, smoke runs last."""
        return tuple(sorted((*self.measured, *self.published), key=lambda each: each.is_smoke))


@dataclass(frozen=True)
class PaperView:
    """One paper: a row of the index and a page."""

    paper: Paper
    number: int
    claims: tuple[ClaimView, ...]
    imports: Markup
    example: Markup
    inks: tuple[str, ...]

    @property
    def href(self) -> str:
        """Address of the page, relative to the index."""
        return f"papers/{self.paper.slug}.html"

    @property
    def status(self) -> str:
        """Written or planned."""
        return "planned" if self.paper.is_planned else "written"

    @property
    def verdicts(self) -> tuple[str, ...]:
        """The verdicts of its claims, each once."""
        return tuple(dict.fromkeys(str(view.verdict) for view in self.claims))

    @property
    def searched(self) -> str:
        """What the search looks through."""
        paper = self.paper
        parts = (paper.title, paper.slug, paper.family, paper.summary, paper.arxiv or "")
        return " ".join([*parts, *(view.claim.statement for view in self.claims), *paper.components])


@dataclass(frozen=True)
class Tally:
    """How many claims have a verdict."""

    verdict: Verdict
    claims: int
    published: int


def paper_views(papers: Sequence[Paper], outcomes: Sequence[Outcome], published: Sequence[Evidence]) -> list[PaperView]:
    """Bring papers, outcomes and published evidence together, in the order of the papers.

    Published evidence of papers or claims that are not there any more is left out.

    Raises:
        ValueError: two papers of one slug, an outcome of an unknown paper, two outcomes of one claim at one scale, or
            evidence that lacks what makes it evidence.
    """
    slugs = [paper.slug for paper in papers]
    for slug in slugs:
        if slugs.count(slug) > 1:
            raise ValueError(f"expected every paper once, got {slug!r} {slugs.count(slug)} times")
    ran: dict[tuple[str, str], dict[str, Outcome]] = {}
    for outcome in outcomes:
        if outcome.claim.paper not in slugs:
            raise ValueError(f"got an outcome of {outcome.claim.key}, whose paper is not among the papers to report")
        at_scale = ran.setdefault((outcome.claim.paper, outcome.claim.name), {})
        if outcome.scale in at_scale:
            raise ValueError(f"expected one outcome a scale, got two of {outcome.claim.key} at {outcome.scale}")
        at_scale[outcome.scale] = outcome
    kept: dict[tuple[str, str], list[Evidence]] = {}
    for evidence in published:
        kept.setdefault(_key(evidence), []).append(evidence)
    return [_paper_view(number, paper, ran, kept) for number, paper in enumerate(papers, start=1)]


def tallies(views: Sequence[PaperView]) -> list[Tally]:
    """Count the claims by verdict, in the order of the verdicts, those that occur."""
    claims = [claim for view in views for claim in view.claims]
    counted = [
        Tally(
            verdict,
            sum(claim.verdict is verdict for claim in claims),
            sum(claim.verdict is verdict and claim.standing == "published" for claim in claims),
        )
        for verdict in Verdict
    ]
    return [tally for tally in counted if tally.claims]


def import_lines(components: Sequence[str]) -> str:
    """Write the import statements that bring in dotted public names, one a module."""
    by_module: dict[str, list[str]] = {}
    for component in components:
        module, _, name = component.rpartition(".")
        by_module.setdefault(module, []).append(name)
    lines = []
    for module, names in by_module.items():
        line = f"from {module} import {', '.join(names)}" if module else f"import {', '.join(names)}"
        if module and len(line) > _LINE_LENGTH:
            line = "\n".join([f"from {module} import (", *(f"    {name}," for name in names), ")"])
        lines.append(line)
    return "\n".join(lines)


def _key(evidence: Evidence) -> tuple[str, str]:
    if isinstance(evidence, Outcome):
        return evidence.claim.paper, evidence.claim.name
    missing = [key for key in _REQUIRED if not isinstance(evidence.get(key), str)]
    if missing:
        raise ValueError(f"published evidence needs the text entries {', '.join(_REQUIRED)}; {missing[0]!r} is missing")
    return evidence["paper"], evidence["claim"]


def _paper_view(
    number: int,
    paper: Paper,
    ran: Mapping[tuple[str, str], Mapping[str, Outcome]],
    kept: Mapping[tuple[str, str], Sequence[Evidence]],
) -> PaperView:
    claims = tuple(
        _claim_view(claim, ran.get((paper.slug, claim.name), {}), kept.get((paper.slug, claim.name), ()))
        for claim in paper.claims.values()
    )
    measured = [each for view in claims for each in (*view.measured, *view.published)]
    return PaperView(
        paper=paper,
        number=number,
        claims=claims,
        imports=highlight.python(import_lines(paper.components)),
        example=highlight.python(paper.example.strip("\n")),
        inks=inks_of([view for each in measured for view in each.figures]),
    )


def _claim_view(claim: Claim, ran: Mapping[str, Outcome], kept: Sequence[Evidence]) -> ClaimView:
    measured = sorted((_from_outcome(outcome, is_published=False) for outcome in ran.values()), key=_by_scale)
    published = sorted(
        (
            _from_outcome(evidence, is_published=True)
            if isinstance(evidence, Outcome)
            else _from_document(claim, evidence, index)
            for index, evidence in enumerate(kept)
        ),
        key=_by_scale,
    )
    standing, source = _standing(measured, published)
    return ClaimView(
        claim=claim,
        criterion=tuple(map(text.in_words, _parts(claim.holds_when))),
        verdict=source.verdict if source else Verdict.NOT_RUN,
        standing=standing,
        scale=source.scale if source else "",
        measured=tuple(measured),
        published=tuple(published),
        configurations=tuple((scale, _configuration(claim.scales[scale])) for scale in SCALES if scale in claim.scales),
        source=_source(claim),
    )


def _by_scale(measured: Measured) -> int:
    return -SCALES.index(measured.scale)


def _standing(measured: Sequence[Measured], published: Sequence[Measured]) -> tuple[str, Measured | None]:
    """Choose the measurement that speaks for a claim.

    This run's, at the largest scale that came to a verdict or an error; else published evidence, which is never a smoke
    run; else whatever this run has.
    """
    for each in measured:
        if each.verdict in _DECIDED:
            return "this run", each
    for each in published:
        if each.verdict in _DECIDED:
            return "published", each
    return ("this run", measured[-1]) if measured else ("", None)


def _from_outcome(outcome: Outcome, *, is_published: bool) -> Measured:
    claim = outcome.claim
    origin = "published" if is_published else "run"
    identifier = f"measured-{claim.name}-{origin}-{outcome.scale}"
    verdict = _shown(outcome.verdict, outcome.scale)
    done = [result for result in outcome.results if result.status is Status.DONE]
    pictured = next((r for r in done if r.measurement.figures or r.measurement.tables), None)
    readings: tuple[charts.Reading, ...] = ()
    if outcome.judgement is not None:
        readings = tuple(_readings(outcome.judgement, _bounds(claim.holds_when)))
    jobs = [result.job for result in outcome.results]
    facts = [
        ("Seeds", text.seed_list([job.seed for job in jobs]) if jobs else "none"),
        ("Time", text.duration(outcome.seconds) if outcome.seconds else ""),
        ("Device", ", ".join(sorted({device_in_words(job.device, job.threads) for job in jobs}))),
        ("Date", max(r.finished for r in outcome.results).date().isoformat() if jobs else ""),
    ]
    configuration = claim.scales.get(outcome.scale)
    return Measured(
        identifier=identifier,
        is_published=is_published,
        scale=outcome.scale,
        verdict=verdict,
        meaning=_meaning(verdict, len(done), len(readings)),
        readings=readings,
        seeds=tuple(outcome.metrics),
        metrics=_metric_rows(outcome.metrics, claim.holds_when),
        facts=known_facts(facts),
        provenance=known_facts([("Configuration", _configuration(configuration))]),
        curves=tuple(charts.curve_charts({r.job.seed: r.measurement.logs for r in done})),
        figures=tuple(figure_views(pictured.measurement.figures, identifier)) if pictured else (),
        tables=tuple(table_views(pictured.measurement.tables)) if pictured else (),
        pictured_seed=pictured.job.seed if pictured and len(done) > 1 else None,
        message=outcome.message,
        failures=tuple(failures_of(outcome.results)),
    )


def _from_document(claim: Claim, document: Mapping[str, Any], index: int) -> Measured:
    scale = document["scale"]
    if scale not in SCALES:
        raise ValueError(f"published evidence of {claim.key}: unknown scale {scale!r}; scales are {', '.join(SCALES)}")
    try:
        verdict = _shown(Verdict(document["verdict"]), scale)
    except ValueError:
        known = ", ".join(Verdict)
        raise ValueError(
            f"published evidence of {claim.key}: unknown verdict {document['verdict']!r}; verdicts are {known}"
        ) from None
    metrics = _metrics_by_seed(claim, document)
    seeds = list(metrics) or [int(seed) for seed in document.get("seeds") or ()]
    judgement = _published_judgement(claim, document, verdict)
    criterion = str(document.get("criterion", ""))
    versions = document.get("versions")
    if isinstance(versions, Mapping):
        versions = ", ".join(f"{name} {version}" for name, version in versions.items())
    seconds = document.get("seconds")
    facts = [
        ("Seeds", text.seed_list(seeds)),
        ("Time", text.duration(float(seconds)) if seconds is not None else ""),
        ("Device", device_in_words(str(document.get("device") or ""), document.get("threads"))),
        ("Date", str(document.get("date") or "")),
    ]
    provenance = [
        ("Configuration", _configuration(document.get("configuration"))),
        ("Processor", str(document.get("processor") or "")),
        ("Versions", str(versions or "")),
        ("Commit", str(document.get("commit") or "")[:12]),
    ]
    remarks = []
    if str(document.get("statement", claim.statement)) != claim.statement:
        remarks.append(f"It was measured for an earlier wording: “{document['statement']}”")
    if criterion and criterion != claim.holds_when.describe():
        remarks.append(f"It was judged by an earlier criterion: {text.in_words(criterion)}")
    earlier = [str(entry["verdict"]) for entry in document.get("history") or ()]
    if earlier:
        remarks.append(f"Earlier publications of this claim, newest first: {', '.join(earlier)}")
    readings = tuple(_readings(judgement, _bounds(claim.holds_when))) if judgement else ()
    return Measured(
        identifier=f"measured-{claim.name}-published-{scale}-{index}",
        is_published=True,
        scale=scale,
        verdict=verdict,
        meaning=_meaning(verdict, len(seeds), len(readings)),
        readings=readings,
        seeds=tuple(metrics),
        metrics=_metric_rows(metrics, claim.holds_when),
        facts=known_facts(facts),
        provenance=known_facts(provenance),
        tables=tuple(table_views(document.get("tables") or {})),
        pictured_seed=seeds[0] if seeds else None,
        message=str(document.get("message") or ""),
        remarks=tuple(remarks),
    )


def known_facts(facts: Sequence[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """Leave out the facts that are empty."""
    return tuple((name, value) for name, value in facts if value)


def _shown(verdict: Verdict, scale: str) -> Verdict:
    """Return the verdict to show: whatever the numbers of a smoke run say, they are no evidence."""
    return Verdict.SMOKE if scale == "smoke" and verdict not in (Verdict.ERROR, Verdict.NOT_RUN) else verdict


def _meaning(verdict: Verdict, seeds: int, parts: int) -> str:
    if verdict is Verdict.INCONCLUSIVE and seeds == 1:
        return "One seed gives no interval, so nothing can be concluded."
    return (_MEANINGS_OF_PARTS if parts > 1 else MEANINGS).get(verdict, MEANINGS[verdict])


def device_in_words(device: str, threads: object) -> str:
    """Write a device with its threads: "cpu, 2 threads"."""
    return device if not threads else f"{device}, {text.count(int(str(threads)), 'thread')}"


def _metrics_by_seed(claim: Claim, document: Mapping[str, Any]) -> dict[int, dict[str, float]]:
    """Read the metrics of a document: a mapping by seed, or a list in the order of its seeds."""
    metrics = document.get("metrics") or {}
    if not isinstance(metrics, Mapping):
        metrics = dict(zip(document.get("seeds") or range(len(metrics)), metrics, strict=True))
    try:
        return {
            int(seed): {str(name): float(value) for name, value in values.items()} for seed, values in metrics.items()
        }
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"published evidence of {claim.key}: expected metrics by seed, got {metrics!r}") from error


def _readings(judgement: Judgement, bounds: Mapping[str, tuple[float, float]]) -> Iterator[charts.Reading]:
    """Yield a reading for each part that compares one number with bounds."""
    for part in judgement.parts:
        yield from _readings(part, bounds)
    if not judgement.parts:
        floor, ceiling = bounds.get(judgement.criterion, (None, None))
        yield charts.Reading(
            criterion=text.in_words(judgement.criterion),
            estimate=judgement.estimate,
            low=judgement.interval[0],
            high=judgement.interval[1],
            floor=floor,
            ceiling=ceiling,
            verdict=str(judgement.verdict),
        )


def _bounds(criterion: Criterion) -> dict[str, tuple[float, float]]:
    """Return the bounds of a criterion's parts by their descriptions."""
    if isinstance(criterion, AllOf):
        return {words: bounds for part in criterion.parts for words, bounds in _bounds(part).items()}
    return {criterion.describe(): criterion.bounds()} if isinstance(criterion, _Bounded) else {}


def _parts(criterion: Criterion) -> list[str]:
    """Return the descriptions of a criterion's parts."""
    if isinstance(criterion, AllOf):
        return [words for part in criterion.parts for words in _parts(part)]
    return [criterion.describe()]


def _published_judgement(claim: Claim, document: Mapping[str, Any], verdict: Verdict) -> Judgement | None:
    """Read the judgement that a document holds; its parts are documents of the same kind."""
    if document.get("estimate") is None:
        return None
    low, high = document.get("interval") or (None, None)
    try:
        judged = (_published_judgement(claim, part, Verdict(part["verdict"])) for part in document.get("parts") or ())
        return Judgement(
            verdict=verdict,
            estimate=float(document["estimate"]),
            interval=(-math.inf if low is None else float(low), math.inf if high is None else float(high)),
            criterion=str(document.get("criterion", "")),
            parts=tuple(part for part in judged if part is not None),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"published evidence of {claim.key}: its estimate or interval is unreadable: {error}"
        ) from error


def failures_of(results: Sequence[JobResult]) -> Iterator[Failure]:
    """Yield the failures among results, those of one reason together."""
    alike: dict[tuple[Status, str], list[JobResult]] = {}
    for result in results:
        if result.status is not Status.DONE:
            alike.setdefault((result.status, result.message), []).append(result)
    for (status, message), failed in alike.items():
        seeds = tuple(result.job.seed for result in failed)
        yield Failure(seeds, status is Status.ERROR, message, text.terminal_output(failed[0].output))


def _metric_rows(metrics: Mapping[int, Metrics], criterion: Criterion) -> tuple[MetricRow, ...]:
    judged = criterion.metrics()
    names = list(dict.fromkeys(name for values in metrics.values() for name in values))
    rows = []
    for name in sorted(names, key=lambda name: name not in judged):
        values = [values.get(name) for values in metrics.values()]
        known = [value for value in values if value is not None]
        mean, low, high = mean_interval(known)
        decimals = None if all(float(value).is_integer() for value in known) else text.shared_decimals(mean, low, high)
        shown = tuple(("" if value is None else text.number(value, decimals), value) for value in values)
        mean_text = text.number(mean) if decimals is None else text.number(mean, decimals)
        rows.append(MetricRow(name, name in judged, mean_text, shown))
    return tuple(rows)


def inks_of(views: Iterable[FigureView]) -> tuple[str, ...]:
    """Return the colours of figures, which a page sets anew in the dark theme."""
    return tuple(sorted({ink for view in views if view.figure for ink in view.figure.colours}))


def figure_views(pictures: Mapping[str, Picture], prefix: str) -> Iterator[FigureView]:
    """Yield what a page shows of figures.

    Args:
        pictures: the figures by name.
        prefix: begins their identifiers, which are unique on a page.
    """
    for index, (name, picture) in enumerate(pictures.items()):
        identifier = f"{prefix}-figure-{index}"
        try:
            figure = figures.inline(picture.svg, identifier, f"{identifier}-caption")
        except ValueError:
            figure = None
        yield FigureView(name, identifier, picture.description, figure)


def table_views(tables: Mapping[str, Sequence[Mapping[str, object]]]) -> Iterator[TableView]:
    """Yield what a page shows of tables by name."""
    for name, rows in tables.items():
        columns = tuple((column, all(_is_number(row[column]) for row in rows)) for column in rows[0])
        cells = tuple(tuple(_cell(row[column]) for column, _ in columns) for row in rows)
        yield TableView(name, columns, cells)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _cell(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return text.number(value) if isinstance(value, int | float) else str(value)


def _configuration(configuration: object) -> str:
    """Write what an experiment is given: the entries of a dataclass or a mapping, or the thing itself."""
    if dataclasses.is_dataclass(configuration) and not isinstance(configuration, type):
        configuration = {field.name: getattr(configuration, field.name) for field in dataclasses.fields(configuration)}
    if isinstance(configuration, Mapping):
        return ", ".join(f"{name} = {value}" for name, value in configuration.items())
    return "" if configuration is None else str(configuration)


def _source(claim: Claim) -> Markup:
    try:
        source = inspect.getsource(claim.experiment)
    except (OSError, TypeError):
        return Markup("")
    return highlight.python(textwrap.dedent(source).strip("\n"))
