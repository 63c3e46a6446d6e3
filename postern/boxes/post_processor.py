"""The last step of a detector, with Soft-NMS (arXiv 1704.04503) in the place of NMS."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from postern.boxes._options import Options
from postern.boxes.soft_nms import Method, batched_soft_nms


class SoftNMSPostProcessor(nn.Module):
    """Turn a detector's scored boxes of one image into detections: clip, drop slivers, suppress, cap.

    The suppression is `batched_soft_nms` within each class. Scores come out decayed: a detector that swaps NMS for
    Soft-NMS but keeps looking up the original scores gains nothing.

    The result has the form that torchvision's detectors return. To use it in one of them, override the method
    ``postprocess_detections`` (of ``model.roi_heads`` in two-stage detectors): decode the boxes and turn logits into
    probabilities as there, then call this module, with ``has_background=True``, once for each image.

    It has no parameters, and gives no gradient: it is for inference.

    Args:
        method: see `soft_nms`.
        iou_threshold: see `soft_nms`.
        sigma: see `soft_nms`.
        score_threshold: see `soft_nms`.
        max_detections: how many detections to keep in an image, of all classes together.
        min_size: boxes with a side shorter than this, in the unit of the boxes, are dropped.
        has_background: whether column 0 of the scores is the background, which is never detected. Labels are the
            numbers of the columns either way.

    Raises:
        ValueError: a parameter out of range.
    """

    def __init__(
        self,
        method: Method = "gaussian",
        iou_threshold: float = 0.3,
        sigma: float = 0.5,
        score_threshold: float = 1e-3,
        max_detections: int = 100,
        min_size: float = 0.0,
        has_background: bool = False,
    ) -> None:
        super().__init__()
        Options(method, iou_threshold, sigma, score_threshold, max_detections)
        if min_size < 0:
            raise ValueError(f"min_size must not be negative, got {min_size}")
        self.method: Method = method
        self.iou_threshold = iou_threshold
        self.sigma = sigma
        self.score_threshold = score_threshold
        self.max_detections = max_detections
        self.min_size = min_size
        self.has_background = has_background

    @torch.no_grad()
    def forward(
        self,
        boxes: Float[Tensor, "n 4"] | Float[Tensor, "n classes 4"],
        scores: Float[Tensor, "n classes"],
        image_size: tuple[float, float] | None = None,
    ) -> dict[str, Tensor]:
        """Detect.

        Args:
            boxes: ``(x1, y1, x2, y2)``, one a candidate or one a candidate and class.
            scores: probabilities.
            image_size: (height, width) to clip boxes to, or None for no clipping.

        Returns:
            ``boxes`` [k, 4], ``scores`` [k] and ``labels`` [k], by falling score.

        Raises:
            ValueError: shapes that do not agree, or see `soft_nms`.
        """
        if scores.dim() != 2 or boxes.shape not in ((len(scores), 4), (*scores.shape, 4)):
            raise ValueError(
                "scores are [n, classes], and boxes [n, 4] or [n, classes, 4]; "
                f"got {list(scores.shape)} and {list(boxes.shape)}"
            )
        classes = torch.arange(scores.shape[1], device=scores.device).expand(scores.shape)
        boxes = (boxes if boxes.dim() == 3 else boxes[:, None]).expand(*scores.shape, 4)
        if self.has_background:
            boxes, scores, classes = boxes[:, 1:], scores[:, 1:], classes[:, 1:]
        boxes, scores, classes = boxes.reshape(-1, 4), scores.reshape(-1), classes.reshape(-1)
        if image_size is not None:
            height, width = image_size
            boxes = torch.stack([boxes[:, 0::2].clamp(0, width), boxes[:, 1::2].clamp(0, height)], dim=-1).flatten(1)
        is_sliver = (boxes[:, 2:] - boxes[:, :2] < self.min_size).any(-1)
        keep, kept_scores = batched_soft_nms(
            boxes,
            scores.masked_fill(is_sliver, 0),  # a box of score 0 is never selected
            classes,
            self.method,
            self.iou_threshold,
            self.sigma,
            self.score_threshold,
            self.max_detections,
        )
        return {"boxes": boxes[keep], "scores": kept_scores, "labels": classes[keep]}

    def extra_repr(self) -> str:
        """Return the settings that decide about scores."""
        setting = f"sigma={self.sigma}" if self.method == "gaussian" else f"iou_threshold={self.iou_threshold}"
        return f"{self.method}, {setting}, score_threshold={self.score_threshold}, max_detections={self.max_detections}"
