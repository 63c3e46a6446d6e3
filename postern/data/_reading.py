"""Read the files of a split and check that they are what they should be."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from postern.data._catalogue import DataSet, Files
from postern.data.errors import InvalidData

_BATCH = 1024


def file_digest(path: Path) -> str:
    """The file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_images(data_set: DataSet, files: Files, paths: Sequence[Path], limit: int | None) -> tuple[Tensor, Tensor]:
    """Decode the first ``limit`` images of the files, or all of them.

    Returns:
        Pixels, uint8 [images, channels, height, width], and labels, int64 [images].

    Raises:
        InvalidData: a file that is no parquet, lacks a column, or holds other images or labels than the data set's.
    """
    counts = _check_parquet(data_set, files, paths, (data_set.image_column, data_set.label_column))
    total = sum(counts) if limit is None else min(limit, sum(counts))
    channels, height, width = data_set.shape
    pixels = np.empty((total, height, width, channels), dtype=np.uint8)
    labels = np.empty(total, dtype=np.int64)
    row = 0
    for path, count in zip(paths, counts, strict=True):
        wanted = min(count, total - row)
        start = row
        for encoded, numbers in _image_batches(data_set, path, wanted):
            for image, number in zip(encoded, numbers, strict=True):
                pixels[row] = _decode(data_set, path, row - start, image)
                labels[row] = _label(data_set, path, row - start, number)
                row += 1
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))), torch.from_numpy(labels)


def read_text(data_set: DataSet, files: Files, paths: Sequence[Path], limit: int | None) -> str:
    """The first ``limit`` characters of the split's text.

    A text stored line by line comes out the same from any layout: white space around each line and blank lines at the
    start and the end of the text are dropped, each line ends in a newline.

    Raises:
        InvalidData: a file that is no parquet, lacks the column, is not UTF-8, or has another number of lines.
    """
    if files.pattern.endswith(".parquet"):
        pieces = _read_rows(data_set, files, paths)
    else:
        (path,) = paths
        _check_not_empty(data_set, path)
        try:
            pieces = path.read_text(encoding="utf-8").splitlines(keepends=True)
        except UnicodeDecodeError as error:
            raise InvalidData(path, f"not UTF-8 text ({error})", "UTF-8 text", _remedy(data_set, path)) from error
        _check_count(data_set, files, path, len(pieces), "lines")
    if files.is_lines:
        text = "\n".join(piece.strip("\ufeff \t\r\n") for piece in pieces).strip("\n") + "\n"
    else:
        text = "".join(pieces)
    low, high = (int(share * len(text)) for share in files.part)
    return text[low:high][:limit]


def _read_rows(data_set: DataSet, files: Files, paths: Sequence[Path]) -> list[str]:
    import pyarrow
    import pyarrow.parquet

    _check_parquet(data_set, files, paths, (files.column,))
    rows: list[str] = []
    for path in paths:
        try:
            column = pyarrow.parquet.read_table(path, columns=[files.column])[files.column]
        except (pyarrow.ArrowException, OSError) as error:
            raise _damaged(data_set, path, error) from error
        if not pyarrow.types.is_string(column.type) and not pyarrow.types.is_large_string(column.type):
            raise InvalidData(path, f"column {files.column!r} holds {column.type}", "strings", _remedy(data_set, path))
        rows += (row or "" for row in column.to_pylist())
    return rows


def _check_parquet(data_set: DataSet, files: Files, paths: Sequence[Path], columns: Sequence[str]) -> list[int]:
    """Number of rows of each file, after checking that all are there, whole, and have the columns and rows."""
    import pyarrow
    import pyarrow.parquet

    counts = []
    for path in paths:
        _check_not_empty(data_set, path)
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                names, count = file.schema_arrow.names, file.metadata.num_rows
        except (pyarrow.ArrowException, OSError) as error:
            raise _damaged(data_set, path, error) from error
        missing = [column for column in columns if column not in names]
        if missing:
            raise InvalidData(
                path,
                f"no column {missing[0]!r}, only {', '.join(map(repr, names))}",
                f"the columns {', '.join(map(repr, columns))} of {data_set.name}",
                _remedy(data_set, path),
            )
        counts.append(count)
    _check_count(data_set, files, paths[0], sum(counts), "rows")
    return counts


def _check_not_empty(data_set: DataSet, path: Path) -> None:
    if path.stat().st_size == 0:
        raise InvalidData(path, "an empty file", f"a file of {data_set.name}", _remedy(data_set, path))


def _check_count(data_set: DataSet, files: Files, path: Path, count: int, what: str) -> None:
    if files.counts and count not in files.counts:
        raise InvalidData(
            path,
            f"{count} {what}",
            f"{' or '.join(map(str, files.counts))} {what} in this split of {data_set.name}",
            _remedy(data_set, path),
        )


def _image_batches(data_set: DataSet, path: Path, wanted: int) -> Iterator[tuple[list[Any], list[Any]]]:
    import pyarrow
    import pyarrow.parquet

    columns = [data_set.image_column, data_set.label_column]
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(min(_BATCH, max(wanted, 1)), columns=columns):
                if wanted <= 0:
                    return
                taken = batch.slice(0, wanted)
                wanted -= len(taken)
                yield taken[data_set.image_column].to_pylist(), taken[data_set.label_column].to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise _damaged(data_set, path, error) from error


def _decode(data_set: DataSet, path: Path, row: int, encoded: object) -> np.ndarray:
    channels, height, width = data_set.shape
    mode = "L" if channels == 1 else "RGB"
    expected = f"{mode} images of {width}x{height} pixels, as PNG or JPEG bytes"
    content = encoded.get("bytes") if isinstance(encoded, dict) else encoded
    if not isinstance(content, bytes):
        raise InvalidData(path, f"row {row} holds no image bytes", expected, _remedy(data_set, path))
    try:
        with Image.open(io.BytesIO(content), formats=("PNG", "JPEG")) as image:
            if image.size != (width, height) or image.mode != mode:
                raise InvalidData(
                    path,
                    f"row {row} is a {image.mode} image of {image.size[0]}x{image.size[1]} pixels",
                    expected,
                    _remedy(data_set, path),
                )
            return np.asarray(image).reshape(height, width, channels)
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise InvalidData(path, f"row {row} does not decode ({error})", expected, _remedy(data_set, path)) from error


def _label(data_set: DataSet, path: Path, row: int, label: object) -> int:
    classes = len(data_set.class_names)
    if not isinstance(label, int) or not 0 <= label < classes:
        raise InvalidData(
            path, f"row {row} has the label {label!r}", f"labels from 0 to {classes - 1}", _remedy(data_set, path)
        )
    return label


def _damaged(data_set: DataSet, path: Path, error: Exception) -> InvalidData:
    return InvalidData(path, f"not a whole parquet file ({error})", "a parquet file", _remedy(data_set, path))


def _remedy(data_set: DataSet, path: Path) -> str:
    return f"Delete {path.name} and fetch it again: postern data fetch {data_set.name}"
