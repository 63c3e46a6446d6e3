import contextlib
import importlib
import io
import re
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import postern.papers
from postern.claims import Paper
from postern.errors import MissingExtra
from postern.papers import FAMILIES, Entry, catalogue, entries, find, search, search_entries, similar_words
from postern.papers._entries import entry_of, module_names, parse_entry, read_entry

FOLDER = Path(postern.papers.__file__).parent
NAMES = module_names(FOLDER)
WRITTEN = [entry.slug for entry in entries() if not entry.is_planned]


# -- the records ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", entries(), ids=lambda entry: entry.slug)
def test_a_record_is_complete(entry: Entry) -> None:
    assert entry.title == entry.title.strip()
    assert entry.title
    assert entry.family in FAMILIES
    assert entry.authors is None or 1 <= entry.authors <= 50
    assert entry.reported, "no headline claim"
    sentences = re.split(r"(?<=[.?!])\s+", entry.summary)
    assert 2 <= len(sentences) <= 5, f"{len(sentences)} sentences"
    assert 200 <= len(entry.summary) <= 900
    for text in (entry.summary, *entry.reported):
        assert text.strip() == text
        assert "  " not in text, "two blanks: a broken line of the source"
        assert text[-1] in ".?!"
    assert entry.code is None or re.fullmatch(r"[\w.-]+/[\w.-]+", entry.code)


@pytest.mark.parametrize("entry", entries(), ids=lambda entry: entry.slug)
def test_the_date_fits_the_arxiv_number(entry: Entry) -> None:
    assert date(2012, 1, 1) < entry.date <= date.today()
    if entry.arxiv is not None:
        match = re.fullmatch(r"(\d\d)(0[1-9]|1[0-2])\.(\d{4,5})", entry.arxiv)
        assert match, entry.arxiv
        # A paper that is submitted at the end of a month may be numbered in the next.
        months = (2000 + int(match[1]) - entry.date.year) * 12 + int(match[2]) - entry.date.month
        assert months in (0, 1)


def test_no_two_papers_share_what_is_theirs() -> None:
    for of in ("slug", "title", "arxiv", "summary"):
        values = [getattr(entry, of) for entry in entries() if getattr(entry, of) is not None]
        assert len(set(values)) == len(values), of
    lines = [line for entry in entries() for line in entry.reported]
    assert len(set(lines)) == len(lines)


def test_order_is_by_date() -> None:
    dates = [entry.date for entry in entries()]
    assert dates == sorted(dates)
    assert [paper.slug for paper in catalogue()] == [entry.slug for entry in entries()]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_read_is_what_is_imported(name: str) -> None:
    module = importlib.import_module(f"postern.papers.{name}")
    assert isinstance(module.PAPER, Paper)
    assert read_entry(FOLDER, "postern.papers", name) == entry_of(module)
    assert module.PAPER.is_planned == (not module.PAPER.claims)


@pytest.mark.parametrize("paper", catalogue(), ids=lambda paper: paper.slug)
def test_components_are_there(paper: Paper) -> None:
    assert bool(paper.components) == bool(paper.claims), "parts and claims come together"
    for component in paper.components:
        package, _, name = component.rpartition(".")
        try:
            module = importlib.import_module(package)
        except MissingExtra:
            continue
        assert hasattr(module, name), component


@pytest.mark.parametrize("slug", WRITTEN)
def test_a_written_papers_example_runs(slug: str) -> None:
    paper = find(slug)
    assert paper.details
    assert "import" in paper.example
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(paper.example, f"<example of {slug}>", "exec"), {"__name__": "__main__"})
    assert printed.getvalue().strip(), "an example ends in a print"


