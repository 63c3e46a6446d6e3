"""Scenes of several digits on one canvas, near each other or apart: a detection task that every machine can make.

How crowded a scene is can be set, which no collection of photographs allows; so the effect of crowding on a detector,
or on what comes after it, can be told from everything else.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64, UInt8
from PIL import Image
from torch import Tensor

from postern.data.kinds import Images

# Fainter pixels, as a share of the brightest, do not count as ink when a digit is cut out.
_FAINTEST_INK = 0.2
_ATTEMPTS = 50


@dataclass(frozen=True, eq=False, repr=False)
class Scenes:
    """Images with boxes around their objects.

    Args:
        pixels: 0 to 255.
        boxes: for each image ``(x1, y1, x2, y2)`` in pixels, edges included, so that a width is ``x2 - x1``.
        labels: for each image the classes of the boxes.

    Raises:
        ValueError: as many lists of boxes or labels as are not images, or as many labels as are not boxes.
    """

    pixels: UInt8[Tensor, "images channels height width"]
    boxes: tuple[Float[Tensor, "objects 4"], ...]
    labels: tuple[Int64[Tensor, " objects"], ...]

    def __post_init__(self) -> None:
        sizes = len(self.pixels), len(self.boxes), len(self.labels)
        if len(set(sizes)) > 1:
            raise ValueError(f"images, boxes and labels have one entry a scene, got {sizes}")
        for boxes, labels in zip(self.boxes, self.labels, strict=True):
            if boxes.shape != (len(labels), 4):
                raise ValueError(f"{len(labels)} labels need boxes [{len(labels)}, 4], got {list(boxes.shape)}")

    def __len__(self) -> int:
        return len(self.pixels)

    def __repr__(self) -> str:
        height, width = self.pixels.shape[2:]
        return f"Scenes({len(self)} of {height}x{width}, {sum(map(len, self.boxes))} objects)"

    def scaled(self) -> Float[Tensor, "images channels height width"]:
        """Pixels as float32 in [0, 1]: pixels / 255."""
        return self.pixels.to(torch.float32) / 255


def digit_scenes(
    digits: Images,
    count: int,
    rng: np.random.Generator,
    crowding: float = 0.0,
    *,
    is_separated: bool = False,
    canvas: int = 64,
    num_objects: tuple[int, int] = (2, 6),
    object_size: tuple[int, int] = (14, 26),
    noise: float = 0.1,
) -> Scenes:
    """Paste digits on canvases.

    Each digit is cut out along its ink, scaled so that its longer side has a size drawn from ``object_size``, and
    pasted by maximum: where digits cross, both stay visible. With the probability ``crowding`` it goes near an earlier
    one, its centre within 0.55 of that one's width and height; else anywhere. A box encloses the ink.

    Args:
        digits: what to paste, of one channel.
        count: number of scenes.
        rng: draws everything.
        crowding: in [0, 1].
        is_separated: whether to place digits only where their box overlaps no other by more than 0.05; digits that
            find no place are left out.
        canvas: side of a scene, in pixels.
        num_objects: fewest and most digits of a scene.
        object_size: shortest and longest side of a digit, in pixels.
        noise: standard deviation of the Gaussian noise, as a share of full brightness.

    Returns:
        The scenes, with the digits' labels.

    Raises:
        ValueError: images of several channels, or a parameter out of range.
    """
    if digits.pixels.shape[1] != 1:
        raise ValueError(f"digits have one channel, got {digits.pixels.shape[1]}")
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    if not 0 <= crowding <= 1:
        raise ValueError(f"crowding is a probability, got {crowding}")
    if not 1 <= num_objects[0] <= num_objects[1]:
        raise ValueError(f"num_objects are the fewest and the most, at least 1, got {num_objects}")
    if not 1 <= object_size[0] <= object_size[1] <= canvas:
        raise ValueError(f"object_size is a range within the canvas of {canvas} pixels, got {object_size}")
    if noise < 0:
        raise ValueError(f"noise must not be negative, got {noise}")
    sources = digits.pixels[:, 0].numpy()
    pixels = np.zeros((count, 1, canvas, canvas), np.uint8)
    boxes, labels = [], []
    for scene in range(count):
        image = np.zeros((canvas, canvas), np.float32)
        placed: list[tuple[float, ...]] = []
        names = []
        for _ in range(rng.integers(num_objects[0], num_objects[1] + 1)):
            which = int(rng.integers(len(sources)))
            patch = _cut_out(sources[which], int(rng.integers(object_size[0], object_size[1] + 1)))
            box = _place(patch.shape, placed, canvas, crowding, is_separated, rng)
            if box is None:
                continue
            x1, y1, x2, y2 = box
            image[y1:y2, x1:x2] = np.maximum(image[y1:y2, x1:x2], patch)
            placed.append(box)
            names.append(int(digits.labels[which]))
        image += rng.normal(0, 255 * noise, image.shape).astype(np.float32)
        pixels[scene, 0] = image.clip(0, 255).round()
        boxes.append(torch.tensor(placed, dtype=torch.float32).reshape(-1, 4))
        labels.append(torch.tensor(names, dtype=torch.int64))
    return Scenes(torch.from_numpy(pixels), tuple(boxes), tuple(labels))


def _cut_out(digit: np.ndarray, longer_side: int) -> np.ndarray:
    ink = digit >= _FAINTEST_INK * max(int(digit.max()), 1)
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    tight = digit[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] if len(rows) else digit
    scale = longer_side / max(tight.shape)
    height, width = (max(1, round(side * scale)) for side in tight.shape)
    return np.asarray(Image.fromarray(tight).resize((width, height), Image.Resampling.BILINEAR))


def _place(
    shape: tuple[int, ...],
    placed: list[tuple[float, ...]],
    canvas: int,
    crowding: float,
    is_separated: bool,
    rng: np.random.Generator,
) -> tuple[int, int, int, int] | None:
    """A box for a patch of this shape, or None where there is no free place."""
    height, width = shape
    room = np.array([canvas - width, canvas - height])
    for _ in range(_ATTEMPTS):
        if placed and rng.random() < crowding:
            near = np.array(placed[int(rng.integers(len(placed)))])
            size = near[2:] - near[:2]
            centre = near[:2] + size / 2 + rng.uniform(-0.55, 0.55, 2) * size
            corner = (centre - np.array([width, height]) / 2).round().clip(0, room)
        else:
            corner = rng.integers(0, room + 1)
        x, y = int(corner[0]), int(corner[1])
        box = (x, y, x + width, y + height)
        if not is_separated or all(_overlap(box, other) <= 0.05 for other in placed):
            return box
    return None


def _overlap(first: tuple[float, ...], second: tuple[float, ...]) -> float:
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    intersection = max(width, 0) * max(height, 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return intersection / (areas[0] + areas[1] - intersection)
