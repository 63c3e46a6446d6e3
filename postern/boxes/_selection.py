"""The greedy selection behind all forms of Soft-NMS: checks, the vectorised loop, and its registration with torch."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from postern.boxes import _kernel
from postern.boxes._options import Options
from postern.boxes.overlap import check_boxes, overlaps

# How many steps of the loop pass before it asks which boxes are left: on a GPU the question waits for all before it.
_STEPS_BETWEEN_CHECKS = 16
# Once no more than this many pairs of boxes are left, all their factors are computed at once (half a megabyte).
_MATRIX_ELEMENTS = 2**16


def select(boxes: Tensor, scores: Tensor, groups: Tensor | None, options: Options) -> tuple[Tensor, Tensor]:
    """Select boxes group by group; see `postern.boxes.batched_soft_nms`.

    Args:
        boxes: ``[n, 4]``.
        scores: ``[n]``.
        groups: ``[n]`` integers, or None for one group.
        options: everything else.

    Returns:
        (indices ``[k]``, scores ``[k]`` of the dtype of ``scores``), by falling score, ties by rising index.

    Raises:
        ValueError: see `postern.boxes.soft_nms`.
    """
    if boxes.dim() != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes are a matrix [n, 4], got the shape {list(boxes.shape)}")
    if scores.shape != boxes.shape[:1] or not scores.is_floating_point():
        raise ValueError(
            f"scores are {len(boxes)} floating-point numbers, one a box, got {scores.dtype} {list(scores.shape)}"
        )
    if groups is None:
        groups = torch.zeros(scores.shape, dtype=torch.long, device=scores.device)
    elif groups.shape != scores.shape or not _is_integer(groups):
        raise ValueError(f"idxs are {len(boxes)} integers, one a box, got {groups.dtype} {list(groups.shape)}")
    for name, tensor in (("scores", scores), ("idxs", groups)):
        if tensor.device != boxes.device:
            raise ValueError(f"boxes are on {boxes.device}, so {name} must be too; they are on {tensor.device}")
    if options.decay is not None:
        return _select(boxes, scores, groups, options)
    keep, kept_scores = _registered(
        boxes.detach(),
        scores.detach(),
        groups,
        options.method,
        options.iou_threshold,
        options.sigma,
        options.score_threshold,
        options.max_out,
        options.is_pixel_inclusive,
    )
    return keep, kept_scores


@torch.library.custom_op("postern::soft_nms", mutates_args=())
def _registered(
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor,
    method: str,
    iou_threshold: float,
    sigma: float,
    score_threshold: float,
    max_out: int | None,
    is_pixel_inclusive: bool,
) -> tuple[Tensor, Tensor]:
    """One operator for torch.compile, which could not trace a loop that ends when the data say so."""
    options = Options(method, iou_threshold, sigma, score_threshold, max_out, None, is_pixel_inclusive)
    return _select(boxes, scores, groups, options)


@_registered.register_fake
def _(
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor,
    method: str,
    iou_threshold: float,
    sigma: float,
    score_threshold: float,
    max_out: int | None,
    is_pixel_inclusive: bool,
) -> tuple[Tensor, Tensor]:
    k = torch.library.get_ctx().new_dynamic_size()
    return scores.new_empty(k, dtype=torch.long), scores.new_empty(k)


@torch.no_grad()
def _select(boxes: Tensor, scores: Tensor, groups: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    check_boxes(boxes)
    if not torch.isfinite(scores).all() or (scores < 0).any():
        raise ValueError("scores must be finite and not negative, got NaN, infinity or a negative number")
    # Double precision, so that boxes are selected in one order on all devices. Apple's GPUs have none.
    dtype = torch.float32 if boxes.device.type == "mps" else torch.float64
    final = _final_scores(boxes.to(dtype), scores.to(dtype), groups, options)
    # Scores never rise, so that boxes were selected in the order of their final scores.
    final, order = final.sort(descending=True, stable=True)
    keep = order[: int((final > 0).sum())][: options.max_out]
    return keep, final[: len(keep)].to(scores.dtype)


def _final_scores(boxes: Tensor, scores: Tensor, groups: Tensor, options: Options) -> Tensor:
    """The score of each box when it was selected, or 0 where it was dropped."""
    result = torch.zeros_like(scores)
    candidates = ((scores >= options.score_threshold) & (scores > 0)).nonzero()[:, 0]
    if not len(candidates):
        return result
    _, row, sizes = torch.unique(groups[candidates], return_inverse=True, return_counts=True)
    by_row = row.argsort(stable=True)
    row, candidates = row[by_row], candidates[by_row]
    ends = sizes.cumsum(0)
    if boxes.device.type == "cpu" and options.decay is None and _kernel.is_available():
        result[candidates] = _kernel.select_by_group(
            boxes[candidates],
            scores[candidates],
            torch.cat([ends.new_zeros(1), ends]),
            options,
        )
        return result
    # All groups advance together, one box a step: rows are groups, padded to the size of the largest.
    column = torch.arange(len(row), device=row.device) - (ends - sizes)[row]
    shape = len(sizes), int(sizes.max())
    padded = boxes.new_zeros((*shape, 4)).index_put_((row, column), boxes[candidates])
    remaining = scores.new_zeros(shape).index_put_((row, column), scores[candidates])
    result[candidates] = _select_from_rows(padded, remaining, options)[row, column]
    return result


def _select_from_rows(
    boxes: Float[Tensor, "rows n 4"], remaining: Float[Tensor, "rows n"], options: Options
) -> Float[Tensor, "rows n"]:
    """The loop of the paper's figure 2 for each row at once; a score of 0 marks a box that is no longer there."""
    rows, n = remaining.shape
    every_row = torch.arange(rows, device=boxes.device)
    column = torch.arange(n, device=boxes.device).expand(rows, n)
    margin = float(options.is_pixel_inclusive)
    # torch.threshold asks for more, the paper for no less.
    below_threshold = math.nextafter(options.score_threshold, 0.0)
    selected = torch.zeros_like(remaining)
    factors = None
    for step in range(min(n, options.max_out or n)):
        if step % _STEPS_BETWEEN_CHECKS == 0:
            is_left = remaining > 0
            width = int(is_left.sum(dim=1).max())
            if width == 0:
                break
            if factors is None:
                # Move what is left to the front, in the same order, so that the first of equal scores stays the first.
                front = is_left.byte().argsort(dim=1, descending=True, stable=True)[:, :width]
                remaining, column = remaining.gather(1, front), column.gather(1, front)
                boxes = boxes.gather(1, front[:, :, None].expand(-1, -1, 4))
                if rows * width * width <= _MATRIX_ELEMENTS:
                    factors = options.factors(overlaps(boxes[:, :, None], boxes[:, None], margin))
        score, m = remaining.max(dim=1, keepdim=True)
        selected.scatter_add_(1, column.gather(1, m), score)
        remaining.scatter_(1, m, 0)
        if factors is None:
            best = boxes[every_row, m[:, 0]]
            factor = options.factors(overlaps(best[:, None], boxes, margin))
        else:
            factor = factors[every_row, m[:, 0]]
        remaining = torch.nn.functional.threshold(remaining.mul_(factor), below_threshold, 0.0, inplace=True)
    return selected


def _is_integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
