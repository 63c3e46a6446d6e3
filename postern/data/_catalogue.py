"""The data sets that `load` knows: what each is, where it lies, and what its files must contain."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

Kind = Literal["images", "table", "text"]
CONVERTED = "refs/convert/parquet"  # the Hub's own conversion of a repository that holds a script


@dataclass(frozen=True)
class Files:
    """One way in which a split may lie on a disk or on the Hub.

    Attributes:
        pattern: glob below the data set's folder.
        counts: accepted numbers of rows (parquet) or lines (txt) of the whole file.
        column: the parquet column that holds the text, for texts.
        revision: branch of the Hub's repository that has the files; None where the Hub has none of this layout.
        is_lines: whether a text is stored line by line, so that white space around a line means nothing.
        part: the share of the whole text that is the split, from and to.
        sha256: digests of copies known to be good; other copies may be good as well, in another encoding.
    """

    pattern: str
    counts: tuple[int, ...]
    column: str = "text"
    revision: str | None = "main"
    is_lines: bool = False
    part: tuple[float, float] = (0.0, 1.0)
    sha256: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class DataSet:
    """A data set.

    Attributes:
        name: what `load` is given: an id on the Hub, or the name of an embedded set.
        kind: "images", "table" or "text".
        title: one line for the reader.
        splits: number of images, rows or lines of each split; None where it depends on the machine.
        licence: as its publisher states it.
        source: where it comes from.
        embedded: whether it comes with postern's own dependencies, so that it needs no file and no network.
        repository: its id on the Hub, None for an embedded set.
        files: for each split, the layouts in which it may lie, in the order in which they are tried.
        shape: channels, height, width of an image.
        image_column: parquet column of the images.
        label_column: parquet column of the labels.
        class_names: names of the classes, in the order of the labels.
    """

    name: str
    kind: Kind
    title: str
    splits: Mapping[str, int | None]
    licence: str
    source: str
    embedded: bool = False
    repository: str | None = None
    files: Mapping[str, tuple[Files, ...]] = field(default_factory=dict, repr=False)
    shape: tuple[int, int, int] = (1, 1, 1)
    image_column: str = "image"
    label_column: str = "label"
    class_names: tuple[str, ...] = ()


def _embedded(name: str, kind: Kind, title: str, splits: Mapping[str, int | None], source: str) -> DataSet:
    licence = "PSF-2.0" if name == "python-stdlib" else "CC BY 4.0"
    if name == "diabetes":
        licence = "not stated"
    return DataSet(name, kind, title, MappingProxyType(dict(splits)), licence, source, embedded=True)


def _images(
    name: str,
    title: str,
    config: str,
    counts: Mapping[str, int],
    shape: tuple[int, int, int],
    class_names: tuple[str, ...],
    licence: str,
    *,
    image_column: str = "image",
    label_column: str = "label",
    sha256: Mapping[str, str] = MappingProxyType({}),
) -> DataSet:
    files = {
        split: (Files(f"{config}/{split}-*.parquet", (count,), sha256=(sha256[split],) if split in sha256 else ()),)
        for split, count in counts.items()
    }
    return DataSet(
        name=name,
        kind="images",
        title=title,
        splits=MappingProxyType(dict(counts)),
        licence=licence,
        source=f"https://huggingface.co/datasets/{name}",
        repository=name,
        files=MappingProxyType(files),
        shape=shape,
        image_column=image_column,
        label_column=label_column,
        class_names=class_names,
    )


def _wikitext(name: str, config: str, counts: Mapping[str, tuple[int, ...]], sha256: Mapping[str, str]) -> DataSet:
    files = {
        split: (
            Files(
                f"{config}/{split}-*.parquet",
                number,
                is_lines=True,
                sha256=(sha256[split],) if split in sha256 else (),
            ),
        )
        for split, number in counts.items()
    }
    return DataSet(
        name=name,
        kind="text",
        title=f"Wikipedia's good and featured articles, {config}",
        splits=MappingProxyType({split: number[0] for split, number in counts.items()}),
        licence="CC BY-SA 3.0",
        source="https://huggingface.co/datasets/Salesforce/wikitext",
        repository="Salesforce/wikitext",
        files=MappingProxyType(files),
    )


_DIGITS = tuple(str(digit) for digit in range(10))
_SKLEARN = "https://scikit-learn.org/stable/datasets/toy_dataset.html"
# Copies made from the original token files lack the blank rows at the end that the Hub's have.
_WIKITEXT_2 = {"train": (36_718,), "validation": (3_760, 3_758), "test": (4_358, 4_357)}
_WIKITEXT_103 = {"train": (1_801_350,), "validation": (3_760, 3_758), "test": (4_358, 4_357)}

_SHAKESPEARE_PARTS = {"train": (0.0, 0.9), "validation": (0.9, 0.95), "test": (0.95, 1.0)}
_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
_PTB = {"train": ("train", 42_068), "validation": ("valid", 3_370), "test": ("test", 3_761)}
_PTB_SHA256 = {
    "validation": ("c9fe6985fe0d4ccb578183407d7668fc6066c20700cb4cf87d8ff1cc34df1bf2",),
    "test": ("dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0",),
}

_CIFAR_100 = tuple(  # in the order of the fine labels
    """apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
    caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant
    flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree
    motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate
    poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider
    squirrel streetcar sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
    wardrobe whale willow_tree wolf woman worm""".split()  # noqa: SIM905
)

_DATA_SETS = (
    _embedded(
        "digits", "images", "8x8 handwritten digits of 1 797", {"train": 1437, "test": 360, "all": 1797}, _SKLEARN
    ),
    _embedded(
        "breast-cancer", "table", "Breast tumours, two classes", {"train": 455, "test": 114, "all": 569}, _SKLEARN
    ),
    _embedded("wine", "table", "Wines of three growers", {"train": 142, "test": 36, "all": 178}, _SKLEARN),
    _embedded("iris", "table", "Irises of three species", {"train": 120, "test": 30, "all": 150}, _SKLEARN),
    _embedded(
        "diabetes", "table", "Progression of diabetes, a regression", {"train": 353, "test": 89, "all": 442}, _SKLEARN
    ),
    _embedded(
        "python-stdlib",
        "text",
        "Source of the running Python's standard library",
        {"train": None, "validation": None, "test": None},
        "https://docs.python.org/3/library/",
    ),
    _images(
        "ylecun/mnist",
        "MNIST, 28x28 handwritten digits",
        "mnist",
        {"train": 60_000, "test": 10_000},
        (1, 28, 28),
        _DIGITS,
        "MIT",
        sha256={
            "train": "c57f50adf15eaf90beb3f2e3db4947f17003f5742d84aedba578dda5ba23427a",
            "test": "728c550975889a8710f8a6b28d72552b8906b1ea48892b55710632c2ac35e6c9",
        },
    ),
    _images(
        "zalando-datasets/fashion_mnist",
        "Fashion-MNIST, 28x28 photographs of clothes",
        "fashion_mnist",
        {"train": 60_000, "test": 10_000},
        (1, 28, 28),
        (
            "T - shirt / top",
            "Trouser",
            "Pullover",
            "Dress",
            "Coat",
            "Sandal",
            "Shirt",
            "Sneaker",
            "Bag",
            "Ankle boot",
        ),
        "MIT",
    ),
    _images(
        "uoft-cs/cifar10",
        "CIFAR-10, 32x32 photographs of ten classes",
        "plain_text",
        {"train": 50_000, "test": 10_000},
        (3, 32, 32),
        ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        "unknown",
        image_column="img",
        sha256={
            "train": "b5353cb228dfb15322a725640bca8afd855ced3e2e63e11141e772631e30b35a",
            "test": "de0c635e804f455827ed2c78d9d8a3265b1188b807dacb2bd661449bc1eebc72",
        },
    ),
    _images(
        "uoft-cs/cifar100",
        "CIFAR-100, 32x32 photographs of a hundred classes",
        "cifar100",
        {"train": 50_000, "test": 10_000},
        (3, 32, 32),
        _CIFAR_100,
        "unknown",
        image_column="img",
        label_column="fine_label",
    ),
    _images(
        "ufldl-stanford/svhn",
        "SVHN, 32x32 house numbers, cropped to a digit",
        "cropped_digits",
        {"train": 73_257, "test": 26_032, "extra": 531_131},
        (3, 32, 32),
        _DIGITS,
        "other",
    ),
    _wikitext(
        "Salesforce/wikitext",
        "wikitext-2-v1",
        _WIKITEXT_2,
        {
            "validation": "a836b97d49ab89075f058969a8cd8b5fe2619ec7a022f0b1f38f86a7dd901e49",
            "test": "d93b6c4ee935eac25f91239f3fc80494e3327cf6f61706a937f4a198dc3d3fc5",
        },
    ),
    _wikitext("Salesforce/wikitext/wikitext-2-raw-v1", "wikitext-2-raw-v1", _WIKITEXT_2, {}),
    _wikitext("Salesforce/wikitext/wikitext-103-v1", "wikitext-103-v1", _WIKITEXT_103, {}),
    _wikitext("Salesforce/wikitext/wikitext-103-raw-v1", "wikitext-103-raw-v1", _WIKITEXT_103, {}),
    DataSet(
        name="karpathy/tiny_shakespeare",
        kind="text",
        title="40 000 lines of Shakespeare",
        splits=MappingProxyType(dict.fromkeys(_SHAKESPEARE_PARTS)),
        licence="public domain",
        source="https://huggingface.co/datasets/karpathy/tiny_shakespeare",
        repository="karpathy/tiny_shakespeare",
        files=MappingProxyType(
            {
                split: (
                    Files("input.txt", (40_000,), revision=None, part=part, sha256=(_SHAKESPEARE_SHA256,)),
                    Files(f"default/{split}/*.parquet", (1,), revision=CONVERTED),
                )
                for split, part in _SHAKESPEARE_PARTS.items()
            }
        ),
    ),
    DataSet(
        name="ptb",
        kind="text",
        title="Penn Treebank, Wall Street Journal, 10 000 words",
        splits=MappingProxyType({split: count for split, (_, count) in _PTB.items()}),
        licence="LDC User Agreement",
        source="https://huggingface.co/datasets/ptb-text-only/ptb_text_only",
        repository="ptb-text-only/ptb_text_only",
        files=MappingProxyType(
            {
                split: (
                    Files(f"ptb.{stem}.txt", (count,), is_lines=True, revision=None, sha256=_PTB_SHA256.get(split, ())),
                    Files(
                        f"penn_treebank/{split}/*.parquet",
                        (count,),
                        column="sentence",
                        is_lines=True,
                        revision=CONVERTED,
                    ),
                )
                for split, (stem, count) in _PTB.items()
            }
        ),
    ),
)
_BY_NAME = MappingProxyType({data_set.name: data_set for data_set in _DATA_SETS})


def catalogue() -> tuple[DataSet, ...]:
    """All data sets that `load` knows, embedded ones first."""
    return _DATA_SETS


def find(name: str, split: str | None = None) -> DataSet:
    """The data set called ``name``.

    Raises:
        ValueError: unknown name, or a split that the data set does not have; with the nearest ones that exist.
    """
    if name not in _BY_NAME:
        short = {known.rsplit("/", 1)[-1]: known for known in _BY_NAME}
        near = [short.get(key, key) for key in difflib.get_close_matches(name, [*_BY_NAME, *short], n=3, cutoff=0.5)]
        hint = (
            f"did you mean {' or '.join(map(repr, dict.fromkeys(near)))}?" if near else f"known: {', '.join(_BY_NAME)}"
        )
        raise ValueError(f"no data set is called {name!r}; {hint}")
    data_set = _BY_NAME[name]
    if split is not None and split not in data_set.splits:
        near = difflib.get_close_matches(split, data_set.splits, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"{name!r} has no split {split!r}; {hint}it has: {', '.join(data_set.splits)}")
    return data_set
