"""Non-maximum suppression of boxes, soft and hard, and the evaluation of detectors."""

from postern.boxes.average_precision import IOU_THRESHOLDS, DetectionScores, coco_map, evaluate_detections
from postern.boxes.decay import gaussian_decay, hard_decay, linear_decay
from postern.boxes.overlap import box_area, box_iou, segment_iou
from postern.boxes.post_processor import SoftNMSPostProcessor
from postern.boxes.reference import soft_nms_reference
from postern.boxes.soft_nms import Method, batched_soft_nms, soft_nms, soft_nms_1d

__all__ = [
    "IOU_THRESHOLDS",
    "DetectionScores",
    "Method",
    "SoftNMSPostProcessor",
    "batched_soft_nms",
    "box_area",
    "box_iou",
    "coco_map",
    "evaluate_detections",
    "gaussian_decay",
    "hard_decay",
    "linear_decay",
    "segment_iou",
    "soft_nms",
    "soft_nms_1d",
    "soft_nms_reference",
]
