"""What two experts say of the same samples: one knows the classes with training images, one those without.

Paper: Adaptive Confidence Smoothing for Generalized Zero-Shot Learning (arXiv 1812.09903).

Everything that combines experts takes their probabilities from here, whether they were just computed or read from
files, so that published outputs of experts can be used without the experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import ArrayLike

Probabilities = Float[np.ndarray, "samples classes"]

# Half-precision softmaxes, and text with four digits, do not sum to one exactly.
_ROW_SUM_TOLERANCE = 1e-3
_FIELDS = ("seen_expert", "zero_shot", "labels", "seen", "unseen")
# The official repository's files hold one matrix each, the zero-shot expert's.
_ALIASES = {"pred_val": "zero_shot", "pred_test": "zero_shot"}


@dataclass(frozen=True, eq=False, repr=False)
class ExpertPredictions:
    """Probabilities of both experts for the same samples, and which classes have been seen.

    A class is named by its column. Columns that are in neither list, such as classes of another phase, never win.

    Args:
        seen_expert: of the expert for seen classes; rows sum to one.
        zero_shot: of the zero-shot expert, over seen and unseen classes; rows sum to one.
        seen: columns of the classes with training images.
        unseen: columns of the classes without.
        labels: the true column of each sample; None where it is not known.

    Raises:
        ValueError: shapes that do not agree, numbers that are not probabilities, rows that do not sum to one, lists
            of classes that overlap or name no column, or a label in neither list.
    """

    seen_expert: Probabilities
    zero_shot: Probabilities
    seen: Int[np.ndarray, " seen"]
    unseen: Int[np.ndarray, " unseen"]
    labels: Int[np.ndarray, " samples"] | None = None

    def __post_init__(self) -> None:
        for name in ("seen_expert", "zero_shot"):
            object.__setattr__(self, name, _probabilities(name, getattr(self, name)))
        if self.seen_expert.shape != self.zero_shot.shape:
            raise ValueError(
                "both experts give a row a sample and a column a class, got seen_expert "
                f"{self.seen_expert.shape} and zero_shot {self.zero_shot.shape}"
            )
        samples, classes = self.zero_shot.shape
        for name in ("seen", "unseen"):
            object.__setattr__(self, name, _columns(name, getattr(self, name), classes))
        both = np.intersect1d(self.seen, self.unseen)
        if len(both):
            raise ValueError(f"a class is either seen or unseen, but {both.tolist()} are in both lists")
        if self.labels is not None:
            labels = _integers("labels", self.labels)
            if labels.shape != (samples,):
                raise ValueError(f"labels has one class a sample, ({samples},), got {labels.shape}")
            strange = ~np.isin(labels, np.concatenate([self.seen, self.unseen]))
            if strange.any():
                row = int(strange.argmax())
                raise ValueError(f"labels are seen or unseen classes, got {labels[row]} for sample {row}")
            object.__setattr__(self, "labels", labels)

    def __len__(self) -> int:
        return len(self.zero_shot)

    def __repr__(self) -> str:
        known = "unlabelled" if self.labels is None else "labelled"
        return f"ExpertPredictions({len(self)} {known} samples, {len(self.seen)} seen, {len(self.unseen)} unseen)"

    @property
    def is_seen(self) -> Bool[np.ndarray, " samples"]:
        """Whether each sample's true class is a seen one."""
        return np.isin(self.known_labels, self.seen)

    @property
    def known_labels(self) -> Int[np.ndarray, " samples"]:
        """The labels.

        Raises:
            ValueError: they are not known.
        """
        if self.labels is None:
            raise ValueError("these predictions come without labels, which fitting and evaluation need")
        return self.labels

    def take(self, rows: Any) -> ExpertPredictions:
        """The samples that an index, slice or mask selects."""
        labels = None if self.labels is None else self.labels[rows]
        return ExpertPredictions(self.seen_expert[rows], self.zero_shot[rows], self.seen, self.unseen, labels)


