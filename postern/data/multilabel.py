"""Texts with several labels each, where labels are texts as well: what a dual encoder is trained on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from postern.data.errors import DataUnavailable, InvalidData


@dataclass(frozen=True, eq=False, repr=False)
class MultiLabelText:
    """Texts, and the labels of each.

    Args:
        texts: one a query.
        labels: one text a label; the same for all splits of a set.
        rows: the queries of the pairs, ascending.
        columns: the labels of the pairs.
        excluded: pairs (queries, labels) that are neither right nor wrong, such as a text that is its own label; they
            are left out of training and of evaluation.
        name: where they are from, for the reader.

    Raises:
        ValueError: no texts or labels, or pairs of queries or labels that are not there.
    """

    texts: tuple[str, ...]
    labels: tuple[str, ...]
    rows: Int64[Tensor, " pairs"]
    columns: Int64[Tensor, " pairs"]
    excluded: tuple[Int64[Tensor, " others"], Int64[Tensor, " others"]]
    name: str = ""

    def __post_init__(self) -> None:
        if not self.texts or not self.labels:
            raise ValueError(f"there are texts and labels, got {len(self.texts)} and {len(self.labels)}")
        _check_pairs("positives", (self.rows, self.columns), len(self.texts), len(self.labels))
        _check_pairs("excluded", self.excluded, len(self.texts), len(self.labels))

    def __len__(self) -> int:
        return len(self.texts)

    def __repr__(self) -> str:
        origin = f" of {self.name}" if self.name else ""
        return f"MultiLabelText({len(self)} texts{origin}, {len(self.labels)} labels, {len(self.rows)} pairs)"


def read_xmc_folder(folder: Path | str, split: str) -> MultiLabelText:
    """Read a set in the layout of DEXML's repository: EURLex-4K, LF-AmazonTitles-131K, LF-Wikipedia-500K and so on.

    ``raw/trn_X.txt``, ``raw/tst_X.txt`` and ``raw/Y.txt`` hold one text a line; ``Y.trn.npz`` and ``Y.tst.npz`` are
    SciPy's sparse matrices of queries and labels. Pairs that ``filter_labels_train.txt`` or ``filter_labels_test.txt``
    list (a product that is its own label) are excluded.

    Args:
        folder: the set's.
        split: "train" or "test".

    Raises:
        ValueError: an unknown split.
        DataUnavailable: a file is not there.
        InvalidData: files that do not fit each other.
    """
    if split not in ("train", "test"):
        raise ValueError(f"split must be train or test, got {split!r}")
    from scipy import sparse

    folder, part = Path(folder).expanduser(), {"train": "trn", "test": "tst"}[split]
    paths = [folder / "raw" / f"{part}_X.txt", folder / "raw" / "Y.txt", folder / f"Y.{part}.npz"]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise DataUnavailable(
            f"{', '.join(missing)} not found. The sets are linked from github.com/nilesh2797/DEXML; unpack one so "
            f"that {paths[0]} is there."
        )
    texts, labels = (_lines(path) for path in paths[:2])
    matrix: Any = sparse.csr_array(sparse.load_npz(paths[2]))
    if matrix.shape != (len(texts), len(labels)):
        raise InvalidData(
            paths[2],
            f"a matrix of shape {matrix.shape}",
            f"({len(texts)}, {len(labels)}), as there are texts and labels in {folder / 'raw'}",
            "Unpack the set again.",
        )
    filtered, excluded = folder / f"filter_labels_{split}.txt", np.empty((0, 2), dtype=np.int64)
    if filtered.is_file() and filtered.stat().st_size:
        excluded = np.loadtxt(filtered, dtype=np.int64, ndmin=2)
        matrix = matrix - matrix.multiply(sparse.csr_array((np.ones(len(excluded)), excluded.T), matrix.shape))
    matrix.eliminate_zeros()
    pairs = matrix.tocoo()
    order = np.lexsort((pairs.col, pairs.row))
    rows, columns = (torch.from_numpy(part[order].astype(np.int64)) for part in (pairs.row, pairs.col))
    own, label = torch.from_numpy(excluded).T.contiguous()
    return MultiLabelText(texts, labels, rows, columns, (own, label), f"{folder.name}, {split}")


def _lines(path: Path) -> tuple[str, ...]:
    with path.open(encoding="utf-8") as file:  # str.splitlines would also part texts at form feeds and the like
        return tuple(line.strip() for line in file)


def _check_pairs(what: str, pairs: tuple[Tensor, Tensor], num_texts: int, num_labels: int) -> None:
    rows, columns = pairs
    if rows.dtype != torch.int64 or columns.dtype != torch.int64 or rows.dim() != 1 or rows.shape != columns.shape:
        raise ValueError(
            f"{what} are two int64 tensors of one length, "
            f"got {rows.dtype} {list(rows.shape)} and {columns.dtype} {list(columns.shape)}"
        )
    for name, indices, size in (("texts", rows, num_texts), ("labels", columns, num_labels)):
        if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < size:
            raise ValueError(f"{what}: {name} lie in 0..{size - 1}, got {int(indices.min())}..{int(indices.max())}")
