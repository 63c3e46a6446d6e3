"""What a paper's module says of itself, read from its text.

Importing the modules would import every library that their experiments use: seconds, for a search that takes
milliseconds. They are all alike, so the record and the claims' sentences can be read without running them. A module
whose record is no plain literal is imported after all.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from datetime import date
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Sentence:
    """A claim's name and its statement."""

    name: str
    statement: str


@dataclass(frozen=True)
class Entry:
    """A paper as it is listed: the fields of its record, and the sentences of its claims.

    The attributes are those of `postern.claims.Paper`; ``claims`` holds sentences instead of experiments.
    """

    slug: str
    title: str
    date: date
    arxiv: str | None
    authors: int | None
    family: str
    summary: str
    reported: tuple[str, ...] = ()
    components: tuple[str, ...] = ()
    code: str | None = None
    details: tuple[str, ...] = ()
    differences: tuple[str, ...] = ()
    example: str = ""
    claims: Mapping[str, Sentence] = field(default_factory=dict)

    @property
    def is_planned(self) -> bool:
        """Whether it has no claims yet."""
        return not self.claims


class _NotPlain(Exception):
    """A record that only running its module can tell."""


def module_names(folder: Path) -> tuple[str, ...]:
    """The names of the papers' modules in a folder, in order; private ones are no papers."""
    return tuple(sorted(item.name for item in pkgutil.iter_modules([str(folder)]) if not item.name.startswith("_")))


def read_entry(folder: Path, package: str, name: str) -> Entry:
    """The entry of the paper in the module ``package.name``, whose file lies in ``folder``.

    Raises:
        ValueError: the module has no record, or one under another slug than its file's name says.
    """
    try:
        entry = parse_entry((folder / f"{name}.py").read_text(encoding="utf-8"))
    except (OSError, _NotPlain):
        entry = entry_of(importlib.import_module(f"{package}.{name}"))
    if entry.slug != name.replace("_", "-"):
        raise ValueError(f"the file {name}.py holds the paper {entry.slug!r}; it belongs into {entry.slug}.py")
    return entry


def entry_of(module: Any) -> Entry:
    """The entry of an imported module."""
    paper = getattr(module, "PAPER", None)
    if paper is None:
        raise ValueError(f"the module {module.__name__} has no PAPER")
    values = {item.name: getattr(paper, item.name) for item in fields(Entry)}
    values["claims"] = {name: Sentence(name, claim.statement) for name, claim in paper.claims.items()}
    return Entry(**values)


def parse_entry(source: str) -> Entry:
    """The entry in the text of a module.

    Raises:
        _NotPlain: the record, or a claim's sentence, is no plain literal.
    """
    tree = ast.parse(source)
    record: dict[str, Any] | None = None
    claims: dict[str, Sentence] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["PAPER"]:
            record = _record(node.value)
        elif isinstance(node, ast.FunctionDef):
            claims.update({sentence.name: sentence for sentence in _sentences(node)})
        elif not isinstance(node, ast.Import | ast.ImportFrom | ast.ClassDef | ast.Assign | ast.AnnAssign | ast.Expr):
            raise _NotPlain  # a loop or a condition may register claims
    if record is None:
        raise _NotPlain
    return Entry(**record, claims=claims)


def _record(call: ast.expr) -> dict[str, Any]:
    if not (isinstance(call, ast.Call) and ast.unparse(call.func) == "Paper" and not call.args):
        raise _NotPlain
    record = {str(keyword.arg): _literal(keyword.value) for keyword in call.keywords}
    known = {item.name for item in fields(Entry)} - {"claims"}
    needed = {item.name for item in fields(Entry) if item.default is MISSING} - {"claims"}
    if not needed <= record.keys() <= known:
        raise _NotPlain
    return record


def _sentences(function: ast.FunctionDef) -> Iterator[Sentence]:
    for decorator in function.decorator_list:
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "PAPER.claim":
            arguments = [*decorator.args, *(item.value for item in decorator.keywords if item.arg == "statement")]
            statement = _literal(arguments[0]) if arguments else None
            if not isinstance(statement, str):
                raise _NotPlain
            yield Sentence(function.name.strip("_").replace("_", "-"), statement)


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "date":
        return date(*(_literal(argument) for argument in node.args))
    try:
        return ast.literal_eval(node)
    except ValueError as error:
        raise _NotPlain from error
