"""Detections without a detector: boxes scattered around objects that overlap by a given amount.

What a detector learns, and how well, plays no part here, so that what is done with its boxes can be studied alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

_TILE = 100.0  # a pair of objects to a tile, in pixels; pairs never meet
_SIZES = (24.0, 40.0)


@dataclass(frozen=True, eq=False)
class Detections:
    """Scored boxes of one image, and the objects that they should find.

    Attributes:
        boxes: ``(x1, y1, x2, y2)`` in pixels.
        scores: in [0, 1].
        objects: boxes of the objects.
    """

    boxes: Float[np.ndarray, "n 4"]
    scores: Float[np.ndarray, " n"]
    objects: Float[np.ndarray, "objects 4"]


def simulated_detections(
    count: int,
    overlap: tuple[float, float],
    rng: np.random.Generator,
    *,
    boxes_per_object: int = 20,
    false_boxes: int = 15,
    score_noise: float = 0.07,
) -> list[Detections]:
    """Draw images of four pairs of objects, in each of which one stands before the other.

    The objects of a pair have one size, and an intersection over union drawn uniformly from a range. Around each
    object lie boxes whose sides are off by Gaussian errors of 0.02 to 0.2 of its size; their scores are their
    intersection over union with it, times a quality of the object in [0.5, 1], plus Gaussian noise. False boxes lie
    anywhere, their scores drawn from Beta(1, 6).

    Args:
        count: number of images.
        overlap: lowest and highest intersection over union of the two objects of a pair, in [0, 1).
        rng: draws everything.
        boxes_per_object: how often each object is found.
        false_boxes: boxes around nothing, in an image.
        score_noise: standard deviation.

    Raises:
        ValueError: a parameter out of range.
    """
    if count < 1 or boxes_per_object < 1 or false_boxes < 0:
        raise ValueError(
            "images and boxes_per_object are at least 1, false_boxes at least 0, "
            f"got {count}, {boxes_per_object} and {false_boxes}"
        )
    if not 0 <= overlap[0] <= overlap[1] < 1:
        raise ValueError(f"overlap is a range within [0, 1), got {overlap}")
    if score_noise < 0:
        raise ValueError(f"score_noise must not be negative, got {score_noise}")
    return [_image(overlap, rng, boxes_per_object, false_boxes, score_noise) for _ in range(count)]


def _image(
    overlap: tuple[float, float], rng: np.random.Generator, boxes_per_object: int, false_boxes: int, score_noise: float
) -> Detections:
    tiles = np.stack(np.meshgrid([0, _TILE], [0, _TILE]), axis=-1).reshape(-1, 2) + _TILE / 5
    sizes = rng.uniform(*_SIZES, (len(tiles), 2))
    # Two boxes of width w, one moved along by d, have the overlap (w - d) / (w + d).
    iou = rng.uniform(*overlap, (len(tiles), 1))
    axis = np.eye(2)[rng.integers(0, 2, len(tiles))]
    moved = tiles + axis * sizes * (1 - iou) / (1 + iou)
    corners, sizes = np.concatenate([tiles, moved]), np.concatenate([sizes, sizes])
    objects = np.concatenate([corners, corners + sizes], axis=1)

    owner = np.repeat(np.arange(len(objects)), boxes_per_object)
    error = rng.uniform(0.02, 0.2, (len(owner), 1)) * rng.normal(size=(len(owner), 4))
    found = objects[owner] + error * np.tile(sizes, 2)[owner]
    found = np.concatenate([np.minimum(found[:, :2], found[:, 2:]), np.maximum(found[:, :2], found[:, 2:])], axis=1)
    quality = rng.uniform(0.5, 1, len(objects))
    scores = quality[owner] * _overlap(found, objects[owner]) + rng.normal(0, score_noise, len(owner))

    places = rng.uniform(0, 2 * _TILE - _SIZES[1], (false_boxes, 2))
    nothing = np.concatenate([places, places + rng.uniform(*_SIZES, (false_boxes, 2))], axis=1)
    return Detections(
        np.concatenate([found, nothing]),
        np.concatenate([scores, rng.beta(1, 6, false_boxes)]).clip(0, 1),
        objects,
    )


def _overlap(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Intersection over union, row by row."""
    sides = np.minimum(first[:, 2:], second[:, 2:]) - np.maximum(first[:, :2], second[:, :2])
    intersection = sides.clip(min=0).prod(1)
    area = [(boxes[:, 2:] - boxes[:, :2]).prod(1) for boxes in (first, second)]
    return np.asarray(intersection / (area[0] + area[1] - intersection))