def predict_with_experts(
    seen_expert: Any,
    zero_shot_expert: Any,
    features: Float[np.ndarray, "samples features"],
    seen: ArrayLike,
    unseen: ArrayLike,
    labels: ArrayLike | None = None,
) -> ExpertPredictions:
    """Ask two fitted scikit-learn classifiers for the probabilities of the same samples.

    The columns are the zero-shot expert's ``classes_``. Its probabilities are restricted to the seen and unseen
    classes and divided by their sum, which for a softmax is the softmax over these classes; the seen expert's are
    filled up with zeros.

    Args:
        seen_expert: has ``predict_proba`` and ``classes_``, all of them seen.
        zero_shot_expert: has ``predict_proba`` and ``classes_``, with the seen and the unseen among them.
        features: what both are asked about.
        seen: labels of the classes with training images.
        unseen: labels of the classes without.
        labels: the true labels, if known.

    Raises:
        ValueError: a class that the zero-shot expert does not know.
    """
    columns = {label: column for column, label in enumerate(np.asarray(zero_shot_expert.classes_).tolist())}

    def places(name: str, values: ArrayLike) -> Int[np.ndarray, " labels"]:
        found = np.asarray(values).tolist()
        unknown = sorted({label for label in found if label not in columns})
        if unknown:
            raise ValueError(f"{name} has classes that the zero-shot expert does not know: {unknown}")
        return np.array([columns[label] for label in found], dtype=np.int64)

    seen_columns, unseen_columns = places("seen", seen), places("unseen", unseen)
    everything = np.asarray(zero_shot_expert.predict_proba(features), dtype=np.float64)
    zero_shot = np.zeros_like(everything)
    current = np.concatenate([seen_columns, unseen_columns])
    zero_shot[:, current] = everything[:, current] / everything[:, current].sum(axis=1, keepdims=True)
    padded = np.zeros_like(zero_shot)
    padded[:, places("the seen expert", seen_expert.classes_)] = seen_expert.predict_proba(features)
    known = None if labels is None else places("labels", labels)
    return ExpertPredictions(padded, zero_shot, seen_columns, unseen_columns, known)


def load_expert_predictions(path: str | Path, **given: ArrayLike) -> ExpertPredictions:
    """Read what two experts said of the same samples from a file or a folder.

    The file is an ``.npz`` with the arrays

    - ``seen_expert``: probabilities of the expert for seen classes, (samples, classes), rows sum to one;
    - ``zero_shot``: probabilities of the zero-shot expert, (samples, classes), rows sum to one;
    - ``seen`` and ``unseen``: the columns of the classes with training images and of those without;
    - ``labels``: the true class of each sample, as a column, (samples,); may be missing.

    A folder holds them one a file, ``zero_shot.npy`` or ``zero_shot.csv`` and so on; ``.csv`` files have commas, no
    header, and a line a sample (or a class).

    The official repository (``yuvalatzmon/COSMO``, ``data/XianGAN_predictions/CUB/pred_gzsl_test.npz`` and the like)
    publishes the zero-shot expert's matrix alone, as ``pred_test`` or ``pred_val``, which is read as ``zero_shot``. Its
    column 0 belongs to no class; column ``c`` is class ``c`` of the benchmark's ``res101.mat``. Rows are the held-out
    images of the seen classes and then those of the unseen classes, each in ascending order of their index there; for
    the test file these are ``sorted(test_seen_loc)`` and ``sorted(test_unseen_loc)`` of ``att_splits.mat``. Everything
    else is given as arguments, the seen expert's probabilities with a column of zeros for every class that it does not
    know::

        load_expert_predictions("pred_gzsl_test.npz", seen_expert=p, labels=y, seen=np.unique(y_train), unseen=others)

    Args:
        path: an ``.npz`` file or a folder.
        given: arrays by the names above that the file does not have, or that replace those in it.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: a file that cannot be read or lacks an array, or arrays that `ExpertPredictions` refuses.
    """
    unknown = sorted(given.keys() - set(_FIELDS))
    if unknown:
        raise ValueError(f"expert predictions consist of {', '.join(_FIELDS)}; got {unknown[0]!r}")
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there are no expert predictions at {path}")
    found = _read_folder(path, given) if path.is_dir() else _read_npz(path, given)
    arrays = found | given
    missing = [name for name in _FIELDS if name not in arrays and name != "labels"]
    if missing:
        raise ValueError(
            f"{path} has {', '.join(sorted(found)) or 'none of the arrays'} and lacks {', '.join(missing)}: "
            "add them, or give them as arguments"
        )
    try:
        return ExpertPredictions(**arrays)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def save_expert_predictions(
    path: str | Path, predictions: ExpertPredictions, format: Literal["npy", "csv"] = "npy"
) -> Path:
    """Write predictions as `load_expert_predictions` reads them.

    Args:
        path: an ``.npz`` file, or else a folder, which is made.
        predictions: what to write; probabilities keep their digits in every format.
        format: how files in a folder are written.

    Returns:
        The path.
    """
    path = Path(path)
    arrays = {name: getattr(predictions, name) for name in _FIELDS if getattr(predictions, name) is not None}
    if path.suffix == ".npz":
        np.savez_compressed(path, **arrays)
        return path
    if format not in ("npy", "csv"):
        raise ValueError(f"files in a folder are written as 'npy' or 'csv', got {format!r}")
    path.mkdir(parents=True, exist_ok=True)
    for name, array in arrays.items():
        if format == "npy":
            np.save(path / f"{name}.npy", array)
        else:
            np.savetxt(path / f"{name}.csv", array, delimiter=",", fmt="%d" if array.dtype.kind == "i" else "%.17g")
    return path


