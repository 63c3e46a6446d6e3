"""Load a user's own data: a text, a table, a folder of images, or any data set of the Hub."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import torch

from postern.data._catalogue import CONVERTED, catalogue, find
from postern.data._hub import HubUnreachable, cached_folder, download, list_files
from postern.data._own_images import SUFFIXES as IMAGE_SUFFIXES
from postern.data._own_images import Picture, read_pictures
from postern.data._own_parquet import Parquet
from postern.data._own_tables import Grid, draw, encode_labels, encode_tables, join, read_delimited
from postern.data._own_text import join_texts, read_utf8
from postern.data.errors import DataUnavailable, InvalidData
from postern.data.kinds import Images, Table, Text, check_limit
from postern.data.loading import load, local_folder, locate

_DELIMITED = frozenset({".csv", ".tsv"})
# What is looked for in a folder, in this order; files of one kind at a time.
_FOLDER_SUFFIXES = (frozenset({".parquet"}), _DELIMITED, *map(frozenset, ({".txt"}, {".md"}, {".py"})))
_FILE_SUFFIXES = frozenset().union(*_FOLDER_SUFFIXES, IMAGE_SUFFIXES)
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev", "eval"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_ABOUT = ("readme", "license", "licence")  # files that speak of the data
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(?:/[\w.-]+)?")
_LARGEST_DOWNLOAD = 2 * 2**30  # bytes


@dataclasses.dataclass(frozen=True)
class _Options:
    label: str | None
    limit: int | None
    image_size: int | None

    def refuse(self, source: object, what: str, *names: str) -> None:
        """Raise ValueError where one of the options was given, though the source has no use for it."""
        for name in names:
            if getattr(self, name) is not None:
                raise ValueError(f"{source} is {what}, which takes no {name}; got {name}={getattr(self, name)!r}")


def load_own(
    source: str | Path, *, label: str | None = None, limit: int | None = None, image_size: int | None = None
) -> Text | Table | Images:
    """Load what a user has as a text, a table of classes or labelled images.

    ==============================  ====================================================================================
    ``source``                      what comes of it
    ==============================  ====================================================================================
    name of a known data set        its train split, as `load` gives it; see `catalogue`. "./wine" is the folder
    .csv, .tsv                      `Table`; delimited by commas, semicolons or tabs; with a header
    .parquet                        `Text` from a column "text" (or the only one) where no label is named; `Images` from
                                    a column of encoded images; else `Table`
    any other file in UTF-8         `Text`
    folder with images              `Images`; one sub-folder a class
    folder with files of a kind     one of .parquet, .csv/.tsv, .txt, .md, .py, the first that it has, joined in the
                                    order of their names
    "owner/name[/configuration]"    a data set of the Hub: the folder ``$POSTERN_DATA/owner/name``, or the files of the
                                    Hub's conversion to parquet
    ==============================  ====================================================================================

    A folder may be cut into splits: by sub-folders ("train", "test"), or by files in whose names train, validation
    and test stand (all of them). This gives the train split; where there is none, the validation or test split, and
    the ``name`` says so. See `load_own_splits` for the test split.

    **Tables.** The classes are the distinct labels, sorted. A column of numbers stays as it is. A column of words
    becomes one column of zeros and ones for each word, called "column=word". Left out, and told in the table's
    ``name``, are columns with one value, with more than 50 different words or words that rarely come twice, those that
    count the rows, and integers called "id" or the like of which each is another. Nothing is imputed: an empty cell
    (or NA, NaN, null, "?") is an error.

    **Images.** PNG, JPEG, BMP, GIF and WebP. They come out at the most frequent size, scaled down to a longest side of
    64 pixels. Others are scaled, with their proportions kept, until they cover that size, and what stands out is cut
    off evenly at two sides. Transparent pixels become white, the first picture of an animation is taken, Exif's
    orientation is applied. There is one channel where all are grey, red, green and blue else.

    Args:
        source: see above; a `Path` is always a file or a folder.
        label: the column of the classes; for tables, and for images in parquet files ("label" by default there).
        limit: at most so many rows, images or characters: the first characters of a text, the first rows or images
            of each class in proportion to the classes' sizes. Of a known data set the first, as `load` does.
        image_size: height and width of the user's own images, in pixels.

    Raises:
        ValueError: no such source, or an argument that it has no use for.
        InvalidData: a file or folder that is not what it should be; it says what was found, what is needed, and what
            to do.
        DataUnavailable: a data set that is neither on this machine nor to be had from the Hub.
    """
    options = _checked(source, label, limit, image_size)
    if isinstance(source, str) and _is_known(source):
        return _load_known(source, options)
    return load_own_splits(source, label=label, limit=limit, image_size=image_size)["train"]


def load_own_splits(
    source: str | Path, *, label: str | None = None, limit: int | None = None, image_size: int | None = None
) -> dict[str, Text | Table | Images]:
    """Load what a user has, with its own test split where it brings one.

    Both have the same classes, columns and image sizes. A validation split stands in for a test split that is not
    there, and, where there is no train split, for that; the ``name`` then says so. For the arguments, and what is
    raised, see `load_own`.

    Returns:
        "train", and "test" where the source has one.
    """
    options = _checked(source, label, limit, image_size)
    if isinstance(source, str) and _is_known(source):
        return _load_known_splits(source, options)
    path = Path(source).expanduser()
    if path.is_file():
        return _read_files({"train": [path]}, {"train": path.name}, options)
    if path.is_dir():
        return _read_folder(path, path.resolve().name, None, options)
    if path.exists():
        raise InvalidData(path, "neither a file nor a folder", "one of them", "Save what it gives in a file.")
    if isinstance(source, str) and _HUB_ID.fullmatch(source) and path.suffix.lower() not in _FILE_SUFFIXES:
        return _read_hub(source, options)
    raise _nowhere(path)


def _checked(source: str | Path, label: str | None, limit: int | None, image_size: int | None) -> _Options:
    if not str(source).strip():
        raise ValueError("the source is a file, a folder or the name of a data set, got an empty name")
    check_limit(limit)
    if image_size is not None and (isinstance(image_size, bool) or not isinstance(image_size, int) or image_size < 1):
        raise ValueError(f"image_size is a positive number of pixels or None, got {image_size!r}")
    return _Options(label, limit, image_size)


def _nowhere(path: Path) -> InvalidData:
    known = [data_set.name for data_set in catalogue()]
    short = {name.rsplit("/", 1)[-1]: name for name in known}
    near = [short.get(name, name) for name in difflib.get_close_matches(str(path), [*known, *short], n=2, cutoff=0.6)]
    if path.parent.is_dir():
        beside = [other.name for other in path.parent.iterdir()]
        near += [str(path.parent / name) for name in difflib.get_close_matches(path.name, beside, n=2, cutoff=0.6)]
    hint = f"Did you mean {' or '.join(map(repr, dict.fromkeys(near)))}?" if near else "See: postern data list"
    expected = 'a file, a folder, a known data set, or the id of one on the Hub ("owner/name")'
    return InvalidData(path, "no such file or folder", expected, hint)


# -- known data sets ------------------------------------------------------------------------------------------------


def _is_known(source: str) -> bool:
    return any(source == data_set.name for data_set in catalogue())


def _load_known(name: str, options: _Options) -> Text | Table | Images:
    options.refuse(repr(name), "a known data set", "label", "image_size")
    try:
        return load(name, "train", options.limit)
    except DataUnavailable:
        splits = _splits_here(name)
        if find(name).kind != "text" or not splits:
            raise
    split = _roles(splits)["train"]
    return dataclasses.replace(load(name, split, options.limit), name=_name(name, "train", split))


def _load_known_splits(name: str, options: _Options) -> dict[str, Text | Table | Images]:
    train = _load_known(name, options)
    if train.name != _name(name, "train", "train"):
        roles = _roles(_splits_here(name))
        return {"train": train} | ({"test": load(name, roles["test"], options.limit)} if "test" in roles else {})
    try:
        return {"train": train, "test": load(name, "test", options.limit)}
    except DataUnavailable:
        return {"train": dataclasses.replace(train, name=f"{train.name} (its test split is not available)")}


def _splits_here(name: str) -> list[str]:
    return [split for split, place in locate(name).splits.items() if place != "missing"]


# -- splits ---------------------------------------------------------------------------------------------------------


def _roles(splits: Iterable[str]) -> dict[str, str]:
    """Which split to train on and which to test on: a validation split stands in for either."""
    found = list(splits)
    if len(found) == 1:
        return {"train": found[0]}
    return {role: role if role in found else "validation" for role in ("train", "test")}


def _name(source: str, role: str, split: str) -> str:
    """What the reader is told: "mine" for a source without splits, else "mine, test", with its role if another."""
    if not split:
        return source
    return f"{source}, {split}" + ("" if split == role else f" in place of {role}")


def _split_of(part: str) -> str:
    """The split that a file or folder is named after; empty for none."""
    return next((_SPLITS[word] for word in re.split(r"[^a-z]+", part.lower()) if word in _SPLITS), "")


def _by_split(files: Sequence[PurePosixPath]) -> dict[str, list[PurePosixPath]]:
    """The files of each split; all below the empty key unless each of them is named after one.

    A file called "test.txt" among others is one of them.
    """
    splits: dict[str, list[PurePosixPath]] = {}
    for file in files:
        split = next((split for part in reversed(file.parts) if (split := _split_of(part))), "")
        splits.setdefault(split, []).append(file)
    return {"": list(files)} if "" in splits else splits


def _configured(files: Sequence[PurePosixPath], source: str | Path, configuration: str | None) -> list[PurePosixPath]:
    """The files of one configuration, as the Hub calls the variants of a data set; each lies in a folder of its own.

    Raises:
        InvalidData: several configurations of which none was chosen, or an unknown one.
    """
    found: dict[str, list[PurePosixPath]] = {}
    for file in files:
        found.setdefault("/".join(part for part in file.parts[:-1] if not _split_of(part)), []).append(file)
    wanted = configuration or (next(iter(found)) if len(found) == 1 else "default")
    if wanted not in found:
        base = str(source).removesuffix(f"/{configuration}")
        names = [name for name in found if name]
        raise InvalidData(
            Path(base),
            f"data files in {', '.join(repr(name or '.') for name in found)}",
            f"some in {wanted!r}" if configuration else "one folder of them, or one called 'default'",
            f"Give one of the folders: {Path(base).joinpath(*names[:1]).as_posix()}",
        )
    return found[wanted]


# -- folders --------------------------------------------------------------------------------------------------------


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in {"__MACOSX", "__pycache__"}


def _visible_files(folder: Path) -> list[PurePosixPath]:
    """The files below a folder, in the order of their names, without hidden ones and those that speak of the data."""
    files = []
    for path in sorted(folder.rglob("*")):
        place = PurePosixPath(path.relative_to(folder).as_posix())
        if not any(map(_is_hidden, place.parts)) and path.is_file() and not place.name.lower().startswith(_ABOUT):
            files.append(place)
    return files


def _has_images(files: Sequence[PurePosixPath]) -> bool:
    return any(file.suffix.lower() in IMAGE_SUFFIXES for file in files)


def _data_files(files: Sequence[PurePosixPath]) -> list[PurePosixPath]:
    """The files of the first kind that is among them."""
    for suffixes in _FOLDER_SUFFIXES:
        if found := [file for file in files if file.suffix.lower() in suffixes]:
            return found
    return []


def _read_folder(
    folder: Path, name: str, configuration: str | None, options: _Options
) -> dict[str, Text | Table | Images]:
    files = _visible_files(folder)
    if _has_images(files):
        if configuration:
            return _read_folder(folder / configuration, name, None, options)
        return _read_image_folder(folder, name, files, options)
    chosen = _data_files(files)
    if not chosen:
        counts = Counter(file.suffix or "no suffix" for file in files).most_common(5)
        found = ", ".join(f"{suffix} ({count})" for suffix, count in counts)
        raise InvalidData(
            folder,
            f"no images, tables or texts, only {found}" if files else "an empty folder",
            f"sub-folders of images ({', '.join(sorted(IMAGE_SUFFIXES))}), one a class, or .parquet, .csv, .tsv, .txt, "
            ".md or .py files",
            "Convert what is there, or give another folder.",
        )
    # Texts in sub-folders are chapters rather than variants.
    if configuration or chosen[0].suffix.lower() in _DELIMITED | {".parquet"}:
        chosen = _configured(chosen, name if configuration else folder, configuration)
    splits = _by_split(chosen)
    roles = _roles(splits)
    paths = {role: [folder / file for file in splits[split]] for role, split in roles.items()}
    return _read_files(paths, {role: _name(name, role, split) for role, split in roles.items()}, options)


def _read_image_folder(
    folder: Path, name: str, files: Sequence[PurePosixPath], options: _Options
) -> dict[str, Text | Table | Images]:
    options.refuse(folder, "a folder of images", "label")
    splits = _class_folders(folder, files)
    roles = _roles(splits)
    class_names = tuple(sorted(splits[roles["train"]]))
    labels, pictures = {}, {}
    for role, split in roles.items():
        unknown = sorted(set(splits[split]) - set(class_names))
        if unknown:
            raise InvalidData(
                folder / splits[split][unknown[0]][0].parent,
                f"a class of the {split} split that the {roles['train']} split does not have",
                f"the classes {', '.join(map(repr, class_names))}",
                "Rename or remove it.",
            )
        paths = [(index, path) for index, word in enumerate(class_names) for path in splits[split].get(word, ())]
        every = np.array([index for index, _ in paths], dtype=np.int64)
        rows = draw(every, options.limit)
        labels[role] = every[rows]
        pictures[role] = [Picture(folder / paths[row][1]) for row in rows]
    names = {role: _name(name, role, split) for role, split in roles.items()}
    return _decode_images(pictures, labels, class_names, names, options)


def _class_folders(folder: Path, files: Sequence[PurePosixPath]) -> dict[str, dict[str, list[PurePosixPath]]]:
    """For each split (empty: no splits) the classes, each with its images, at least two of them.

    Raises:
        InvalidData: images outside of a class, fewer than two classes, or a class with fewer than two images.
    """
    images = [file for file in files if file.suffix.lower() in IMAGE_SUFFIXES]
    is_split = all(len(file.parts) > 2 and _split_of(file.parts[0]) for file in images)
    depth = 1 if is_split else 0
    expected = "one sub-folder of images a class, and at least two classes"
    for file in images:
        if len(file.parts) < depth + 2:
            raise InvalidData(
                folder / file, "an image outside of the classes' sub-folders", expected, "Move it into one of them."
            )
    folders = {
        place
        for path in folder.glob("/".join("*" * (depth + 1)))
        if path.is_dir() and not _is_hidden(path.name)
        for place in [PurePosixPath(path.relative_to(folder).as_posix())]
    }
    splits: dict[str, dict[str, list[PurePosixPath]]] = {}
    for place in sorted(folders):
        split = _split_of(place.parts[0]) if is_split else ""
        found = [file for file in images if file.parts[: depth + 1] == place.parts]
        if not found:
            raise InvalidData(
                folder / place, "a class without images", f"images ({', '.join(sorted(IMAGE_SUFFIXES))})", "Remove it."
            )
        splits.setdefault(split, {}).setdefault(place.name, []).extend(found)
    train = splits[_roles(splits)["train"]]
    if len(train) < 2:
        raise InvalidData(folder, f"a single class, {next(iter(train))!r}", expected, "Give the folder above it.")
    single = [paths[0].parent for paths in train.values() if len(paths) < 2]
    if single:
        raise InvalidData(
            folder / single[0], "a class with a single image", "at least two of each class", "Add some, or remove it."
        )
    return splits


def _decode_images(
    pictures: Mapping[str, Sequence[Picture]],
    labels: Mapping[str, np.ndarray],
    class_names: tuple[str, ...],
    names: Mapping[str, str],
    options: _Options,
) -> dict[str, Text | Table | Images]:
    every = [picture for part in pictures.values() for picture in part]
    pixels, note = read_pictures(every, options.image_size)
    parts = torch.split(pixels, [len(part) for part in pictures.values()])
    suffix = f" ({note})" if note else ""
    return {
        role: Images(part, torch.from_numpy(labels[role]), class_names, names[role] + suffix)
        for role, part in zip(pictures, parts, strict=True)
    }


# -- files ----------------------------------------------------------------------------------------------------------


def _read_files(
    paths: Mapping[str, Sequence[Path]], names: Mapping[str, str], options: _Options
) -> dict[str, Text | Table | Images]:
    """Read files of one kind: for each role its files, in order, and the name for the reader."""
    suffix = paths["train"][0].suffix.lower()
    if suffix == ".parquet":
        return _read_parquet(paths, names, options)
    if suffix in _DELIMITED:
        grids = {role: join([read_delimited(path) for path in files]) for role, files in paths.items()}
        return _read_tables(grids, paths["train"][0], names, options)
    options.refuse(paths["train"][0], "a text (a table's name ends in .csv, .tsv or .parquet)", "label", "image_size")
    texts = {role: [read_utf8(path) for path in files] for role, files in paths.items()}
    return {
        role: Text(pieces[0] if len(pieces) == 1 else join_texts(pieces), names[role]).limit(options.limit)
        for role, pieces in texts.items()
    }


def _read_tables(
    grids: Mapping[str, Grid], path: Path, names: Mapping[str, str], options: _Options
) -> dict[str, Text | Table | Images]:
    options.refuse(path, "a table", "image_size")
    return {**encode_tables(grids, names, options.label, options.limit)}


def _read_parquet(
    paths: Mapping[str, Sequence[Path]], names: Mapping[str, str], options: _Options
) -> dict[str, Text | Table | Images]:
    parts = {role: Parquet(files) for role, files in paths.items()}
    train = parts["train"]
    for part in parts.values():
        part.check_columns(train)
    if train.image_column is not None:
        label = train.label_column(options.label)
        class_names, targets = encode_labels({role: part.grid([label]) for role, part in parts.items()}, label)
        rows = {role: draw(target, options.limit) for role, target in targets.items()}
        pictures = {role: part.pictures(train.image_column, rows[role]) for role, part in parts.items()}
        labels = {role: targets[role][rows[role]] for role in parts}
        return _decode_images(pictures, labels, class_names, names, options)
    if options.label is None and train.text_column is not None:
        options.refuse(train.path, "a text", "image_size")
        return {
            role: Text(part.text(train.text_column), names[role]).limit(options.limit) for role, part in parts.items()
        }
    return _read_tables({role: part.grid() for role, part in parts.items()}, train.path, names, options)


# -- the Hub --------------------------------------------------------------------------------------------------------


def _read_hub(source: str, options: _Options) -> dict[str, Text | Table | Images]:
    """Read a data set in the layout of the Hub, from ``$POSTERN_DATA`` or from the Hub."""
    owner, name, *rest = source.split("/")
    configuration = rest[0] if rest else None
    folder = local_folder(source)
    if folder is not None and folder.is_dir():
        files = _visible_files(folder)
        if _data_files(files) or _has_images(files):
            return _read_folder(folder, source, configuration, options)
    repository = f"{owner}/{name}"
    try:
        sizes = list_files(repository, CONVERTED)
        files = [PurePosixPath(file) for file in sorted(sizes) if file.endswith(".parquet")]
        if not files:
            raise HubUnreachable("it has no parquet files")
        splits = _by_split(_configured(files, source, configuration))
        wanted = [str(file) for split in _roles(splits).values() for file in splits[split]]
        _check_download(source, repository, sum(sizes[file] for file in wanted))
        folder = download(repository, CONVERTED, wanted)
    except HubUnreachable as error:
        folder = _cached(repository)
        if folder is None:
            raise DataUnavailable(_unavailable(source, repository, str(error))) from error
    return _read_folder(folder, source, configuration, options)


def _cached(repository: str) -> Path | None:
    """The Hub's cache of the conversion; None where it has none, or splits of which it knows that files are missing."""
    folder = cached_folder(repository, CONVERTED, [])
    if folder is None:
        return None
    begun = {f"{file.parent}/*" for file in _data_files(_visible_files(folder))}
    return cached_folder(repository, CONVERTED, sorted(begun))


