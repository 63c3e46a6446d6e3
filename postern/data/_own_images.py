"""Read a user's own images, whatever their size and colours, into one tensor."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from postern.data.errors import InvalidData

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp"})
LONGEST_SIDE = 64
_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP")
_ORIENTATION, _TURNED = 0x0112, frozenset({5, 6, 7, 8})  # the Exif tag, and its values that swap width and height


@dataclass(frozen=True)
class Picture:
    """An encoded image.

    Attributes:
        path: its file.
        place: where it is in its file ("row 7") where that is a parquet one.
        content: its bytes where the file is a parquet one.
    """

    path: Path
    place: str = ""
    content: bytes | None = None

    @contextmanager
    def opened(self) -> Iterator[Image.Image]:
        """The image; its pixels are decoded when they are asked for.

        Raises:
            InvalidData: no image, or one that does not decode.
        """
        try:
            source = self.path if self.content is None else io.BytesIO(self.content)
            with Image.open(source, formats=_FORMATS) as image:
                yield image
        except Exception as error:  # Pillow's plug-ins raise errors of many kinds on damaged files
            place = f"{self.place} " if self.place else ""
            # Pillow's own message for an unknown format repeats the path.
            reason = "unknown format" if isinstance(error, UnidentifiedImageError) else str(error)
            raise InvalidData(
                self.path,
                f"{place}does not decode as an image ({reason})",
                f"a whole image in one of the formats {', '.join(_FORMATS)}",
                "Replace or remove it.",
            ) from error


def read_pictures(pictures: Sequence[Picture], image_size: int | None) -> tuple[Tensor, str]:
    """Decode the pictures and bring them to one size and one number of channels.

    An image of another size is scaled, with its proportions kept, until it covers the common size, and what stands out
    at two sides is cut off evenly. Transparent pixels become white, of an animation the first picture is taken, and a
    photograph is turned as its Exif data say.

    Args:
        pictures: at least one.
        image_size: height and width in pixels. By default the most frequent size, scaled down to a longest side of 64.

    Returns:
        Pixels, uint8 [pictures, channels, height, width], with one channel where all are grey and three else; and what
        was done to their sizes, for the reader; empty where nothing was.

    Raises:
        InvalidData: a picture that does not decode.
    """
    sizes: Counter[tuple[int, int]] = Counter()
    is_grey = True
    for picture in pictures:
        with picture.opened() as image:
            width, height = image.size
            sizes[(height, width) if image.getexif().get(_ORIENTATION) in _TURNED else (width, height)] += 1
            is_grey = is_grey and _is_grey(image)
    target = (image_size, image_size) if image_size is not None else _capped(sizes.most_common(1)[0][0])
    pixels = np.empty((len(pictures), target[1], target[0], 1 if is_grey else 3), dtype=np.uint8)
    for index, picture in enumerate(pictures):
        pixels[index] = _decode(picture, target, "L" if is_grey else "RGB").reshape(pixels.shape[1:])
    note = ""
    if set(sizes) != {target}:
        of = "x".join(map(str, next(iter(sizes)))) if len(sizes) == 1 else f"{len(sizes)} sizes"
        note = f"{of} brought to {target[0]}x{target[1]} pixels"
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))), note


def _capped(size: tuple[int, int]) -> tuple[int, int]:
    scale = min(1.0, LONGEST_SIDE / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _is_grey(image: Image.Image) -> bool:
    return image.mode in {"1", "L", "LA"} or image.mode.startswith("I")


def _decode(picture: Picture, size: tuple[int, int], mode: str) -> np.ndarray:
    with picture.opened() as opened:
        # A large photograph in JPEG is decoded at a half, a quarter or an eighth of its size, several times faster.
        opened.draft(None, (2 * max(size), 2 * max(size)))
        image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I"):
            # Pillow cuts 16 bits off at 255 instead of scaling them.
            image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8))
        if "A" in image.getbands() or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert(mode)
        if image.size != size:
            image = ImageOps.fit(image, size, Image.Resampling.BILINEAR)
        return np.asarray(image)
