"""Data as a problem for a network: what it sees, what it must answer, in parts for training, choosing and testing.

The parts are the same for every member and every seed; a seed changes the networks' start and the batches alone.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from postern.claims.comparison import CannotCompare, Setting
from postern.data import Images, Table, Text, load_own_splits, split_rows
from postern.nets.language_model import consecutive_windows, random_windows

Part = Literal["validation", "test"]
Batch = tuple[Tensor, Tensor]
Kind = Images | Table | Text
Each = TypeVar("Each", Images, Table, Text)

WORD = re.compile(r"\w+|[^\w\s]+|\n")
UNKNOWN = "<unknown>"
MAX_WORDS = 8192
CONTEXT = 32  # words that a language model sees
_TEXT_BATCH, _ROWS_BATCH = 16, 64
_TEST_WORDS = 12_800  # of validation and test part, at most
_PATCHES = 8  # a side, at most


@dataclass(frozen=True)
class Rows:
    """Classification: inputs with one class each.

    Attributes:
        kind: "table" or "images".
        num_classes: number of classes.
        parts: inputs and classes by part; "train" is drawn from.
    """

    kind: str
    num_classes: int
    parts: Mapping[str, Batch]

    def draw(self, generator: torch.Generator) -> Batch:
        """A random batch to train on."""
        inputs, target = self.parts["train"]
        chosen = torch.randint(len(target), (min(_ROWS_BATCH, len(target)),), generator=generator)
        return inputs[chosen], target[chosen]

    def batches(self, part: Part) -> list[Batch]:
        """All of a part, in batches."""
        inputs, target = self.parts[part]
        return list(zip(torch.split(inputs, 512), torch.split(target, 512), strict=True))

    def counts(self) -> Int[Tensor, " classes"]:
        """How often each class occurs in the training part."""
        return torch.bincount(self.parts["train"][1], minlength=self.num_classes)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return tuple(self.parts["train"][0].shape[1:])

    def as_tokens(self) -> Rows:
        """The same with each input cut into tokens ``[tokens, features]``: columns of a table, patches of an image."""
        return Rows(self.kind, self.num_classes, {name: (_cut(x), y) for name, (x, y) in self.parts.items()})


@dataclass(frozen=True)
class Words:
    """A text: each word is to be told from those before it.

    Attributes:
        vocabulary: the words; index 0 is every other word.
        parts: word indices by part.
        context: words that a model sees at once.
    """

    vocabulary: tuple[str, ...]
    parts: Mapping[str, Int[Tensor, " words"]]
    kind: str = "text"
    context: int = CONTEXT

    def __post_init__(self) -> None:
        for part, words in self.parts.items():
            if len(words) < 2 * (self.context + 1):
                raise CannotCompare(
                    f"the {part} part of the text has {len(words)} words; a language model over {self.context} words "
                    f"needs {2 * (self.context + 1)} in each part: take a longer text"
                )

    @property
    def num_classes(self) -> int:
        """Size of the vocabulary."""
        return len(self.vocabulary)

    def counts(self) -> Int[Tensor, " classes"]:
        """How often each word occurs in the training part."""
        return torch.bincount(self.parts["train"], minlength=self.num_classes)

    def draw(self, generator: torch.Generator) -> Batch:
        """Random windows to train on: words, and the next word of each."""
        windows = random_windows(self.parts["train"], self.context + 1, _TEXT_BATCH, generator)
        return windows[:, :-1], windows[:, 1:]

    def batches(self, part: Part) -> list[Batch]:
        """Consecutive windows from the beginning of a part, in batches."""
        windows = consecutive_windows(self.parts[part], self.context + 1, _TEST_WORDS // self.context)
        return [(batch[:, :-1], batch[:, 1:]) for batch in torch.split(windows, 32)]


Problem = Rows | Words


def make_problem(splits: Mapping[str, Kind]) -> Problem:
    """Turn data into a problem.

    Args:
        splits: "train", and "test" if the data brings one; what is missing is split off: a fifth of the rows for
            validation and for testing each, a tenth of a text.

    Raises:
        CannotCompare: a target that is a number to regress, or too little data.
    """
    train = splits["train"]
    if isinstance(train, Text):
        return _words({name: part.text for name, part in _parts(train, splits, (0.8, 0.1, 0.1)).items()})
    rows = (0.6, 0.2, 0.2)
    if isinstance(train, Images):
        images = {name: (part.scaled(), part.labels) for name, part in _parts(train, splits, rows).items()}
        return Rows("images", train.num_classes, _standardised(images, (0, 2, 3)))
    if not train.target_names:
        raise CannotCompare(
            f"{train.name or 'this table'} has a target to regress; members are compared by the classes they predict: "
            "choose a label column with classes"
        )
    tables = {
        name: (torch.from_numpy(part.features), torch.from_numpy(part.target).long())
        for name, part in _parts(train, splits, rows).items()
    }
    return Rows("table", len(train.target_names), _standardised(tables, (0,)))


def _parts(train: Each, splits: Mapping[str, Kind], shares: tuple[float, float, float]) -> dict[str, Each]:
    """Training, validation and test part; the last is split off only where the data brings none."""
    test = splits.get("test")
    try:
        if isinstance(test, type(train)):
            return dict(zip(("train", "validation"), split_rows(train, (1 - shares[1], shares[1])), strict=True)) | {
                "test": test
            }
        return dict(zip(("train", "validation", "test"), split_rows(train, shares), strict=True))
    except ValueError as error:
        raise CannotCompare(str(error)) from error


def _words(texts: Mapping[str, str]) -> Words:
    words = {part: WORD.findall(text) for part, text in texts.items()}
    common = [word for word, count in Counter(words["train"]).most_common(MAX_WORDS - 1) if count > 1]
    vocabulary = (UNKNOWN, *common)
    index = {word: k for k, word in enumerate(vocabulary)}
    return Words(vocabulary, {part: torch.tensor([index.get(w, 0) for w in found]) for part, found in words.items()})


def _standardised(parts: Mapping[str, Batch], dims: Sequence[int]) -> dict[str, Batch]:
    """Mean 0 and deviation 1 on the training part, by column or channel."""
    inputs = parts["train"][0]
    mean = inputs.mean(tuple(dims), keepdim=True)
    deviation = inputs.std(tuple(dims), keepdim=True, correction=0)
    deviation = torch.where(deviation > 0, deviation, 1.0)
    return {name: (((x - mean) / deviation).float(), y) for name, (x, y) in parts.items()}


def _cut(inputs: Float[Tensor, "rows ..."]) -> Float[Tensor, "rows tokens features"]:
    if inputs.dim() == 2:
        return inputs.unsqueeze(-1)
    height, width = inputs.shape[-2:]
    side = max(-(-height // _PATCHES), -(-width // _PATCHES), 2)
    padded = torch.nn.functional.pad(inputs, (0, -width % side, 0, -height % side))
    return torch.nn.functional.unfold(padded, side, stride=side).transpose(1, 2).contiguous()


def problem_of(setting: Setting) -> Problem:
    """The problem that a setting asks for.

    Raises:
        CannotCompare: the data is not what it was when the comparison was planned.
    """
    splits = load_own_splits(setting.data, label=setting.label)
    if digest_of(splits) != setting.digest:
        raise CannotCompare(f"{setting.data} has changed since the comparison was planned: start it again")
    return make_problem(splits)


def kind_of(splits: Mapping[str, Kind]) -> str:
    """Return "text", "table" or "images"."""
    return {Text: "text", Table: "table", Images: "images"}[type(splits["train"])]


def digest_of(splits: Mapping[str, Kind]) -> str:
    """A hash of the data's content."""
    digest = hashlib.sha256()
    for name, part in sorted(splits.items()):
        digest.update(name.encode())
        if isinstance(part, Text):
            digest.update(part.text.encode())
        elif isinstance(part, Images):
            digest.update(part.pixels.numpy().tobytes())
            digest.update(part.labels.numpy().tobytes())
        else:
            digest.update(part.features.tobytes())
            digest.update(part.target.tobytes())
    return digest.hexdigest()[:16]
