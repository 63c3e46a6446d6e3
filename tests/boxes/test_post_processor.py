import math

import pytest
import torch

from postern.boxes import SoftNMSPostProcessor, coco_map, soft_nms_reference
from tests.boxes.scenes import crowded_boxes
from tests.modules import check_module


def candidates(n=40, classes=3):
    generator = torch.Generator().manual_seed(0)
    boxes = torch.from_numpy(crowded_boxes(n, 0)[0]).float()
    return boxes, torch.rand(n, classes, generator=generator)


def test_module():
    # The number of detections depends on the data, so that nothing can be computed on "meta".
    check_module(SoftNMSPostProcessor, *candidates(), meta=False)


def test_classes_are_suppressed_apart():
    boxes, scores = candidates()
    result = SoftNMSPostProcessor(max_detections=1000)(boxes, scores)
    for label in range(3):
        keep, expected = soft_nms_reference(boxes.tolist(), scores[:, label].tolist())
        of_label = result["labels"] == label
        torch.testing.assert_close(result["scores"][of_label], torch.tensor(expected))
        assert torch.equal(result["boxes"][of_label], boxes[keep])
    assert (result["scores"].diff() <= 0).all()
    capped = SoftNMSPostProcessor(max_detections=7)(boxes, scores)
    assert torch.equal(capped["scores"], result["scores"][:7])


def test_boxes_for_each_class():
    boxes, scores = candidates()
    same = SoftNMSPostProcessor()(boxes[:, None].expand(-1, 3, -1), scores)
    for name, value in SoftNMSPostProcessor()(boxes, scores).items():
        assert torch.equal(same[name], value)


def test_background_is_never_detected():
    boxes, scores = candidates()
    with_background = torch.cat([torch.ones(len(scores), 1), scores], dim=1)
    result = SoftNMSPostProcessor(has_background=True)(boxes, with_background)
    expected = SoftNMSPostProcessor()(boxes, scores)
    assert torch.equal(result["labels"], expected["labels"] + 1)
    assert torch.equal(result["scores"], expected["scores"])


def test_clipping_and_slivers():
    boxes = torch.tensor([[-5.0, -5.0, 20.0, 8.0], [9.5, 0.0, 30.0, 8.0], [0.0, 9.0, 4.0, 40.0]])
    scores = torch.tensor([[0.9], [0.8], [0.7]])
    result = SoftNMSPostProcessor(min_size=1.0)(boxes, scores, (12.0, 10.0))
    assert result["boxes"].tolist() == [[0.0, 0.0, 10.0, 8.0], [0.0, 9.0, 4.0, 12.0]]
    assert result["scores"].tolist() == pytest.approx([0.9, 0.7])


def test_a_neighbour_that_nms_loses_is_found():
    """Two objects with an overlap of 0.6: only one survives NMS, and recall is half."""
    boxes = torch.tensor([[0.0, 0.0, 16.0, 16.0], [0.0, 4.0, 16.0, 20.0]])
    scores = torch.tensor([[0.9], [0.8]])
    truth = [{"boxes": boxes, "labels": torch.zeros(2, dtype=torch.long)}]
    assert coco_map([SoftNMSPostProcessor("hard")(boxes, scores)], truth)["ar"] == 0.5
    soft = SoftNMSPostProcessor()(boxes, scores)
    assert coco_map([soft], truth)["ar"] == 1.0
    assert soft["scores"][1].item() == pytest.approx(0.8 * math.exp(-0.72), rel=1e-6)


@pytest.mark.parametrize(("boxes", "scores"), [((5, 4), (5,)), ((5, 4), (4, 2)), ((5, 3, 4), (5, 2)), ((5, 5), (5, 2))])
def test_bad_shapes(boxes, scores):
    with pytest.raises(ValueError, match="classes"):
        SoftNMSPostProcessor()(torch.zeros(boxes), torch.zeros(scores))


def test_bad_settings():
    with pytest.raises(ValueError, match="sigma"):
        SoftNMSPostProcessor(sigma=-1)
    with pytest.raises(ValueError, match=r"min_size.*-1"):
        SoftNMSPostProcessor(min_size=-1)
