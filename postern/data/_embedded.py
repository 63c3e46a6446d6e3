"""Data sets that every installation has: scikit-learn's small ones, and the source of Python's standard library."""

from __future__ import annotations

import hashlib
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch

from postern.data.errors import DataUnavailable
from postern.data.kinds import Images, Table, Text

_LOADERS = MappingProxyType(
    {
        "digits": "load_digits",
        "breast-cancer": "load_breast_cancer",
        "wine": "load_wine",
        "iris": "load_iris",
        "diabetes": "load_diabetes",
    }
)
_NOT_LIBRARY = frozenset({"site-packages", "dist-packages", "test", "tests", "__pycache__", "idlelib", "lib2to3"})


def load_embedded(name: str, split: str, limit: int | None) -> Images | Table | Text:
    """Load an embedded data set.

    The splits of scikit-learn's sets are ours: a fixed shuffle, a fifth to test, stratified where there are classes.
    "all" keeps scikit-learn's order, in which some sets are sorted by class.
    """
    if name == "python-stdlib":
        return _python_stdlib(split, limit)
    import sklearn.datasets

    bunch = getattr(sklearn.datasets, _LOADERS[name])()
    rows = _rows(bunch.target, split, is_regression=name == "diabetes")[:limit]
    origin = f"{name}, {split}"
    if name == "digits":
        # Intensities are 0..16.
        pixels = np.rint(bunch.images[rows] * (255 / 16)).astype(np.uint8)
        labels = torch.from_numpy(bunch.target[rows].astype(np.int64))
        return Images(torch.from_numpy(pixels)[:, None], labels, tuple(map(str, bunch.target_names)), origin)
    return Table(
        np.ascontiguousarray(bunch.data[rows], dtype=np.float64),
        bunch.target[rows],
        tuple(map(str, bunch.feature_names)),
        () if name == "diabetes" else tuple(map(str, bunch.target_names)),
        origin,
    )


def _rows(target: np.ndarray, split: str, *, is_regression: bool) -> np.ndarray:
    everything = np.arange(len(target))
    if split == "all":
        return everything
    from sklearn.model_selection import train_test_split

    stratify: Any = None if is_regression else target
    train: np.ndarray
    test: np.ndarray
    train, test = train_test_split(everything, test_size=0.2, random_state=0, stratify=stratify)
    return train if split == "train" else test


def _python_stdlib(split: str, limit: int | None) -> Text:
    pieces, length = [], 0
    for path in _library_files(split):
        try:
            with tokenize.open(path) as file:
                source = file.read()
        except (OSError, SyntaxError, UnicodeDecodeError):
            continue  # a file that this user may not read, or a deliberately broken one
        pieces.append(source)
        length += len(source)
        if limit is not None and length >= limit:
            break
    if not length:
        raise DataUnavailable(
            f"python-stdlib is the source of the running Python's standard library, and {_library()} holds no "
            "readable .py files; run postern with a Python that comes with its library's source"
        )
    return Text("".join(pieces)[:limit], f"python-stdlib, {split}")


def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _library_files(split: str) -> Iterator[Path]:
    """Files of a split in a fixed shuffled order; a file is in the same split whatever the version of Python.

    The digest of its path decides: one in twenty to validation, one in twenty to test.
    Generated files with this machine's settings and tests are no part of the corpus.
    """
    library = _library()
    found = []
    for path in library.rglob("*.py"):
        place = path.relative_to(library)
        if _NOT_LIBRARY.isdisjoint(place.parts) and not path.name.startswith("_sysconfigdata"):
            found.append((hashlib.sha256(place.as_posix().encode()).digest(), path))
    for digest, path in sorted(found):
        drawn = {0: "validation", 1: "test"}.get(digest[-1] % 20, "train")
        if drawn == split:
            yield path
