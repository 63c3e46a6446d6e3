"""Find a data set (embedded, below ``$POSTERN_DATA``, on the Hub), check it, and load it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, overload

from postern.data._cache import cached_path, read_cached, write_cached
from postern.data._catalogue import DataSet, Files, find
from postern.data._embedded import load_embedded
from postern.data._hub import HubUnreachable, cached_folder, download
from postern.data._reading import file_digest, read_images, read_text
from postern.data.errors import DataUnavailable
from postern.data.kinds import Images, Table, Text, check_limit

Place = Literal["embedded", "local", "hub cache", "missing"]
_SHARD = re.compile(r"-(\d+)-of-(\d+)\.parquet$")


@dataclass(frozen=True)
class Location:
    """Where a data set is on this machine.

    Attributes:
        name: the data set.
        where: "embedded", "local" (below ``$POSTERN_DATA``), "hub cache", or "missing" where no split is here.
        path: the folder, None for an embedded or missing one.
        splits: where each split is.
        remedy: what to do about the missing splits; empty where none is missing.
    """

    name: str
    where: Place
    path: Path | None
    splits: Mapping[str, Place]
    remedy: str = ""

    @property
    def missing(self) -> tuple[str, ...]:
        """The splits that are not on this machine."""
        return tuple(split for split, place in self.splits.items() if place == "missing")


@dataclass(frozen=True)
class _Found:
    place: Place
    folder: Path
    files: Files
    paths: tuple[Path, ...]


# What `load` returns follows from the name where the name is one of these.
ImageName = Literal[
    "digits",
    "ylecun/mnist",
    "zalando-datasets/fashion_mnist",
    "uoft-cs/cifar10",
    "uoft-cs/cifar100",
    "ufldl-stanford/svhn",
]
TableName = Literal["breast-cancer", "wine", "iris", "diabetes"]
TextName = Literal["python-stdlib", "Salesforce/wikitext", "karpathy/tiny_shakespeare", "ptb"]


@overload
def load(name: ImageName, split: str, limit: int | None = None) -> Images: ...
@overload
def load(name: TableName, split: str, limit: int | None = None) -> Table: ...
@overload
def load(name: TextName, split: str, limit: int | None = None) -> Text: ...
@overload
def load(name: str, split: str, limit: int | None = None) -> Images | Table | Text: ...
def load(name: str, split: str, limit: int | None = None) -> Images | Table | Text:
    """Load a split of a data set.

    Looks among the embedded sets, then below ``$POSTERN_DATA/<name>/`` (same layout as on the Hub), then in the Hub's
    cache, and then downloads from the Hub.

    Args:
        name: an id on the Hub such as "ylecun/mnist", or an embedded set such as "digits"; see `catalogue`.
        split: "train", "test", ...; see the data set's ``splits``.
        limit: only the first so many images, rows or characters.

    Raises:
        ValueError: unknown name or split, or a limit below one.
        DataUnavailable: it is in none of these places.
        InvalidData: a file that is damaged, or is not what it should be.
    """
    data_set = find(name, split)
    check_limit(limit)
    if data_set.embedded:
        return load_embedded(name, split, limit)
    found = _find_here(data_set, split) or _download(data_set, split)
    origin = f"{name}, {split}"
    if data_set.kind == "text":
        return Text(read_text(data_set, found.files, found.paths, limit), origin)
    kept = cached_path(name, split, found.paths)
    tensors = read_cached(kept)
    if tensors is None:
        tensors = read_images(data_set, found.files, found.paths, limit)
        if limit is None:
            write_cached(kept, *tensors)
    return Images(*tensors, data_set.class_names, origin).limit(limit)


def locate(name: str) -> Location:
    """Where a data set is on this machine; nothing is read or downloaded.

    Raises:
        ValueError: unknown name.
    """
    data_set = find(name)
    if data_set.embedded:
        return Location(name, "embedded", None, dict.fromkeys(data_set.splits, "embedded"))
    found = {split: _find_here(data_set, split) for split in data_set.splits}
    here = [item for item in found.values() if item is not None]
    splits: dict[str, Place] = {split: "missing" if item is None else item.place for split, item in found.items()}
    remedy = "" if len(here) == len(found) else _remedy(data_set)
    if not here:
        return Location(name, "missing", None, splits, remedy)
    return Location(name, here[0].place, here[0].folder, splits, remedy)


def fetch(name: str, split: str | None = None) -> Path:
    """Download a data set from the Hub: below ``$POSTERN_DATA`` where that is set, else into the Hub's cache.

    Splits that are on this machine already stay as they are.

    Args:
        name: see `catalogue`.
        split: only this split; all by default.

    Returns:
        The folder that holds it.

    Raises:
        ValueError: unknown name or split, or an embedded set, which has no folder.
        DataUnavailable: the Hub could not be reached, or does not have it.
    """
    data_set = find(name, split)
    if data_set.embedded:
        raise ValueError(f"{name!r} comes with postern's dependencies: there is nothing to fetch, load it")
    folders = []
    for each in data_set.splits if split is None else (split,):
        found = _find_here(data_set, each) or _download(data_set, each, local_folder(data_set.name))
        folders.append(found.folder)
    return folders[0]


def verify(name: str) -> dict[Path, str]:
    """Read a data set that is on this machine, whole, and compare its files with copies known to be good.

    Returns:
        For each file "known copy" (its SHA-256 is on record) or "valid" (another encoding of the right content, as far
        as columns, counts, shapes and labels tell).

    Raises:
        ValueError: unknown name.
        DataUnavailable: no split is on this machine.
        InvalidData: a file that is damaged, or is not what it should be.
    """
    data_set = find(name)
    if data_set.embedded:
        for split in data_set.splits:
            load_embedded(name, split, None)
        return {}
    results = {}
    for split in data_set.splits:
        found = _find_here(data_set, split)
        if found is None:
            continue
        read = read_text if data_set.kind == "text" else read_images
        read(data_set, found.files, found.paths, None)
        for path in found.paths:
            results[path] = "known copy" if file_digest(path) in found.files.sha256 else "valid"
    if not results:
        raise DataUnavailable(_unavailable(data_set, "", "not asked"))
    return results


def local_folder(name: str) -> Path | None:
    """Where below ``$POSTERN_DATA`` the data set lies, if it is there; None where the variable is not set."""
    root = os.environ.get("POSTERN_DATA")
    if not root:
        return None
    # "Salesforce/wikitext/wikitext-103-v1" lies in the folder of its repository.
    return Path(root).expanduser().joinpath(*name.split("/")[:2])


def _find_here(data_set: DataSet, split: str) -> _Found | None:
    folder = local_folder(data_set.name)
    if folder is not None:
        for files in data_set.files[split]:
            if paths := _complete(folder, files):
                return _Found("local", folder, files, paths)
    for files in data_set.files[split]:
        if files.revision is not None:
            folder = cached_folder(str(data_set.repository), files.revision, [files.pattern])
            if folder is not None and (paths := _complete(folder, files)):
                return _Found("hub cache", folder, files, paths)
    return None


def _complete(folder: Path, files: Files) -> tuple[Path, ...]:
    """The files in order, or none of them where a shard is missing."""
    paths = tuple(sorted(folder.glob(files.pattern)))
    for path in paths:
        shard = _SHARD.search(path.name)
        if shard and int(shard[2]) != len(paths):
            return ()
    return paths


def _download(data_set: DataSet, split: str, folder: Path | None = None) -> _Found:
    reason = ""
    for files in data_set.files[split]:
        if files.revision is None:
            continue
        try:
            fetched = download(str(data_set.repository), files.revision, [files.pattern], folder)
        except HubUnreachable as error:
            reason = str(error)
            continue
        if paths := _complete(fetched, files):
            return _Found("local" if folder else "hub cache", fetched, files, paths)
        reason = f"it has no {files.pattern}"
    raise DataUnavailable(_unavailable(data_set, split, reason))


def _unavailable(data_set: DataSet, split: str, reason: str) -> str:
    what = f"the split {split!r} of {data_set.name!r}" if split else repr(data_set.name)
    folder = local_folder(data_set.name)
    if folder is None:
        local = "the environment variable POSTERN_DATA is not set"
    else:
        splits = (split,) if split else tuple(data_set.splits)
        local = f"{folder} has no {' and no '.join(_patterns(data_set, splits))}"
    substitute = {"images": "digits", "table": "breast-cancer", "text": "python-stdlib"}[data_set.kind]
    return (
        f"{what} is not available. Looked in three places: (1) the embedded sets: it is not one of them; "
        f"(2) local files: {local}; (3) the Hub, {data_set.source}: {reason}. "
        f"{_remedy(data_set)} Or use the embedded {substitute!r}."
    )


def _remedy(data_set: DataSet) -> str:
    wanted = [files for split in data_set.files.values() for files in split if files.revision is not None]
    (branch,) = {str(files.revision) for files in wanted}
    return (
        f"With a network: postern data fetch {data_set.name}. Without: copy {', '.join(f.pattern for f in wanted)} "
        f"from {data_set.source}/tree/{branch.replace('/', '%2F')} to "
        f"$POSTERN_DATA/{'/'.join(data_set.name.split('/')[:2])}/."
    )


def _patterns(data_set: DataSet, splits: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(files.pattern for split in splits for files in data_set.files[split]))
