"""The catalogue: one module a paper, each with its record and its claims."""

from __future__ import annotations

import difflib
import functools
import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from postern.papers._entries import Entry, Sentence, module_names, read_entry
from postern.papers._families import FAMILIES
from postern.papers._search import matching, nearest_words

if TYPE_CHECKING:
    from postern.claims import Paper

__all__ = ["FAMILIES", "Entry", "Sentence", "catalogue", "entries", "find", "search", "search_entries", "similar_words"]

_FOLDER = Path(__file__).parent


@functools.cache
def entries() -> tuple[Entry, ...]:
    """Every paper as it is listed, oldest first; imports no paper, so it is fast."""
    listed = (read_entry(_FOLDER, __name__, name) for name in module_names(_FOLDER))
    return tuple(sorted(listed, key=lambda entry: (entry.date, entry.slug)))


def catalogue() -> tuple[Paper, ...]:
    """Every paper with its claims, oldest first; imports all their modules."""
    return tuple(_paper(entry.slug) for entry in entries())


def find(slug: str) -> Paper:
    """The paper called ``slug``; imports its module alone.

    Raises:
        ValueError: no such paper; the nearest names are suggested.
    """
    known = [name.replace("_", "-") for name in module_names(_FOLDER)]
    if slug in known:
        return _paper(slug)
    near = difflib.get_close_matches(slug.lower().replace("_", "-"), known, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else "`postern papers` lists them all"
    raise ValueError(f"no paper is called {slug!r}; {hint}")


def search(query: str) -> list[Paper]:
    """The papers that have every word of the query in title, summary, name or claims, best first.

    A word also finds what begins with it and what shares its stem. Nothing found: see `similar_words`.
    """
    return [_paper(entry.slug) for entry in search_entries(query)]


def search_entries(query: str) -> list[Entry]:
    """As `search`, without importing the papers."""
    return matching(query, entries())


def similar_words(query: str) -> list[str]:
    """Words of the catalogue that look like those words of the query that find nothing."""
    return nearest_words(query, entries())


def _paper(slug: str) -> Paper:
    module = importlib.import_module(f"{__name__}.{slug.replace('-', '_')}")
    paper: Paper = module.PAPER
    return paper