def test_listing_imports_no_heavy_library() -> None:
    script = (
        "import sys; from postern.papers import search_entries; assert search_entries('softmax'); "
        "print(sorted({'torch', 'numpy', 'scipy', 'sklearn'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# -- finding --------------------------------------------------------------------------------------------------------


def test_find_gives_the_paper() -> None:
    assert find("gated-attention").arxiv == "2505.06708"


@pytest.mark.parametrize(
    ("slug", "near"),
    [("gated-atention", "gated-attention"), ("zloss", "z-loss"), ("Pv_Tuning", "pv-tuning"), ("adaqant", "adaquant")],
)
def test_an_unknown_slug_gives_the_nearest(slug: str, near: str) -> None:
    with pytest.raises(ValueError, match=rf"no paper is called '{slug}'; did you mean .*{near}"):
        find(slug)


@pytest.mark.parametrize("slug", ["", "qqqqqqqq", "_entries", "__init__"])
def test_a_slug_like_no_other(slug: str) -> None:
    with pytest.raises(ValueError, match="no paper is called"):
        find(slug)


# -- searching ------------------------------------------------------------------------------------------------------


def listed(slug: str, title: str, summary: str) -> Entry:
    return Entry(slug, title, date(2020, 1, 1), None, None, "heads", summary)


SHELF = [
    listed("one", "On trees", "A softmax, two softmaxes, a softmax more: softmax."),
    listed("two", "Softmaxes considered", "About trees."),
    listed("three", "Pruned trees", "Nothing of the kind. Élan."),
]


def found(query: str) -> list[str]:
    return [entry.slug for entry in postern.papers._search.matching(query, SHELF)]


def test_a_prefix_and_a_stem_find_a_word_and_titles_go_first() -> None:
    assert found("softmax") == found("softmaxes") == found("soft") == ["two", "one"]
    assert found("pruning") == ["three"]
    assert found("elan") == ["three"]


def test_all_words_must_be_there() -> None:
    assert set(found("trees")) == {"one", "two", "three"}
    assert found("trees kind") == ["three"]
    assert found("softmax kind") == []


@pytest.mark.parametrize("query", ['"', "'", "softmax OR", "NEAR(", "* trees", "title:x", "-", "a" * 9999, "x " * 9999])
def test_operators_are_no_operators(query: str) -> None:
    assert isinstance(found(query), list)


def test_operators_are_searched_as_words() -> None:
    assert found("trees OR nothing") == []
    assert found('"trees" (softmax)') == found("trees softmax")


@given(st.text(max_size=60))
def test_no_query_crashes(query: str) -> None:
    assert set(found(query)) <= {"one", "two", "three"}


def test_the_catalogue_is_searched() -> None:
    assert "gated-attention" in [paper.slug for paper in search("attention gate")]
    assert search_entries("z-loss")[0].slug == "z-loss"
    assert [paper.slug for paper in search("spiking")] == [entry.slug for entry in search_entries("spiking")]
    assert search("") == []


def test_a_misspelt_word_gives_similar_ones() -> None:
    assert search_entries("sofmax") == []
    assert "softmax" in similar_words("sofmax")
    assert similar_words("softmax") == similar_words("qqqqqqqq") == []


# -- reading modules ------------------------------------------------------------------------------------------------

RECORD = """
PAPER = Paper(slug="a-paper", title="A " "paper", date=date(2020, 2, 3), arxiv=None, authors=None,
              family="heads", summary="It is.")
"""


def test_claims_are_read_without_running_them() -> None:
    entry = parse_entry(
        "import no_such_module\n"
        + RECORD
        + '@PAPER.claim("It holds.", reported="-")\ndef it_holds(config, run):\n    raise SystemExit\n'
    )
    assert (entry.title, entry.date) == ("A paper", date(2020, 2, 3))
    assert {name: claim.statement for name, claim in entry.claims.items()} == {"it-holds": "It holds."}
    assert not entry.is_planned


@pytest.mark.parametrize(
    "source",
    [
        RECORD.replace('"It is."', "f'It is {1}.'"),
        RECORD + "for size in (1, 2):\n    PAPER.claim(str(size))(lambda config, run: {})\n",
        RECORD + "@PAPER.claim(SENTENCE, reported='-')\ndef it_holds(config, run):\n    return {}\n",
        "PAPER = make_paper()\n",
        "",
    ],
)
def test_what_is_no_literal_is_imported(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_papers").mkdir()
    (tmp_path / "some_papers" / "a_paper.py").write_text(source)
    imported = []

    class Module:
        PAPER = Paper("a-paper", "Imported", date(2020, 1, 1), None, None, "heads", "It is.")

    def import_module(name: str) -> type[Module]:
        imported.append(name)
        return Module

    monkeypatch.setattr(importlib, "import_module", import_module)
    assert read_entry(tmp_path / "some_papers", "some_papers", "a_paper").title == "Imported"
    assert imported == ["some_papers.a_paper"]


def test_a_file_is_named_after_its_paper(tmp_path: Path) -> None:
    (tmp_path / "other.py").write_text(RECORD)
    with pytest.raises(ValueError, match=r"other\.py holds the paper 'a-paper'"):
        read_entry(tmp_path, "x", "other")
