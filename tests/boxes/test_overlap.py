import pytest
import torch

from postern.boxes import box_area, box_iou, segment_iou


def test_closed_forms():
    boxes = torch.tensor([[0.0, 0.0, 2.0, 4.0], [1.0, 1.0, 3.0, 3.0], [5.0, 5.0, 6.0, 6.0]])
    torch.testing.assert_close(box_area(boxes), torch.tensor([8.0, 4.0, 1.0]))
    # intersection 1 x 2, union 8 + 4 - 2
    expected = torch.tensor([[1.0, 0.2, 0.0], [0.2, 1.0, 0.0], [0.0, 0.0, 1.0]])
    torch.testing.assert_close(box_iou(boxes, boxes), expected)


def test_pixel_inclusive_boxes_are_larger():
    boxes = torch.tensor([[0, 0, 1, 1], [1, 1, 2, 2]])
    assert box_area(boxes).tolist() == [1.0, 1.0]
    assert box_area(boxes, is_pixel_inclusive=True).tolist() == [4.0, 4.0]
    # They share one corner point, or one pixel of seven.
    assert box_iou(boxes[:1], boxes[1:]).item() == 0.0
    assert box_iou(boxes[:1], boxes[1:], is_pixel_inclusive=True).item() == pytest.approx(1 / 7)


def test_overlap_by_counting_points():
    """Monte-Carlo areas, in a batch."""
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(2, 3, 2, 2, generator=generator).sort(dim=-2).values
    boxes = corners.flatten(-2)
    points = torch.rand(200_000, 2, generator=generator)
    inside = ((points >= boxes[..., None, :2]) & (points <= boxes[..., None, 2:])).all(-1)
    intersection = (inside[:, :, None] & inside[:, None]).sum(-1)
    union = (inside[:, :, None] | inside[:, None]).sum(-1)
    assert (box_iou(boxes, boxes) - intersection / union).abs().max() < 0.02


def test_boxes_without_area():
    point = torch.tensor([[1.0, 1.0, 1.0, 1.0]])
    assert box_iou(point, point).item() == 0.0


def test_segments():
    segments = torch.tensor([[0.0, 4.0], [2.0, 6.0]])
    torch.testing.assert_close(segment_iou(segments, segments), torch.tensor([[1.0, 1 / 3], [1 / 3, 1.0]]))
    inclusive = segment_iou(torch.tensor([[0, 3]]), torch.tensor([[2, 5]]), is_pixel_inclusive=True)
    assert inclusive.item() == pytest.approx(2 / 6)


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        (torch.zeros(3, 5), r"\(3, 5\)"),
        (torch.tensor(1.0), r"\(\)"),
        (torch.tensor([[0.0, 0.0, float("nan"), 1.0]]), "finite"),
        (torch.tensor([[2.0, 0.0, 1.0, 1.0]]), r"got \[2.0, 0.0, 1.0, 1.0\]"),
    ],
)
def test_bad_boxes(boxes, message):
    with pytest.raises(ValueError, match=message):
        box_iou(boxes, torch.zeros(1, 4))
    with pytest.raises(ValueError, match=message):
        box_area(boxes)


def test_bad_segments():
    with pytest.raises(ValueError, match=r"start, end.*\(2, 3\)"):
        segment_iou(torch.zeros(2, 3), torch.zeros(2, 2))
