"""Full-text search over entries, by SQLite's FTS5."""

from __future__ import annotations

import difflib
import re
import sqlite3
from collections.abc import Iterable, Sequence

from postern.papers._entries import Entry

_COLUMNS = ("slug", "title", "summary", "family", "reported", "statements")
_WEIGHTS = (8.0, 8.0, 3.0, 2.0, 1.0, 1.0)
_MAX_WORDS = 32  # SQLite refuses expressions that nest too deep


def matching(query: str, entries: Sequence[Entry]) -> list[Entry]:
    """The entries that have every word of the query, or a word that begins with it, best first.

    Ranked by BM25; a word in the title weighs more than one in the summary. Anything but letters and digits only
    parts words, so a query has no syntax that it could break.
    """
    words = _words(query)[:_MAX_WORDS]
    if not words:
        return []
    weights = ", ".join(map(str, _WEIGHTS))
    with _index(entries) as connection:
        rows = connection.execute(
            f"SELECT rowid FROM papers WHERE papers MATCH ? ORDER BY bm25(papers, {weights}), rowid",
            [" AND ".join(f'"{word}"*' for word in words)],
        ).fetchall()
    return [entries[row] for (row,) in rows]


def nearest_words(query: str, entries: Sequence[Entry], count: int = 3) -> list[str]:
    """Words of titles, summaries and names that look like those words of the query that find nothing."""
    known = sorted({word for entry in entries for word in _words(f"{entry.slug} {entry.title} {entry.summary}")})
    near: dict[str, None] = {}
    for word in _words(query)[:_MAX_WORDS]:
        if not matching(word, entries):
            near |= dict.fromkeys(difflib.get_close_matches(word, known, n=count, cutoff=0.7))
    return list(near)[:count]


def _index(entries: Iterable[Entry]) -> sqlite3.Connection:
    connection = sqlite3.connect(":memory:")
    # Porter's stemmer lets "pruning" find "pruned"; prefixes let "soft" find "softmax".
    columns = ", ".join(_COLUMNS)
    connection.execute(f"CREATE VIRTUAL TABLE papers USING fts5({columns}, tokenize = 'porter unicode61')")
    rows = [
        (
            row,
            entry.slug,
            entry.title,
            entry.summary,
            entry.family,
            " ".join(entry.reported),
            " ".join(sentence.statement for sentence in entry.claims.values()),
        )
        for row, entry in enumerate(entries)
    ]
    connection.executemany(f"INSERT INTO papers(rowid, {columns}) VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
    return connection


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W_]+", text.lower())
