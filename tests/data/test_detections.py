import numpy as np
import pytest
import torch

from postern.boxes import box_iou
from postern.data.detections import simulated_detections


@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.6])
def test_objects_overlap_in_pairs_by_what_was_asked(overlap):
    for image in simulated_detections(5, (overlap, overlap), np.random.default_rng(0)):
        objects = torch.from_numpy(image.objects)
        iou = box_iou(objects, objects)
        expected = torch.eye(8, dtype=torch.float64)
        for i in range(4):
            expected[i, i + 4] = expected[i + 4, i] = overlap
        torch.testing.assert_close(iou, expected)


def test_overlaps_are_drawn_from_the_range():
    iou = []
    for image in simulated_detections(100, (0.2, 0.6), np.random.default_rng(0)):
        objects = torch.from_numpy(image.objects)
        iou += box_iou(objects[:4], objects[4:]).diagonal().tolist()
    assert 0.2 <= min(iou) < 0.21
    assert 0.59 < max(iou) <= 0.6
    assert np.mean(iou) == pytest.approx(0.4, abs=0.02)


def test_scores_follow_overlaps():
    images = simulated_detections(40, (0.3, 0.3), np.random.default_rng(0), score_noise=0.0, false_boxes=0)
    for image in images:
        assert image.boxes.shape == (160, 4)
        assert (image.boxes[:, :2] <= image.boxes[:, 2:]).all()
        own = image.objects[np.repeat(np.arange(8), 20)]
        iou = box_iou(torch.from_numpy(image.boxes), torch.from_numpy(own)).diagonal().numpy()
        quality = (image.scores / iou).reshape(8, 20)
        np.testing.assert_allclose(quality, quality[:, :1].repeat(20, axis=1))
        assert quality.min() >= 0.5
        assert quality.max() <= 1


def test_false_boxes_score_low():
    images = simulated_detections(200, (0.0, 0.0), np.random.default_rng(0), boxes_per_object=1)
    scores = np.concatenate([image.scores[8:] for image in images])
    assert len(scores) == 200 * 15
    assert scores.mean() == pytest.approx(1 / 7, abs=0.01)


def test_one_seed_gives_one_set():
    first, again = (simulated_detections(3, (0.0, 0.3), np.random.default_rng(5)) for _ in range(2))
    assert all((a.boxes == b.boxes).all() and (a.scores == b.scores).all() for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"count": 0}, "got 0, 20 and 15"),
        ({"overlap": (0.0, 1.0)}, r"1\.0\)"),
        ({"overlap": (0.5, 0.2)}, r"\(0\.5, 0\.2\)"),
        ({"score_noise": -1.0}, "got -1"),
        ({"false_boxes": -1}, "20 and -1"),
    ],
)
def test_bad_parameters(more, message):
    with pytest.raises(ValueError, match=message):
        simulated_detections(**({"count": 1, "overlap": (0.0, 0.0), "rng": np.random.default_rng(0)} | more))
