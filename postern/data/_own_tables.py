"""Read a user's own tables, and encode their columns as numbers."""

from __future__ import annotations

import csv
import difflib
import io
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from postern.data._own_text import read_utf8
from postern.data.errors import InvalidData
from postern.data.kinds import Table
from postern.data.splitting import apportion

Cell = str | int | float | bool | None  # None: no value

# One-hot encoding spends a column on each word.
_MOST_WORDS = 50
_MOST_LEVELS = 10  # so many numbers may be classes, whatever they look like
_DELIMITERS = {",": "comma", ";": "semicolon", "\t": "tab"}
_SNIFFED_ROWS = 20
_DECIMAL_COMMA = re.compile(r"^([+-]?\d*),(\d+(?:[eE][+-]?\d+)?)$")
_MISSING = frozenset({"", "na", "n/a", "nan", "null", "?"})
_SHORTEST_COUNTER = 10  # fewer rows count up by chance
_ID_NAME = re.compile(r"(?i:(?:^|[\W_])(?:id|idx|index|row)$)|[a-z]I[dD]$")
_FILL_IN = "Fill it in, or remove the row or the column: postern guesses no values."


@dataclass(frozen=True)
class Grid:
    """A table as it was read.

    Attributes:
        names: of the columns, all different.
        columns: for each name its cells.
        places: for each row its file and where it is there ("line 7").
        label_names: for a label column of numbers that stand for names, these names.
    """

    names: tuple[str, ...]
    columns: Mapping[str, Sequence[Cell]]
    places: Sequence[tuple[Path, str]]
    label_names: Mapping[str, tuple[str, ...]]

    def __len__(self) -> int:
        return len(self.places)

    @property
    def path(self) -> Path:
        """The (first) file."""
        return self.places[0][0]


def read_delimited(path: Path) -> Grid:
    """Read a table of text, with a header, whose cells are delimited by commas, semicolons or tabs.

    Where semicolons delimit, a comma in a number is a decimal comma, as spreadsheets write it in half of Europe.

    Raises:
        InvalidData: no UTF-8, no header, duplicate names, or rows of another length than the header.
    """
    content = read_utf8(path, remedy="Save it as CSV in UTF-8.")
    delimiter = _sniff(content, "\t,;" if path.suffix.lower() == ".tsv" else ",;\t")
    reader = _reader(content, delimiter)
    names: tuple[str, ...] = ()
    rows: list[list[str]] = []
    places: list[tuple[Path, str]] = []
    before = 0
    try:
        for cells in reader:
            line, before = before + 1, reader.line_num
            cells = [cell.strip() for cell in cells]
            if not any(cells):
                continue  # spreadsheets leave empty rows at the end
            if not names:
                names = _check_names(path, cells)
                continue
            if len(cells) != len(names):
                raise InvalidData(
                    path,
                    f"line {line} has {len(cells)} cells",
                    f"{len(names)} in every line, as in the header (the delimiter is the {_DELIMITERS[delimiter]})",
                    f"Put a cell that contains a {_DELIMITERS[delimiter]} into quotation marks.",
                )
            rows.append(cells)
            places.append((path, f"line {line}"))
    except csv.Error as error:
        raise InvalidData(
            path,
            f"the row that begins in line {before + 1} is no CSV ({error})",
            'cells with a quotation mark written as "a ""quoted"" word"',
            "Check the quotation marks from that line on.",
        ) from error
    if len(rows) < 2:
        raise InvalidData(
            path,
            f"{len(rows) or 'no'} row{'s' * (len(rows) != 1)} below the header",
            "at least two rows in each of two classes",
            "Add rows.",
        )
    columns = dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
    if delimiter == ";":
        columns = {name: [_DECIMAL_COMMA.sub(r"\1.\2", cell) for cell in cells] for name, cells in columns.items()}
    return Grid(names, columns, places, {})


def _reader(content: str, delimiter: str) -> csv.Reader:
    # A quotation mark that is never closed would make one cell of the rest of the file, were it not for `strict`.
    return csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)


