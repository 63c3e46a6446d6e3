"""Read a user's own parquet files: find out whether they hold a text, images or a table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from postern.data._own_images import Picture
from postern.data._own_tables import Grid, check_label
from postern.data._own_text import join_texts
from postern.data.errors import InvalidData

_TEXT_COLUMN, _LABEL_COLUMN = "text", "label"


class Parquet:
    """Parquet files with the same columns, their rows one after the other.

    Args:
        paths: at least one.

    Raises:
        InvalidData: a file that is no parquet or has no rows, or files with different columns.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        import pyarrow
        import pyarrow.parquet

        self.path = paths[0]
        self._tables: list[Any] = []
        self._places: list[tuple[Path, str]] = []
        for path in paths:
            try:
                # Not by `read_table`, which takes folders called "key=value" for columns.
                with pyarrow.parquet.ParquetFile(path) as file:
                    table = file.read()
            except (pyarrow.ArrowException, OSError) as error:
                raise InvalidData(
                    path, f"not a whole parquet file ({error})", "a parquet file", "Get it again."
                ) from error
            self._tables.append(table)
            self._places += [(path, f"row {row}") for row in range(table.num_rows)]
        if not self._places:
            raise InvalidData(self.path, "no rows", "at least one row", "Give a file that holds something.")
        self._schema: Any = self._tables[0].schema
        for table, path in zip(self._tables, paths, strict=True):
            self._check_schema(table.schema, path)
        self.names: tuple[str, ...] = tuple(self._schema.names)
        duplicates = [name for name in self.names if self.names.count(name) > 1]
        if duplicates:
            raise InvalidData(
                self.path,
                f"{self.names.count(duplicates[0])} columns called {duplicates[0]!r}",
                "another name for each column",
                "Rename or remove all but one.",
            )

    def check_columns(self, other: Parquet) -> None:
        """Check that it has the same columns as another part of the same data set.

        Raises:
            InvalidData: it has not.
        """
        other._check_schema(self._schema, self.path)

    def _check_schema(self, schema: Any, path: Path) -> None:
        if schema.names != self._schema.names:
            raise InvalidData(
                path,
                f"the columns {', '.join(map(repr, schema.names))}",
                f"those of {self.path}: {', '.join(map(repr, self._schema.names))}",
                "Give one of the files, or make the columns the same.",
            )

    @property
    def image_column(self) -> str | None:
        """The first column of images as the Hub stores them: bytes, and the path that they had."""
        import pyarrow

        for field in self._schema:
            if pyarrow.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0:
                return str(field.name)
        return None

    @property
    def text_column(self) -> str | None:
        """The column "text", or the only one, where it holds words."""
        names = [name for name in self.names if name == _TEXT_COLUMN or len(self.names) == 1]
        return next((name for name in names if self._holds_words(name)), None)

    def text(self, column: str) -> str:
        """The rows of a column of words, each as a line (or lines) of its own."""
        return join_texts([cell or "" for cell in self._cells(column)])

    def pictures(self, column: str, rows: np.ndarray) -> list[Picture]:
        """The images of a column in some of the rows.

        Raises:
            InvalidData: a row without one.
        """
        pictures = []
        cells = self._cells(column)
        for row in rows:
            (path, place), cell = self._places[row], cells[row]
            content = cell.get("bytes") if isinstance(cell, dict) else None
            if not isinstance(content, bytes):
                raise InvalidData(
                    path,
                    f"{place} holds no image bytes in the column {column!r}",
                    "an encoded image in every row",
                    "Remove the row, or store the images themselves rather than their paths.",
                )
            pictures.append(Picture(path, place, content))
        return pictures

    def grid(self, columns: Sequence[str] | None = None) -> Grid:
        """The columns (all by default) as a table; what is neither number nor word counts as words."""
        names = tuple(columns or self.names)
        label_names = {name: known for name, known in self._class_labels().items() if name in names}
        return Grid(names, {name: self._plain_cells(name) for name in names}, self._places, label_names)

    def label_column(self, label: str | None) -> str:
        """The column named, or "label", or the only one that the Hub knows as one of classes.

        Raises:
            InvalidData: there is no such column.
        """
        if label is None:
            known = list(self._class_labels())
            if _LABEL_COLUMN in self.names:
                label = _LABEL_COLUMN
            elif len(known) == 1:
                label = known[0]
        return check_label(self.path, self.names, label)

    def _cells(self, name: str) -> list[Any]:
        return [cell for table in self._tables for cell in table[name].to_pylist()]

    def _plain_cells(self, name: str) -> list[Any]:
        import pyarrow

        kind = self._schema.field(name).type
        is_number = (
            pyarrow.types.is_integer(kind)
            or pyarrow.types.is_floating(kind)
            or pyarrow.types.is_decimal(kind)
            or pyarrow.types.is_boolean(kind)
        )
        if self._holds_words(name):
            return [cell.strip() if isinstance(cell, str) else cell for cell in self._cells(name)]
        if pyarrow.types.is_decimal(kind):
            return [None if cell is None else float(cell) for cell in self._cells(name)]
        return [cell if is_number or cell is None else str(cell) for cell in self._cells(name)]

    def _holds_words(self, name: str) -> bool:
        import pyarrow

        kind = self._schema.field(name).type
        if pyarrow.types.is_dictionary(kind):
            kind = kind.value_type
        return bool(pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind))

    def _class_labels(self) -> Mapping[str, tuple[str, ...]]:
        """The names of classes that the Hub's own library leaves in its files for columns of class indices."""
        written = (self._schema.metadata or {}).get(b"huggingface")
        try:
            features = json.loads(written)["info"]["features"] if written else {}
            return {
                name: tuple(map(str, feature["names"]))
                for name, feature in features.items()
                if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names")
            }
        except (ValueError, KeyError, TypeError, AttributeError):
            return {}  # another program's metadata of the same name
