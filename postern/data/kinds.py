"""What `load` gives: images, tables and texts, checked when they are made."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64, Num, UInt8
from torch import Tensor


@dataclass(frozen=True, eq=False, repr=False)
class Images:
    """Labelled images.

    Args:
        pixels: 0 to 255.
        labels: index into ``class_names``.
        class_names: one name a class.
        name: where they are from, for the reader ("ylecun/mnist, test").

    Raises:
        ValueError: no images, another dtype or shape, or a label without a class.
    """

    pixels: UInt8[Tensor, "images channels height width"]
    labels: Int64[Tensor, " images"]
    class_names: tuple[str, ...]
    name: str = ""

    def __post_init__(self) -> None:
        if self.pixels.dtype != torch.uint8 or self.pixels.dim() != 4:
            raise ValueError(
                "pixels are a uint8 tensor [images, channels, height, width], "
                f"got {self.pixels.dtype} {list(self.pixels.shape)}"
            )
        if self.labels.dtype != torch.int64 or self.labels.shape != self.pixels.shape[:1]:
            raise ValueError(
                f"labels are an int64 tensor [{len(self.pixels)}], one an image, "
                f"got {self.labels.dtype} {list(self.labels.shape)}"
            )
        if not len(self.labels):
            raise ValueError("an image set has at least one image, got none")
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= len(self.class_names):
            raise ValueError(f"labels lie in 0..{len(self.class_names) - 1}, got {low}..{high}")

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        count, channels, height, width = self.pixels.shape
        origin = f" of {self.name}" if self.name else ""
        return f"Images({count} images{origin}, {channels}x{height}x{width}, {len(self.class_names)} classes)"

    @property
    def num_classes(self) -> int:
        """Number of classes, whether or not each has an image here."""
        return len(self.class_names)

    def scaled(self) -> Float[Tensor, "images channels height width"]:
        """Pixels as float32 in [0, 1]: pixels / 255."""
        return self.pixels.to(torch.float32) / 255

    def limit(self, count: int | None) -> Images:
        """The first ``count`` images, or all where there are fewer or ``count`` is None."""
        stop = _stop(self, count)
        return Images(self.pixels[:stop], self.labels[:stop], self.class_names, self.name)

    def at(self, indices: Sequence[int] | np.ndarray | Tensor) -> Images:
        """The images with these numbers (0 is the first), in the order given; a number may come again.

        Raises:
            ValueError: no numbers, numbers that are no integers, or one without an image.
        """
        chosen = torch.from_numpy(_checked_indices(indices, len(self)))
        return Images(self.pixels[chosen], self.labels[chosen], self.class_names, self.name)


@dataclass(frozen=True, eq=False, repr=False)
class Table:
    """Rows of numbers with a target each.

    Args:
        features: finite numbers.
        target: class indices (integers) or values to regress (floats).
        feature_names: one a column.
        target_names: the classes; empty for a regression.
        name: where it is from, for the reader.

    Raises:
        ValueError: no rows, numbers that are not finite, or sizes that do not agree.
    """

    features: Float[np.ndarray, "rows columns"]
    target: Num[np.ndarray, " rows"]
    feature_names: tuple[str, ...]
    target_names: tuple[str, ...]
    name: str = ""

    def __post_init__(self) -> None:
        if self.features.ndim != 2 or self.features.dtype != np.float64:
            raise ValueError(
                f"features are a float64 array [rows, columns], got {self.features.dtype} {self.features.shape}"
            )
        rows, columns = self.features.shape
        if self.target.shape != (rows,):
            raise ValueError(f"the target has one value a row, [{rows}], got {self.target.shape}")
        if not rows:
            raise ValueError("a table has at least one row, got none")
        if len(self.feature_names) != columns:
            raise ValueError(f"{columns} columns need as many feature names, got {len(self.feature_names)}")
        if not np.isfinite(self.features).all() or not np.isfinite(self.target).all():
            raise ValueError("features and target are finite, got NaN or infinity")
        if self.target_names:
            low, high = int(self.target.min()), int(self.target.max())
            if not np.issubdtype(self.target.dtype, np.integer) or low < 0 or high >= len(self.target_names):
                raise ValueError(
                    f"class indices are integers in 0..{len(self.target_names) - 1}, "
                    f"got {self.target.dtype} in {low}..{high}"
                )

    def __len__(self) -> int:
        return len(self.target)

    def __repr__(self) -> str:
        origin = f" of {self.name}" if self.name else ""
        aim = f"{len(self.target_names)} classes" if self.target_names else "a value to regress"
        return f"Table({len(self)} rows{origin}, {self.features.shape[1]} features, {aim})"

    def scaled(self) -> Float[np.ndarray, "rows columns"]:
        """Features mapped column by column to [0, 1]: (x - min) / (max - min); a constant column becomes 0."""
        low, high = self.features.min(axis=0), self.features.max(axis=0)
        span: np.ndarray = np.where(high > low, high - low, 1.0)
        return np.asarray((self.features - low) / span)

    def limit(self, count: int | None) -> Table:
        """The first ``count`` rows, or all where there are fewer or ``count`` is None."""
        stop = _stop(self, count)
        return Table(self.features[:stop], self.target[:stop], self.feature_names, self.target_names, self.name)

    def at(self, indices: Sequence[int] | np.ndarray | Tensor) -> Table:
        """The rows with these numbers (0 is the first), in the order given; a number may come again.

        Raises:
            ValueError: no numbers, numbers that are no integers, or one without a row.
        """
        chosen = _checked_indices(indices, len(self))
        return Table(self.features[chosen], self.target[chosen], self.feature_names, self.target_names, self.name)


@dataclass(frozen=True, repr=False)
class Text:
    """A text.

    Args:
        text: the characters; at least one.
        name: where it is from, for the reader.

    Raises:
        ValueError: an empty text.
    """

    text: str
    name: str = ""

    def __post_init__(self) -> None:
        if not self.text:
            raise ValueError("a text has at least one character, got an empty one")

    def __len__(self) -> int:
        return len(self.text)

    def __repr__(self) -> str:
        origin = f" of {self.name}" if self.name else ""
        return f"Text({len(self)} characters{origin}, {self.text[:24]!r}...)"

    def encoded(self) -> UInt8[Tensor, " bytes"]:
        """The UTF-8 bytes, the tokens of a model over bytes (256 of them)."""
        return torch.frombuffer(bytearray(self.text.encode("utf-8")), dtype=torch.uint8)

    def limit(self, count: int | None) -> Text:
        """The first ``count`` characters, or all where there are fewer or ``count`` is None."""
        return Text(self.text[: _stop(self, count)], self.name)


def check_limit(limit: int | None) -> None:
    """Raise ValueError unless ``limit`` is None or a positive integer."""
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise ValueError(f"limit is a positive integer or None, got {limit!r}")


def _stop(items: Sized, count: int | None) -> int:
    check_limit(count)
    return len(items) if count is None else count


def _checked_indices(indices: Sequence[int] | np.ndarray | Tensor, count: int) -> np.ndarray:
    numbers = np.asarray(indices)
    if numbers.ndim != 1 or not numbers.size or not np.issubdtype(numbers.dtype, np.integer):
        raise ValueError(
            f"indices are a list of at least one integer, got {numbers.dtype if numbers.size else 'an empty list'} "
            f"{list(numbers.shape)}"
        )
    low, high = int(numbers.min()), int(numbers.max())
    if low < 0 or high >= count:
        raise ValueError(f"indices lie in 0..{count - 1}, got {low}..{high}")
    return numbers.astype(np.int64)