def _sniff(content: str, delimiters: str) -> str:
    """The delimiter that cuts the first rows into the same number of cells, and into most."""

    def quality(delimiter: str) -> tuple[bool, int]:
        counts: list[int] = []
        try:
            for cells in _reader(content, delimiter):
                if cells:
                    counts.append(len(cells))
                if len(counts) == _SNIFFED_ROWS:
                    break
        except csv.Error:
            return False, counts[0] if counts else 0
        return counts[0] > 1 and len(set(counts)) == 1, counts[0]

    return max(delimiters, key=quality)


def _check_names(path: Path, cells: Sequence[str]) -> tuple[str, ...]:
    # A table that was saved with its index has one column without a name.
    names = tuple(name or f"column {index + 1}" for index, name in enumerate(cells))
    if len(names) < 2:
        raise InvalidData(
            path,
            f"only one column, {_listed(names)}",
            "a label column and at least one other, delimited by commas, semicolons or tabs",
            "Check the delimiter.",
        )
    numbers = [_number(name) for name in names]
    counted = [float(name) for name in range(len(names))]
    if None not in numbers and numbers not in (counted, [number + 1 for number in counted]):
        raise InvalidData(
            path, f"a first line of numbers, {_listed(names)}", "a header with the columns' names", "Add one."
        )
    duplicates = [name for name, count in Counter(names).items() if count > 1]
    if duplicates:
        raise InvalidData(
            path,
            f"{names.count(duplicates[0])} columns called {duplicates[0]!r}",
            "another name for each column",
            "Rename or remove all but one.",
        )
    return names


def join(grids: Sequence[Grid]) -> Grid:
    """The rows of tables with the same columns, one table after the other.

    Raises:
        InvalidData: one has other columns than the first.
    """
    first = grids[0]
    for grid in grids[1:]:
        if set(grid.names) != set(first.names):
            odd = sorted(set(grid.names) ^ set(first.names))
            raise InvalidData(
                grid.path,
                f"other columns than in {first.path}: {_listed(odd)} in one of them only",
                f"the columns {_listed(first.names)}",
                "Give one file, or make the columns the same.",
            )
    columns = {name: [cell for grid in grids for cell in grid.columns[name]] for name in first.names}
    places = [place for grid in grids for place in grid.places]
    return Grid(first.names, columns, places, first.label_names)


def encode_tables(
    grids: Mapping[str, Grid], names: Mapping[str, str], label: str | None, limit: int | None
) -> dict[str, Table]:
    """Encode tables with the same columns in the same way.

    Args:
        grids: the tables; the classes are those of the first.
        names: for each table, the name for the reader.
        label: the column of the classes.
        limit: at most so many rows of each table, the first of each class, in proportion to the classes' sizes.

    Raises:
        InvalidData: see `postern.data.load_own`.
    """
    joined = join(list(grids.values()))
    label = check_label(joined.path, joined.names, label)
    _check_complete(joined)
    features, feature_names, dropped = _encode_features(joined, label)
    if not features:
        raise InvalidData(
            joined.path,
            f"no column to tell the classes by besides the label {label!r}"
            + (f", without {dropped}" if dropped else ""),
            f"columns of numbers, or of at most {_MOST_WORDS} different words",
            "Add one.",
        )
    matrix = np.stack(features, axis=1)
    class_names, targets = encode_labels(grids, label)
    tables = {}
    start = 0
    for key, target in targets.items():
        rows = draw(target, limit)
        name = f"{names[key]} (without {dropped})" if dropped else names[key]
        tables[key] = Table(matrix[start + rows], target[rows], tuple(feature_names), class_names, name)
        start += len(target)
    return tables


def encode_labels(grids: Mapping[str, Grid], label: str) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """The classes of the first table, sorted (numbers by value), and for each row of all tables the index of its class.

    Raises:
        InvalidData: labels that are no classes, or one of a later table that is none of the first's classes.
    """
    first = next(iter(grids.values()))
    words = {key: _label_words(grid, label) for key, grid in grids.items()}
    class_names = _name_classes(first, label, next(iter(words.values())))
    index = {name: number for number, name in enumerate(class_names)}
    for key, grid in grids.items():
        for word, (path, place) in zip(words[key], grid.places, strict=True):
            if word not in index:
                raise InvalidData(
                    path,
                    f"{place} has the label {word!r} in the column {label!r}",
                    f"one of the classes to train on, {_listed(class_names)}",
                    "Correct it, remove the row, or give the file to train on alone.",
                )
    return class_names, {key: np.array([index[word] for word in part], dtype=np.int64) for key, part in words.items()}


