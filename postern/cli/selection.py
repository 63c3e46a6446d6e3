"""Which papers and claims a command line means, and what completes it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import typer
from rich.console import Console

import postern

if TYPE_CHECKING:
    from postern.claims import Claim, Paper


def complete_paper(incomplete: str) -> list[str]:
    """Complete a paper's slug from the file names of the papers' modules, without importing any."""
    folder = Path(postern.__file__).parent / "papers"
    slugs = (path.stem.replace("_", "-") for path in folder.glob("[a-z]*.py"))
    return sorted(slug for slug in slugs if slug.startswith(incomplete))


def complete_family(incomplete: str) -> list[str]:
    """Complete a family's name from the catalogue."""
    from postern.papers import entries

    return sorted({paper.family for paper in entries() if paper.family.startswith(incomplete)})


def select_claims(names: Sequence[str], family: str | None, everything: bool) -> tuple[Claim, ...]:
    """Return the claims that are meant.

    Args:
        names: papers by slug, or single claims as ``paper/claim``.
        family: all papers of a family.
        everything: all papers.

    Returns:
        The claims, in the catalogue's order; planned papers have none.

    Raises:
        typer.BadParameter: nothing is selected, or a name is unknown; the nearest names are suggested.
    """
    from postern.papers import catalogue

    if everything and (names or family):
        fail("--all means every paper: leave out the names and --family")
    if not (names or family or everything):
        fail("name one or several papers, a --family, or --all; `postern papers` lists them")
    if everything:
        return tuple(claim for paper in catalogue() for claim in paper.claims.values())
    chosen: dict[str, Claim] = {}
    for name in names:
        for claim in _named(name):
            chosen[claim.key] = claim
    if family:
        families = sorted({paper.family for paper in catalogue()})
        if family not in families:
            fail(f"unknown family {family!r}; {nearest(family, families)}")
        for paper in catalogue():
            if paper.family == family:
                chosen |= {claim.key: claim for claim in paper.claims.values()}
    if not chosen:
        asked = [*names, *([f"family {family}"] if family else [])]
        fail(f"{', '.join(asked)}: planned, without claims yet; `postern papers` shows which are written")
    return tuple(chosen.values())


def find_paper(slug: str) -> Paper:
    """Return a paper by its slug.

    Raises:
        typer.BadParameter: unknown; the nearest names are suggested.
    """
    from postern.papers import find

    try:
        return find(slug)
    except ValueError as error:
        fail(str(error))


def _named(name: str) -> list[Claim]:
    slug, _, claim = name.partition("/")
    paper = find_paper(slug)
    if not claim:
        return list(paper.claims.values())
    if claim not in paper.claims:
        fail(f"paper {slug!r} has no claim {claim!r}; {nearest(claim, list(paper.claims))}")
    return [paper.claims[claim]]


def nearest(name: str, known: Sequence[str]) -> str:
    """Return a phrase that suggests names like the one that is unknown."""
    import difflib

    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(close)}?" if close else f"there are: {', '.join(known) or 'none'}"


def fail(message: str) -> NoReturn:
    """End the command as wrongly used (exit code 2)."""
    raise typer.BadParameter(message)


def wide_console() -> Console:
    """Return a console that breaks lines where the terminal does, and not at all in a pipe or a file."""
    console = Console()
    return console if console.is_terminal else Console(width=240)


def print_json(document: Any) -> None:
    """Print a document as one line of JSON."""
    typer.echo(json.dumps(document, ensure_ascii=False))
