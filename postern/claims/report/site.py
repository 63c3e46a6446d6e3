"""Writing the site: every page is rendered first, then put in place, the index last.

A page carries its own style sheet and script, so a page is either the old one or the new one, never a mixture, and the
index links only to pages that are there. The pages' content security policy forbids every request and every script but
their own.
"""

from __future__ import annotations

import base64
import calendar
import functools
import hashlib
import os
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from datetime import date
from pathlib import Path

import jinja2
from markupsafe import Markup, escape

from postern.claims.comparison import Place, Ranking
from postern.claims.criteria import Verdict
from postern.claims.outcome import Outcome
from postern.claims.paper import Paper
from postern.claims.report import charts, colours, figures, rankings, text, views

GENERATOR = "postern"

_HERE = Path(__file__).parent
_MARK = f'<meta name="generator" content="{GENERATOR}">'
_CODE = re.compile(r"`([^`]+)`")


def write_report(
    folder: Path,
    papers: Sequence[Paper],
    outcomes: Sequence[Outcome],
    published: Sequence[views.Evidence] = (),
    environment: Mapping[str, str] | None = None,
    comparisons: Sequence[Ranking] = (),
) -> Path:
    """Write the report of a run as a static site that opens from the file system.

    The folder may hold a former report, which is updated: pages whose content stays are not touched, pages of papers
    and comparisons that are gone are removed, other files are left alone. Interrupted at any moment, the index that is
    there is whole and its links lead to pages.

    Args:
        folder: where the site goes; made if it is not there.
        papers: the catalogue, in the order that numbers them; those without claims are shown as planned.
        outcomes: what was run, at most one outcome for a claim and a scale.
        published: published evidence, as outcomes or as the ledger's documents; shown beside this run's outcomes.
        environment: what the run took place on, e.g. ``{"processor": "...", "torch": "2.13.0"}``.
        comparisons: how members of families compare, in the order that the index lists them.

    Returns:
        The path of ``index.html``.

    Raises:
        ValueError: papers, outcomes or evidence that contradict each other, or a comparison given twice. Nothing has
            been written then.
    """
    shown = views.paper_views(papers, outcomes, published)
    compared = rankings.ranking_views(comparisons, papers)
    templates = _templates()
    common = {"environment": dict(environment or {}), "papers": shown}
    pages = {
        view.href: templates.get_template("paper.html").render(
            common | {"view": view, "root": "../", "inks": _inks(view.inks)}
        )
        for view in shown
    } | {
        view.href: templates.get_template("comparison.html").render(
            common | {"view": view, "root": "../", "inks": _inks(view.inks)}
        )
        for view in compared
    }
    families = sorted({paper.family for paper in papers})
    index = templates.get_template("index.html").render(
        common
        | {"root": "", "inks": "", "tallies": views.tallies(shown), "families": families, "comparisons": compared}
    )

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, page in pages.items():
        (folder / name).parent.mkdir(exist_ok=True)
        _put(folder / name, page)
    _put(folder / "index.html", index)
    for path in (*folder.glob("papers/*.html"), *folder.glob("comparisons/*.html")):
        is_ours = _MARK in path.read_text(encoding="utf-8", errors="replace")
        if is_ours and path.relative_to(folder).as_posix() not in pages:
            path.unlink()
    return folder / "index.html"


def _put(path: Path, page: str) -> None:
    """Replace a file by one rename, unless it already says the same."""
    content = page.encode()
    if path.is_file() and path.read_bytes() == content:
        return
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@functools.cache
def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    scripts = {name: (_HERE / f"{name}.js").read_text(encoding="utf-8").strip() for name in ("theme", "report")}
    environment.globals |= {
        "generator": GENERATOR,
        "style": Markup((_HERE / "style.css").read_text(encoding="utf-8")),
        "scripts": {name: Markup(script) for name, script in scripts.items()},
        "policy": _policy(scripts.values()),
        "Place": Place,
        "Verdict": Verdict,
        "meanings": views.MEANINGS,
        "place_names": rankings.PLACE_NAMES,
        "interval_plot": charts.interval_plot,
        "shapes": charts.SHAPES,
        "count": text.count,
    }
    environment.filters |= {"prose": _prose, "sentence": _sentence, "kebab": _kebab, "day": _day}
    return environment


def _policy(scripts: Iterable[str]) -> str:
    """Return a content security policy under which nothing is fetched and only our own scripts run."""
    digests = [hashlib.sha256(script.encode()).digest() for script in scripts]
    sources = " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {sources}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _inks(inks: Sequence[str]) -> Markup:
    """Return the declarations that set a page's figure colours anew in the dark theme."""
    return Markup("").join(
        Markup("{}: {}; ").format(figures.colour_property(ink), colours.in_the_dark(ink)) for ink in inks
    )


def _prose(words: str) -> Markup:
    """Escape a text and set what it has between backticks as code."""
    return Markup(_CODE.sub(r"<code>\1</code>", str(escape(words))))


def _sentence(words: object) -> str:
    """Begin with a capital letter."""
    return str(words)[:1].upper() + str(words)[1:]


def _kebab(words: object) -> str:
    """Return the name of a class in the style sheet."""
    return str(words).replace(" ", "-")


def _day(day: date) -> str:
    """Write a date as "14 April 2017"."""
    return f"{day.day} {calendar.month_name[day.month]} {day.year}"