def check_label(path: Path, names: Sequence[str], label: str | None) -> str:
    """The label column.

    Raises:
        InvalidData: none was named, or none has this name.
    """
    expected = "the name of the column that holds the classes"
    # Perhaps there is no header.
    headless = " (the first line holds the names; does it?)" if any(_number(name) is not None for name in names) else ""
    if label is None:
        raise InvalidData(
            path,
            f"a table with the columns {_listed(names)}{headless}, and no label named",
            expected,
            "Name it: --label COLUMN, or label=... in Python.",
        )
    if label in names:
        return label
    lower = {name.lower(): name for name in names}
    near = [lower[name] for name in difflib.get_close_matches(label.strip().lower(), lower, n=3, cutoff=0.5)]
    hint = f"Did you mean {' or '.join(map(repr, near))}?" if near else "Choose one of them."
    raise InvalidData(path, f"no column {label!r} among {_listed(names)}{headless}", expected, hint)


def _name_classes(grid: Grid, label: str, words: Sequence[str]) -> tuple[str, ...]:
    counts = Counter(words)
    numbers = {word: _number(word) for word in counts}
    is_numeric = None not in numbers.values()
    if len(counts) < 2:
        raise InvalidData(
            grid.path,
            f"the label column {label!r} holds {words[0]!r} in every row",
            "at least two classes",
            "Name another column, or add rows of another class.",
        )
    is_regression = (
        len(counts) > _MOST_LEVELS and is_numeric and not all(word.lstrip("+-").isdigit() for word in counts)
    )
    if is_regression or len(counts) == len(words) or (len(counts) > _MOST_LEVELS and 2 * len(counts) > len(words)):
        looks = "a value to regress, or an id," if is_numeric else "an id or a free text,"
        raise InvalidData(
            grid.path,
            f"the label column {label!r} holds {len(counts)} different values in {len(words)} rows: "
            f"it looks like {looks} rather than a class",
            "a few classes with several rows each",
            "Name another column, or sort its values into classes.",
        )
    single = sorted(word for word, count in counts.items() if count < 2)
    if single:
        raise InvalidData(
            grid.path,
            f"a single row of {'each of the classes' if len(single) > 1 else 'the class'} {_listed(single)} "
            f"in the column {label!r}",
            "at least two rows of each class",
            "Add rows, remove these, or join the small classes in one.",
        )
    if label in grid.label_names:
        return tuple(name for name in grid.label_names[label] if name in counts)
    return tuple(sorted(counts, key=lambda word: (numbers[word], word) if is_numeric else word))


def _label_words(grid: Grid, label: str) -> list[str]:
    names = grid.label_names.get(label, ())
    words = []
    for row, value in enumerate(grid.columns[label]):
        if _is_missing(value):
            path, place = grid.places[row]
            raise InvalidData(
                path, f"{place} has no label in the column {label!r}", "a label in every row", "Remove the row."
            )
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        words.append(names[value] if isinstance(value, int) and 0 <= value < len(names) else str(value))
    return words


def draw(classes: np.ndarray, limit: int | None) -> np.ndarray:
    """Which examples to take where at most ``limit`` are wanted: the first of each class, in proportion, at least two.

    The first ones of all would be of one class wherever the examples are sorted by class.

    Raises:
        ValueError: a limit below twice the number of classes.
    """
    if limit is None or limit >= len(classes):
        return np.arange(len(classes))
    present, counts = np.unique(classes, return_counts=True)
    least = [min(2, count) for count in counts.tolist()]
    if limit < sum(least):
        raise ValueError(f"limit={limit} is too small for {len(present)} classes; it is at least {sum(least)}")
    sizes = apportion(limit, (counts / len(classes)).tolist(), at_least=min(least))
    chosen = [np.flatnonzero(classes == index)[:size] for index, size in zip(present, sizes, strict=True)]
    return np.sort(np.concatenate(chosen))


