"""A small one-stage detector without anchors, for scenes of small objects of one class.

It follows FCOS (Tian et al., arXiv 1904.01355) in miniature: each cell of a grid says whether it is near the centre of
an object, and how far the object's four sides are. Nothing in it knows of other cells, so that an object is found
several times and the detections need non-maximum suppression.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

# A cell is four pixels wide, and distances are learned in units of eight: about one for the objects it is made for.
STRIDE = 4
_UNIT = 8.0
# Cells whose centre is within this share of an object's width and height of its centre learn to find it.
_CENTRE = 0.3


class GridDetector(nn.Module):
    """A convolutional network of stride 4 with an objectness and four distances in each cell.

    Args:
        in_channels: channels of the images.
        widths: channels of the 3x3 convolutions, the first two of which have stride 2.

    Raises:
        ValueError: fewer than two widths, or a size below 1.
    """

    def __init__(self, in_channels: int = 1, widths: Sequence[int] = (16, 32, 48, 48, 48)) -> None:
        super().__init__()
        if len(widths) < 2 or min(in_channels, *widths) < 1:
            raise ValueError(f"two or more positive widths are needed, got {list(widths)} for {in_channels} channels")
        layers: list[nn.Module] = []
        for depth, (before, after) in enumerate(pairwise([in_channels, *widths])):
            convolution = nn.Conv2d(before, after, 3, stride=2 if depth < 2 else 1, padding=1, bias=False)
            layers += [convolution, nn.BatchNorm2d(after), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.objectness = nn.Conv2d(widths[-1], 1, 1)
        self.distances = nn.Conv2d(widths[-1], 4, 1)
        assert self.objectness.bias is not None
        assert self.distances.bias is not None
        nn.init.constant_(self.objectness.bias, -2.0)  # most cells are empty
        nn.init.constant_(self.distances.bias, 1.0)

    def forward(
        self, images: Float[Tensor, "batch channels height width"]
    ) -> tuple[Float[Tensor, "batch cells"], Float[Tensor, "batch cells 4"]]:
        """Return logits of objectness, and distances to the left, upper, right and lower side in units of 8 pixels.

        Raises:
            ValueError: images whose sides are no multiples of 4.
        """
        if images.dim() != 4 or images.shape[2] % STRIDE or images.shape[3] % STRIDE:
            raise ValueError(f"images are [n, channels, 4 a, 4 b], got {list(images.shape)}")
        hidden = self.body(images)
        return self.objectness(hidden).flatten(1), self.distances(hidden).flatten(2).transpose(1, 2)

    def loss(
        self, images: Float[Tensor, "batch channels height width"], boxes: Sequence[Float[Tensor, "objects 4"]]
    ) -> Float[Tensor, ""]:
        """Binary cross-entropy of objectness plus smooth L1 of the distances, both for each cell that has an object.

        Args:
            images: in [0, 1].
            boxes: ``(x1, y1, x2, y2)`` of the objects of each image, in pixels.

        Raises:
            ValueError: as many lists of boxes as are not images.
        """
        if len(boxes) != len(images):
            raise ValueError(f"there is one list of boxes an image, got {len(boxes)} for {len(images)} images")
        logits, distances = self(images)
        centres = cell_centres(images)
        has_object, wanted = assign(centres, boxes)
        count = has_object.sum().clamp(min=1)
        objectness = nn.functional.binary_cross_entropy_with_logits(
            logits, has_object.to(logits.dtype), reduction="sum"
        )
        error = nn.functional.smooth_l1_loss(distances, wanted / _UNIT, reduction="none").sum(-1)
        return (objectness + (error * has_object).sum()) / count

    @torch.no_grad()
    def candidates(
        self, images: Float[Tensor, "batch channels height width"], score_threshold: float = 0.02
    ) -> list[dict[str, Tensor]]:
        """Return each image's boxes and scores, before any suppression, of cells above a threshold.

        Args:
            images: in [0, 1].
            score_threshold: lowest probability.
        """
        logits, distances = self(images)
        scores = logits.float().sigmoid()
        reach = distances.float().clamp(min=0) * _UNIT
        centres = cell_centres(images)
        boxes = torch.cat([centres - reach[..., :2], centres + reach[..., 2:]], dim=-1)
        is_candidate = scores > score_threshold
        return [{"boxes": boxes[i, is_candidate[i]], "scores": scores[i, is_candidate[i]]} for i in range(len(images))]


def cell_centres(images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "cells 2"]:
    """Centres (x, y) of the cells, row by row, in pixels."""
    y, x = (torch.arange(STRIDE / 2, side, STRIDE, device=images.device) for side in images.shape[2:])
    return torch.cartesian_prod(y, x).flip(-1)


@torch.no_grad()
def assign(
    centres: Float[Tensor, "cells 2"], boxes: Sequence[Float[Tensor, "objects 4"]]
) -> tuple[Bool[Tensor, "batch cells"], Float[Tensor, "batch cells 4"]]:
    """Say which cells are to find an object, and where its sides are.

    A cell finds the object whose centre is nearest in units of its size, if that is within 0.3; and the cell nearest
    to an object finds it in any case.

    Args:
        centres: see `cell_centres`.
        boxes: ``(x1, y1, x2, y2)`` of the objects of each image, in pixels.

    Returns:
        (whether the cell has an object, distances to its left, upper, right and lower side in pixels; 0 where it has
        none).
    """
    has_object = torch.zeros(len(boxes), len(centres), dtype=torch.bool, device=centres.device)
    wanted = torch.zeros(len(boxes), len(centres), 4, device=centres.device)
    for i, objects in enumerate(boxes):
        if not len(objects):
            continue
        objects = objects.to(centres.device)
        size = (objects[:, 2:] - objects[:, :2]).clamp(min=1)
        offset = (centres[:, None] - (objects[:, :2] + objects[:, 2:]) / 2).abs() / size
        distance = offset.amax(-1)
        nearest_cell = distance.argmin(dim=0)
        distance[nearest_cell, torch.arange(len(objects), device=centres.device)] = 0
        nearest, which = distance.min(dim=1)
        has_object[i] = nearest <= _CENTRE
        chosen = objects[which]
        reach = torch.cat([centres - chosen[:, :2], chosen[:, 2:] - centres], dim=-1)
        wanted[i] = reach * has_object[i][:, None]
    return has_object, wanted
