r"""Soft-NMS: decay the scores of boxes that overlap a better one, instead of deleting the boxes.

Paper: N. Bodla, B. Singh, R. Chellappa and L. Davis, "Soft-NMS -- Improving Object Detection With One Line of Code"
(arXiv 1704.04503). Greedy non-maximum suppression keeps the best box :math:`M` and deletes every box that overlaps it
by more than a threshold, a second object that stands behind the first one included. Soft-NMS keeps the box
:math:`b_i` with the score :math:`s_i f(\mathrm{iou}(M, b_i))`, where :math:`f` falls from 1 to 0, and goes on to the
next best.

What differs from the official code: coordinates are continuous unless ``is_pixel_inclusive`` is set; the score
threshold is applied to every box, not only to those that meet a selected one, so that no result has a score below it;
the arithmetic is in double precision, so that the order of selection does not depend on rounding; and nothing is
changed in place.

On a CPU the loop is compiled C++, if there was a compiler; elsewhere, or with a decay function of one's own, it runs
through torch, all groups in step. The tests compare both with `postern.boxes.soft_nms_reference`, box by box.
"""

from __future__ import annotations

from typing import Literal, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int, Real
from torch import Tensor

from postern.boxes._options import Decay, Options
from postern.boxes._selection import select
from postern.boxes.overlap import segments_as_boxes

Array = TypeVar("Array", Tensor, np.ndarray)
Method = Literal["gaussian", "linear", "hard"]


def soft_nms(
    boxes: Real[Array, "n 4"],
    scores: Float[Array, " n"],
    method: Method = "gaussian",
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    score_threshold: float = 1e-3,
    max_out: int | None = None,
    decay: Decay | None = None,
    *,
    is_pixel_inclusive: bool = False,
) -> tuple[Int[Array, " k"], Float[Array, " k"]]:
    """Select boxes of one class in one image, best first, decaying the scores of those that overlap a selected one.

    Until no box is left: select the box M with the highest score (ties: the lowest index), multiply the score of
    every other box b by ``f(iou(M, b))``, and drop those whose score falls below ``score_threshold`` or to 0. For k
    selected boxes that takes O(n k) time and O(n) memory.

    Torch tensors give tensors on the same device, NumPy arrays give arrays. The result carries no gradient.

    Args:
        boxes: ``(x1, y1, x2, y2)`` with ``x1 <= x2`` and ``y1 <= y2``.
        scores: not negative.
        method: f: `gaussian_decay`, `linear_decay` or `hard_decay`, the last being classic NMS.
        iou_threshold: N_t of the linear and the hard method, in [0, 1].
        sigma: width of the Gaussian, positive. Towards 0 it becomes hard NMS with N_t = 0, towards infinity it
            leaves all scores as they are.
        score_threshold: lowest score that a box keeps. A high one hides what Soft-NMS does: evaluate at 0.05 or less.
        max_out: how many boxes to select at most. Boxes are selected in the order of their final scores, so that
            stopping early loses no better one.
        decay: a function f of one's own instead of ``method``: from a tensor of overlaps in [0, 1], of any shape, to
            factors in [0, 1].
        is_pixel_inclusive: whether ``x2`` and ``y2`` are the last pixels inside, as in the official code.

    Returns:
        (indices of the selected boxes, their decayed scores), by falling score.

    Raises:
        ValueError: boxes or scores of another shape, not finite, inverted or negative; or a parameter out of range.
    """
    options = Options(method, iou_threshold, sigma, score_threshold, max_out, decay, is_pixel_inclusive)
    keep, kept_scores = select(torch.as_tensor(boxes), torch.as_tensor(scores), None, options)
    return _as_given(keep, boxes), _as_given(kept_scores, boxes)


def batched_soft_nms(
    boxes: Real[Array, "n 4"],
    scores: Float[Array, " n"],
    idxs: Int[Array, " n"],
    method: Method = "gaussian",
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    score_threshold: float = 1e-3,
    max_out: int | None = None,
    decay: Decay | None = None,
    *,
    is_pixel_inclusive: bool = False,
) -> tuple[Int[Array, " k"], Float[Array, " k"]]:
    """`soft_nms` within each group: boxes of different classes, or of different images, leave each other alone.

    Groups are told apart by their index, not by moving their boxes to different places, so that no coordinate loses
    precision. For several classes in several images let ``idxs = image * num_classes + label``.

    Args:
        boxes: see `soft_nms`.
        scores: see `soft_nms`.
        idxs: the group of each box, any integers.
        method: see `soft_nms`.
        iou_threshold: see `soft_nms`.
        sigma: see `soft_nms`.
        score_threshold: see `soft_nms`.
        max_out: how many boxes to select at most, of all groups together.
        decay: see `soft_nms`.
        is_pixel_inclusive: see `soft_nms`.

    Returns:
        (indices of the selected boxes, their decayed scores), by falling score over all groups.

    Raises:
        ValueError: see `soft_nms`; or group indices of another shape or not integer.
    """
    options = Options(method, iou_threshold, sigma, score_threshold, max_out, decay, is_pixel_inclusive)
    keep, kept_scores = select(torch.as_tensor(boxes), torch.as_tensor(scores), torch.as_tensor(idxs), options)
    return _as_given(keep, boxes), _as_given(kept_scores, boxes)


def soft_nms_1d(
    segments: Real[Array, "n 2"],
    scores: Float[Array, " n"],
    method: Method = "gaussian",
    iou_threshold: float = 0.3,
    sigma: float = 0.5,
    score_threshold: float = 1e-3,
    max_out: int | None = None,
    decay: Decay | None = None,
    *,
    is_pixel_inclusive: bool = False,
) -> tuple[Int[Array, " k"], Float[Array, " k"]]:
    """`soft_nms` for segments of time, as temporal action detection uses it.

    Args:
        segments: ``(start, end)`` with ``start <= end``, say in seconds.
        scores: see `soft_nms`.
        method: see `soft_nms`.
        iou_threshold: see `soft_nms`.
        sigma: see `soft_nms`.
        score_threshold: see `soft_nms`.
        max_out: see `soft_nms`.
        decay: see `soft_nms`.
        is_pixel_inclusive: whether ``end`` is the last frame inside.

    Returns:
        (indices of the selected segments, their decayed scores), by falling score.

    Raises:
        ValueError: see `soft_nms`.
    """
    options = Options(method, iou_threshold, sigma, score_threshold, max_out, decay, is_pixel_inclusive)
    boxes = segments_as_boxes(torch.as_tensor(segments))
    keep, kept_scores = select(boxes, torch.as_tensor(scores), None, options)
    return _as_given(keep, segments), _as_given(kept_scores, segments)


def _as_given(result: Tensor, given: Array) -> Array:
    return result if isinstance(given, Tensor) else result.numpy()
