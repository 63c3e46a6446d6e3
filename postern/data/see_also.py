"""A multi-label text set that every installation has: which functions the documentation of libraries sends readers to.

NumPy, SciPy, scikit-learn, matplotlib and NetworkX end a docstring with a section "See Also". A query is a documented
function or class: its library, its name taken apart into words, and the first paragraph of its docstring. Its labels
are the functions that its section names; a label's text is made in the same way from its own docstring. So the set is a
small cousin of LF-AmazonTitles, where a product's labels are related products: about as many labels as queries, a few
a query, chosen by people, most of them rare.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import inspect
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from postern.data.errors import DataUnavailable
from postern.data.multilabel import MultiLabelText

LIBRARIES = ("numpy", "scipy", "sklearn", "matplotlib", "networkx")
SPLITS = ("train", "validation", "test")
FOLDS = 10

_WORDS = re.compile(r"\d+[A-Za-z](?![a-z])|\d+|[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
# Up to the next heading, or a directive that ends the section.
_SECTION = re.compile(r"^See Also\n-{3,}\n(.*?)(?=^\S[^\n]*\n-{3,}$|^\.\. |\Z)", re.DOTALL | re.MULTILINE)
# "name", "name, other : what they do", ":func:`~package.name` : what it does"; what is indented says more about them.
_NAME = r"(?::\w+:)?`?~?\.?[A-Za-z_][\w.]*`?(?:\([^)]*\))?"
_ENTRY = re.compile(rf"^({_NAME}(?:,\s*{_NAME})*),?\s*(?::|$)", re.MULTILINE)


@dataclass(frozen=True)
class _Documented:
    """A function or class: its library, its classes and name, its docstring."""

    library: str
    path: tuple[str, ...]
    docstring: str

    @property
    def key(self) -> tuple[str, str]:
        return self.library, self.path[-1]

    def text(self) -> str:
        paragraph = re.split(r"\n\s*\n", self.docstring.strip(), maxsplit=1)[0]
        return f"{self.library} {' '.join(map(in_words, self.path))}: {' '.join(paragraph.split())}"


@dataclass(frozen=True)
class _Query:
    key: tuple[str, str]
    text: str
    labels: tuple[int, ...]
    own: int | None  # the label that it is itself


@dataclass(frozen=True)
class _References:
    queries: tuple[_Query, ...]
    labels: tuple[str, ...]


def see_also(split: str, fold: int = 0) -> MultiLabelText:
    """Load a split of the installed libraries' functions and the functions that their documentation sends readers to.

    Queries of one library and name (``mean``, and the method ``mean`` of an array) are in one split, by a digest, so
    that versions of the libraries agree on most of it; of ten parts two are for testing, one for validation. Every
    fold takes others. The labels are the same in all splits and folds: all that are named anywhere. A label that has
    the query's own library and name is excluded: it would be found at once.

    Args:
        split: "train", "validation" or "test".
        fold: 0 to 9, for cross-validation.

    Raises:
        ValueError: an unknown split or fold.
        DataUnavailable: the libraries have come without their source.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if not 0 <= fold < FOLDS:
        raise ValueError(f"fold must be in 0..{FOLDS - 1}, got {fold}")
    chosen = [query for query in _references().queries if _split_of(query.key, fold) == split]
    pairs = [(row, label) for row, query in enumerate(chosen) for label in query.labels]
    own = [(row, query.own) for row, query in enumerate(chosen) if query.own is not None]
    (rows, columns), excluded = (
        torch.tensor(listed, dtype=torch.int64).reshape(-1, 2).T.contiguous() for listed in (pairs, own)
    )
    return MultiLabelText(
        tuple(query.text for query in chosen),
        _references().labels,
        rows,
        columns,
        (excluded[0], excluded[1]),
        f"see-also, {split} of fold {fold}",
    )


def in_words(name: str) -> str:
    """Take an identifier apart: ``getDefaultEncoding2`` is "get default encoding 2"; one without words stays."""
    return " ".join(word.lower() for word in _WORDS.findall(name)) or name


def named_in(docstring: str) -> list[str]:
    """The last parts of the names in a docstring's section "See Also", in order."""
    section = _SECTION.search(docstring)
    if section is None:
        return []
    entries = " , ".join(match[1] for match in _ENTRY.finditer(section[1]))
    names = re.findall(r"[A-Za-z_][\w.]*", re.sub(r":\w+:|\([^)]*\)", "", entries))
    return list(dict.fromkeys(name.rstrip(".").rsplit(".", 1)[-1] for name in names))


def _split_of(key: tuple[str, str], fold: int) -> str:
    library, name = key
    # By the words, since two names that differ in case alone (a class and its function) may have the same text.
    part = (hashlib.sha256(f"{library} {in_words(name)}".encode()).digest()[0] + fold) % FOLDS
    return {0: "test", 1: "test", 2: "validation"}.get(part, "train")


@functools.cache
def _references() -> _References:
    documented = [found for library in LIBRARIES for found in _documented_in(library)]
    # Of several that share a name the label is the one that is least nested, and of these the first.
    definitions: dict[tuple[str, str], _Documented] = {}
    for found in sorted(documented, key=lambda found: len(found.path)):
        definitions.setdefault(found.key, found)
    labels_of: dict[tuple[tuple[str, str], str], set[tuple[str, str]]] = defaultdict(set)
    for found in documented:
        named = {(found.library, name) for name in named_in(found.docstring)} & definitions.keys() - {found.key}
        if named:
            labels_of[found.key, found.text()] |= named
    if not labels_of:
        raise DataUnavailable(
            f"see_also reads the docstrings of {', '.join(LIBRARIES)}, and their source is not there; install them in "
            "the ordinary way"
        )
    keys = sorted(set().union(*labels_of.values()))
    index = {key: number for number, key in enumerate(keys)}
    queries = tuple(
        _Query(key, text, tuple(sorted(index[label] for label in named)), index.get(key))
        for (key, text), named in labels_of.items()
    )
    return _References(queries, tuple(definitions[key].text() for key in keys))


def _documented_in(library: str) -> Iterator[_Documented]:
    spec = importlib.util.find_spec(library)
    roots = spec.submodule_search_locations if spec is not None else None
    for root in map(Path, roots or ()):
        for path in sorted(root.rglob("*.py")):
            if "tests" in path.relative_to(root).parts:
                continue
            try:
                source = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            if "See Also" in source:
                yield from _documented_of(library, ast.parse(source), ())


def _documented_of(library: str, parent: ast.AST, path: tuple[str, ...]) -> Iterator[_Documented]:
    for node in ast.iter_child_nodes(parent):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            docstring = ast.get_docstring(node)
            if docstring:
                yield _Documented(library, (*path, node.name), docstring)
            if isinstance(node, ast.ClassDef):
                yield from _documented_of(library, node, (*path, node.name))
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            yield from _added(library, node.value)
        elif isinstance(node, ast.stmt):
            yield from _documented_of(library, node, path)


def _added(library: str, call: ast.Call) -> Iterator[_Documented]:
    """NumPy documents what is written in C by ``add_newdoc(module, name, docstring or (attribute, docstring))``."""
    if not isinstance(call.func, ast.Name) or call.func.id != "add_newdoc" or len(call.args) < 3:
        return
    try:
        _, name, documentation = (ast.literal_eval(argument) for argument in call.args[:3])
    except ValueError:
        return  # put together when it is run
    path, docstring = (
        ((name, documentation[0]), documentation[1]) if isinstance(documentation, tuple) else ((name,), documentation)
    )
    yield _Documented(library, path, inspect.cleandoc(docstring))
