"""Split a data set into parts: to train on, to choose by, to judge by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TypeVar

import numpy as np

from postern.data.kinds import Images, Table, Text

Kind = TypeVar("Kind", Images, Table, Text)

_ROW_SHARES = (0.6, 0.2, 0.2)
_TEXT_SHARES = (0.8, 0.1, 0.1)


def split_rows(kind: Kind, shares: Sequence[float] | None = None, seed: int = 0) -> list[Kind]:
    """Split a data set into parts that together are the whole and have nothing in common.

    Images and the rows of a table are drawn at random, class by class, so that every part has the classes in (nearly)
    the same proportions and at least one of each class, and come out shuffled. The rows of a regression are drawn from
    all alike. A text is cut in its order: neighbouring sentences belong together.

    Args:
        kind: images, a table or a text.
        shares: of the whole, for each part; by default 0.6, 0.2, 0.2 of images and rows, 0.8, 0.1, 0.1 of a text's
            characters.
        seed: of the draw; a text has none.

    Raises:
        ValueError: shares that are not two or more positive numbers with the sum one, or too little to put something,
            and one of each class, into every part.
    """
    if shares is None:
        shares = _TEXT_SHARES if isinstance(kind, Text) else _ROW_SHARES
    _check_shares(shares)
    if isinstance(kind, Text):
        return _split_text(kind, shares)
    if isinstance(kind, Images):
        classes, names = kind.labels.numpy(), kind.class_names
    else:
        # The rows of a regression are one class.
        classes, names = (kind.target if kind.target_names else np.zeros(len(kind), dtype=np.int64)), kind.target_names
    parts = _draw(classes, shares, np.random.default_rng(seed), names or ("row",), kind.name)
    return [kind.at(part) for part in parts]


def apportion(total: int, shares: Sequence[float], at_least: int) -> list[int]:
    """Integers with the sum ``total``, each ``at_least`` so large, and otherwise as near to the shares as can be.

    Largest remainders; what the minimum adds is taken from the part that is furthest above its share.
    """
    exact = [share * total for share in shares]
    sizes = [max(at_least, math.floor(size)) for size in exact]
    parts = range(len(sizes))
    while sum(sizes) < total:
        sizes[max(parts, key=lambda part: exact[part] - sizes[part])] += 1
    while sum(sizes) > total:
        sizes[max((part for part in parts if sizes[part] > at_least), key=lambda part: sizes[part] - exact[part])] -= 1
    return sizes


def _check_shares(shares: Sequence[float]) -> None:
    if len(shares) < 2 or not all(share > 0 for share in shares) or not math.isclose(sum(shares), 1):
        raise ValueError(f"shares are two or more positive numbers with the sum 1, got {shares!r}")


def _draw(
    classes: np.ndarray,
    shares: Sequence[float],
    generator: np.random.Generator,
    class_names: Sequence[str],
    origin: str,
) -> list[np.ndarray]:
    parts: list[list[np.ndarray]] = [[] for _ in shares]
    for index in np.unique(classes):
        members = generator.permutation(np.flatnonzero(classes == index))
        if len(members) < len(parts):
            raise ValueError(
                f"{origin or 'the data set'} has {len(members)} of {class_names[index]!r}; {len(parts)} parts need at "
                f"least {len(parts)} of each class. Add examples of it, or leave it out"
            )
        ends = np.cumsum(apportion(len(members), shares, at_least=1))
        for part, piece in zip(parts, np.split(members, ends[:-1]), strict=True):
            part.append(piece)
    return [generator.permutation(np.concatenate(part)) for part in parts]


def _split_text(text: Text, shares: Sequence[float]) -> list[Text]:
    if len(text) < len(shares):
        raise ValueError(
            f"a text of {len(text)} characters cannot be cut into {len(shares)} parts; it needs at least {len(shares)}"
        )
    ends = np.cumsum(apportion(len(text), shares, at_least=1)).tolist()
    return [Text(text.text[start:end], text.name) for start, end in pairwise([0, *ends])]