def _check_complete(grid: Grid) -> None:
    missing = {}
    for name, cells in grid.columns.items():
        rows = [row for row, cell in enumerate(cells) if _is_missing(cell)]
        if rows:
            missing[name] = rows
    if not missing:
        return
    name = min(missing, key=lambda name: missing[name][0])
    row = missing[name][0]
    path, place = grid.places[row]
    cell = grid.columns[name][row]
    counts = ", ".join(f"{name!r} ({len(rows)})" for name, rows in missing.items())
    written = f", {cell!r}" if cell else ""
    raise InvalidData(
        path,
        f"{place} has no value in the column {name!r}{written}; missing in all: {counts}",
        "a value in every cell",
        _FILL_IN,
    )


def _is_missing(cell: Cell) -> bool:
    if isinstance(cell, str):
        return cell.lower() in _MISSING
    return cell is None or math.isnan(cell)


def _encode_features(grid: Grid, label: str) -> tuple[list[np.ndarray], list[str], str]:
    """The columns of numbers, their names, and what was left out, for the reader."""
    features: list[np.ndarray] = []
    names: list[str] = []
    dropped: list[str] = []
    for name in grid.names:
        if name == label:
            continue
        cells = grid.columns[name]
        numbers = [_number(cell) for cell in cells]
        if 2 * numbers.count(None) <= len(cells):
            column = _numeric(grid, name, numbers)
            reason = _useless(name, column)
            if not reason:
                features.append(column)
                names.append(name)
        else:
            words = list(map(str, cells))
            distinct = sorted(set(words))
            reason = _useless_words(distinct, len(words))
            if not reason:
                array = np.array(words, dtype=object)
                features += [(array == word).astype(np.float64) for word in distinct]
                names += [f"{name}={word}" for word in distinct]
        if reason:
            dropped.append(f"{name!r}: {reason}")
    return features, names, "; ".join(dropped)


def _numeric(grid: Grid, name: str, numbers: Sequence[float | None]) -> np.ndarray:
    for row, number in enumerate(numbers):
        if number is None or not math.isfinite(number):
            path, place = grid.places[row]
            others = len(numbers) - numbers.count(None)
            raise InvalidData(
                path,
                f"{place} holds {grid.columns[name][row]!r} in the column {name!r}, "
                f"in which {others} of {len(numbers)} cells are numbers",
                "finite numbers such as -1234.5 in all of them, or words in all",
                "Correct it; for words, write for example 'grade 3' instead of 3.",
            )
    return np.array(numbers, dtype=np.float64)


def _useless(name: str, column: np.ndarray) -> str:
    """Why a column of numbers says nothing about the class; empty where it may.

    A number that counts the rows tells the class wherever the file is sorted by class, and nothing on new rows.
    """
    if (column == column[0]).all():
        return "the same value in every row"
    ordered = np.sort(column)
    steps = np.diff(ordered)
    if (np.rint(column) == column).all() and (steps > 0).all():
        if len(column) >= _SHORTEST_COUNTER and (steps == 1).all():
            return "counts the rows"
        if _ID_NAME.search(name):
            return "an id"
    return ""


def _useless_words(distinct: Sequence[str], rows: int) -> str:
    if len(distinct) == 1:
        return "the same value in every row"
    if 2 * len(distinct) > rows or len(distinct) > _MOST_WORDS:
        return f"{len(distinct)} different words in {rows} rows"
    return ""


def _number(cell: Cell) -> float | None:
    """The cell as a number; None where it is none. Python's own underscores ("1_000") are no part of a number."""
    if isinstance(cell, str) and ("_" in cell or not cell.isascii()):
        return None
    try:
        return None if cell is None else float(cell)
    except ValueError:
        return None


def _listed(names: Sequence[str]) -> str:
    """The names; of many the first and the last, among which the label mostly is."""
    shown = [*map(repr, names)]
    if len(shown) > 20:
        shown = [*shown[:12], f"{len(shown) - 16} more", *shown[-4:]]
    return ", ".join(shown)
