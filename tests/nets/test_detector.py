import numpy as np
import pytest
import torch

from postern.boxes import coco_map, soft_nms
from postern.data import load
from postern.data.scenes import digit_scenes
from postern.nets import GridDetector
from postern.nets.detector import assign, cell_centres
from tests.modules import check_module

IMAGES = torch.rand(3, 1, 16, 24, generator=torch.Generator().manual_seed(0))
BOXES = [
    torch.tensor([[2.0, 2.0, 14.0, 14.0], [13.0, 4.0, 23.0, 12.0]]),
    torch.zeros(0, 4),
    torch.tensor([[0.0, 0.0, 8.0, 8.0]]),
]


def test_module():
    # in evaluation mode: batch statistics leave rounding errors where true gradients vanish
    def build():
        return GridDetector(widths=(4, 6, 8)).eval()

    check_module(build, IMAGES)
    check_module(build, IMAGES, BOXES, call=lambda detector, *inputs: detector.loss(*inputs), compile=False)


def test_cells_lie_in_the_order_of_the_outputs():
    centres = cell_centres(IMAGES)
    assert centres.shape == (4 * 6, 2)
    assert centres[:2].tolist() == [[2.0, 2.0], [6.0, 2.0]]
    assert centres[-1].tolist() == [22.0, 14.0]
    # A change of a pixel moves the outputs of the cells around it.
    detector = GridDetector(widths=(4, 4)).eval()
    changed = IMAGES.clone()
    changed[:, :, 9, 21] += 1
    moved = (detector(IMAGES)[0] - detector(changed)[0]).abs()[0] > 0
    assert moved.any()
    assert (centres[moved] - torch.tensor([21.5, 9.5])).abs().max() <= 8


def test_assignment():
    centres = cell_centres(IMAGES)
    has_object, wanted = assign(centres, BOXES)
    assert not has_object[1].any()
    found = {
        tuple(centre): reach
        for centre, reach in zip(centres[has_object[0]].tolist(), wanted[0][has_object[0]].tolist(), strict=True)
    }
    # Around (8, 8) within 0.3 x 12, and around (18, 8) within 0.3 of 10 x 8: distances left, up, right, down.
    assert found == {
        (6.0, 6.0): [4.0, 4.0, 8.0, 8.0],
        (10.0, 6.0): [8.0, 4.0, 4.0, 8.0],
        (6.0, 10.0): [4.0, 8.0, 8.0, 4.0],
        (10.0, 10.0): [8.0, 8.0, 4.0, 4.0],
        (18.0, 6.0): [5.0, 2.0, 5.0, 6.0],
        (18.0, 10.0): [5.0, 6.0, 5.0, 2.0],
    }
    assert (wanted[~has_object] == 0).all()


def test_the_nearest_cell_finds_an_object_of_any_size():
    tiny = torch.tensor([[3.9, 3.9, 4.1, 4.1]])
    has_object, _ = assign(cell_centres(IMAGES), [tiny])
    assert has_object.sum() == 1


def test_candidates_decode_what_is_learned():
    """Outputs that equal the targets give the objects back."""
    detector = GridDetector(widths=(4, 4))
    has_object, wanted = assign(cell_centres(IMAGES), BOXES)
    detector.forward = lambda images: (has_object * 20.0 - 10, wanted / 8)
    for found, boxes in zip(detector.candidates(IMAGES), BOXES, strict=True):
        assert {tuple(box) for box in found["boxes"].tolist()} == {tuple(box) for box in boxes.tolist()}
        assert (found["scores"] > 0.99).all()
    assert detector.loss(IMAGES, BOXES).item() < 1e-2


def test_it_learns():
    torch.manual_seed(0)
    scenes = digit_scenes(load("digits", "train"), 40, np.random.default_rng(0), canvas=32, num_objects=(1, 2))
    detector = GridDetector(widths=(8, 16, 16))
    optimizer = torch.optim.Adam(detector.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        detector.loss(scenes.scaled(), scenes.boxes).backward()
        optimizer.step()
    found = detector.eval().candidates(scenes.scaled())
    detections = []
    for each in found:
        keep, scores = soft_nms(each["boxes"], each["scores"])
        detections.append({"boxes": each["boxes"][keep], "scores": scores})
    assert coco_map(detections, [{"boxes": boxes} for boxes in scenes.boxes])["map_50"] > 0.8


def test_bad_input():
    with pytest.raises(ValueError, match=r"got \[8\] for 1 channels"):
        GridDetector(widths=(8,))
    with pytest.raises(ValueError, match=r"4 a, 4 b.*\[1, 1, 10, 12\]"):
        GridDetector()(torch.zeros(1, 1, 10, 12))
    with pytest.raises(ValueError, match="got 1 for 3 images"):
        GridDetector().loss(IMAGES, BOXES[:1])