def _read_npz(path: Path, given: Mapping[str, ArrayLike]) -> dict[str, Any]:
    with _reading(path, "an .npz file of plain arrays"):
        file = np.load(path, allow_pickle=False)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError("it holds a single array without a name")
        with file:
            named = {_ALIASES.get(key, key): key for key in file.files}
            return {name: file[key] for name, key in named.items() if name in _FIELDS and name not in given}


def _read_folder(path: Path, given: Mapping[str, ArrayLike]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in _FIELDS:
        files = [file for file in (path / f"{name}.npy", path / f"{name}.csv") if file.exists()]
        if len(files) > 1:
            raise ValueError(f"{path} has both {files[0].name} and {files[1].name}: keep one of them")
        if not files or name in given:
            continue
        if files[0].suffix == ".npy":
            with _reading(files[0], "a plain .npy array"):
                found[name] = np.load(files[0], allow_pickle=False)
        else:
            dimensions: Literal[1, 2] = 2 if name in ("seen_expert", "zero_shot") else 1
            with _reading(files[0], "numbers separated by commas, without a header"):
                found[name] = np.loadtxt(files[0], delimiter=",", ndmin=dimensions)
    return found


@contextmanager
def _reading(path: Path, expected: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a damaged archive raises what NumPy, zipfile and zlib have
        raise ValueError(f"{path} should be {expected}, but cannot be read: {error}") from error


def _probabilities(name: str, values: ArrayLike) -> Probabilities:
    array = np.asarray(values)
    if array.ndim != 2 or not array.size:
        raise ValueError(f"{name} has a row a sample and a column a class, at least one of each, got {array.shape}")
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{name} holds probabilities, got an array of {array.dtype}")
    if array.dtype not in (np.float32, np.float64):
        array = array.astype(np.float64)
    is_finite = np.isfinite(array).all(axis=1)
    if not is_finite.all():
        raise ValueError(f"{name} is finite, but row {int(is_finite.argmin())} has NaN or infinity")
    if array.min() < 0:
        row = int(array.min(axis=1).argmin())
        raise ValueError(f"{name} holds probabilities, at least 0, but row {row} has {array.min():g}: logits?")
    sums = array.sum(axis=1, dtype=np.float64)
    worst = int(np.abs(sums - 1).argmax())
    if abs(sums[worst] - 1) > _ROW_SUM_TOLERANCE:
        raise ValueError(
            f"rows of {name} sum to one (within {_ROW_SUM_TOLERANCE}), but row {worst} sums to {sums[worst]:g}"
        )
    return array


def _integers(name: str, values: ArrayLike) -> Int[np.ndarray, " values"]:
    array = np.asarray(list(values) if isinstance(values, range) else values)
    if array.ndim != 1:
        raise ValueError(f"{name} is a list of classes, got shape {array.shape}")
    if array.dtype.kind == "f" and (array == np.round(array)).all():
        array = array.astype(np.int64)
    if array.dtype.kind not in "iu":
        raise ValueError(f"{name} are columns, which are whole numbers, got an array of {array.dtype}")
    return array.astype(np.int64)


def _columns(name: str, values: ArrayLike, num_classes: int) -> Int[np.ndarray, " values"]:
    array = np.asarray(values)
    columns = _integers(name, values) if array.size else np.array([], dtype=np.int64)
    if not len(columns):
        raise ValueError(f"{name} has at least one class, got none")
    if columns.min() < 0 or columns.max() >= num_classes:
        raise ValueError(f"{name} are columns from 0 to {num_classes - 1}, got {columns.min()} to {columns.max()}")
    if len(np.unique(columns)) != len(columns):
        raise ValueError(f"{name} lists each class once, got {len(columns) - len(np.unique(columns))} of them again")
    return columns
