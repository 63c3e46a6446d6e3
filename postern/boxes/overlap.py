"""Overlap of boxes and of segments: intersection over union.

Boxes are ``(x1, y1, x2, y2)`` with ``x1 <= x2`` and ``y1 <= y2``, segments ``(start, end)`` with ``start <= end``, both
in any unit of length. By default coordinates are continuous, so that a width is ``x2 - x1``. Older detectors, the
official code of Soft-NMS among them, count the pixels of both edges in: a width is then ``x2 - x1 + 1``. The two differ
visibly for boxes of a few pixels, so every function here takes ``is_pixel_inclusive``.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Real
from torch import Tensor


def box_area(boxes: Real[Tensor, "*batch 4"], *, is_pixel_inclusive: bool = False) -> Float[Tensor, "*batch"]:
    """Area ``(x2 - x1)(y2 - y1)`` of each box.

    Args:
        boxes: ``(x1, y1, x2, y2)``.
        is_pixel_inclusive: whether ``x2`` and ``y2`` are the last pixels inside, so that one is added to each side.

    Raises:
        ValueError: boxes of another shape, that are not finite, or whose ends come before their starts.
    """
    check_boxes(boxes)
    return _area(_floating(boxes), float(is_pixel_inclusive))


def box_iou(
    first: Real[Tensor, "*batch n 4"], second: Real[Tensor, "*batch m 4"], *, is_pixel_inclusive: bool = False
) -> Float[Tensor, "*batch n m"]:
    """Intersection over union ``|A & B| / |A | B|`` of every box of one set with every box of another.

    Two boxes without area have the overlap 0, wherever they lie.

    Args:
        first: ``(x1, y1, x2, y2)``.
        second: ``(x1, y1, x2, y2)``, in the same unit.
        is_pixel_inclusive: see `box_area`.

    Returns:
        Overlaps in [0, 1].

    Raises:
        ValueError: see `box_area`.
    """
    check_boxes(first)
    check_boxes(second)
    return overlaps(_floating(first)[..., :, None, :], _floating(second)[..., None, :, :], float(is_pixel_inclusive))


def segment_iou(
    first: Real[Tensor, "*batch n 2"], second: Real[Tensor, "*batch m 2"], *, is_pixel_inclusive: bool = False
) -> Float[Tensor, "*batch n m"]:
    """Intersection over union of every segment ``(start, end)`` of one set with every segment of another.

    Args:
        first: ``(start, end)``, say in seconds.
        second: ``(start, end)``, in the same unit.
        is_pixel_inclusive: whether ``end`` is the last frame inside.

    Raises:
        ValueError: segments of another shape, that are not finite, or that end before they start.
    """
    return box_iou(segments_as_boxes(first), segments_as_boxes(second), is_pixel_inclusive=is_pixel_inclusive)


def segments_as_boxes(segments: Real[Tensor, "*batch 2"]) -> Float[Tensor, "*batch 4"]:
    """Give segments a common height, which leaves their overlaps as they are.

    Raises:
        ValueError: segments of another shape.
    """
    if segments.dim() == 0 or segments.shape[-1] != 2:
        raise ValueError(f"segments have two coordinates (start, end), got the shape {tuple(segments.shape)}")
    segments = _floating(segments)
    start, end = segments.unbind(-1)
    return torch.stack([start, torch.zeros_like(start), end, torch.ones_like(end)], dim=-1)


def overlaps(first: Tensor, second: Tensor, margin: float) -> Tensor:
    """Intersection over union of boxes that broadcast against each other, unchecked.

    Args:
        first: floating-point boxes ``[..., 4]``.
        second: likewise.
        margin: what is added to each width and height, 0 or 1.
    """
    lowest = torch.maximum(first[..., :2], second[..., :2])
    highest = torch.minimum(first[..., 2:], second[..., 2:])
    sides = (highest - lowest + margin).clamp(min=0)
    intersection = sides[..., 0] * sides[..., 1]
    union = _area(first, margin) + _area(second, margin) - intersection
    # Where the union is 0 so is the intersection: 0 / 1.
    return intersection / torch.where(union > 0, union, 1)


def check_boxes(boxes: Tensor) -> None:
    """Check the shape and the values of boxes.

    Raises:
        ValueError: boxes of another shape, that are not finite, or whose ends come before their starts.
    """
    if boxes.dim() == 0 or boxes.shape[-1] != 4:
        raise ValueError(f"boxes have four coordinates (x1, y1, x2, y2), got the shape {tuple(boxes.shape)}")
    if not torch.isfinite(boxes).all():
        raise ValueError("boxes must be finite, got NaN or infinity")
    inverted = (boxes[..., :2] > boxes[..., 2:]).any(-1)
    if inverted.any():
        example = boxes[inverted][0].tolist()
        raise ValueError(f"boxes are (x1, y1, x2, y2) with x1 <= x2 and y1 <= y2, got {example}")


def _area(boxes: Tensor, margin: float) -> Tensor:
    sides = boxes[..., 2:] - boxes[..., :2] + margin
    return sides[..., 0] * sides[..., 1]


def _floating(boxes: Tensor) -> Tensor:
    return boxes if boxes.is_floating_point() else boxes.to(torch.float64)