def _check_download(source: str, repository: str, size: int) -> None:
    if size > _LARGEST_DOWNLOAD:
        raise ValueError(
            f"{source!r} has {size / 2**30:.1f} GiB of files to train and test on; more than "
            f"{_LARGEST_DOWNLOAD / 2**30:g} GiB are not downloaded unasked. {_copy(repository, 'those that you want')}"
        )


def _unavailable(source: str, repository: str, reason: str) -> str:
    folder = local_folder(source)
    local = "the environment variable POSTERN_DATA is not set"
    if folder is not None:
        local = f"{folder} has no parquet, csv or text files" if folder.is_dir() else f"there is no folder {folder}"
    return (
        f"{source!r} is not available. Looked in four places: (1) files and folders: there is no "
        f"{Path(source).absolute()}; (2) the known data sets: it is not one of them; (3) local data sets: {local}; "
        f"(4) the Hub, {_page(repository)}: {reason}. With a network, check the name. "
        f"Without one: {_copy(repository, 'its parquet files')}"
    )


def _copy(repository: str, what: str) -> str:
    tree = f"{_page(repository)}/tree/{CONVERTED.replace('/', '%2F')}"
    return f"Copy {what} from {tree} to $POSTERN_DATA/{repository}/."


def _page(repository: str) -> str:
    return f"https://huggingface.co/datasets/{repository}"
