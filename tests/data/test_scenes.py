import numpy as np
import pytest
import torch

from postern.boxes import box_iou
from postern.data import Images, load
from postern.data.scenes import Scenes, _cut_out, digit_scenes

DIGITS = load("digits", "train")


def scenes(count=60, seed=0, **more):
    return digit_scenes(DIGITS, count, np.random.default_rng(seed), **more)


def largest_overlaps(made):
    """Each object's largest overlap with another one of its scene."""
    result = []
    for boxes in made.boxes:
        iou = box_iou(boxes, boxes)
        result += iou.fill_diagonal_(0).amax(1).tolist()
    return np.array(result)


def test_boxes_enclose_the_ink():
    made = scenes(noise=0.0, is_separated=True)
    for pixels, boxes in zip(made.pixels[:, 0], made.boxes, strict=True):
        inside = torch.zeros_like(pixels, dtype=torch.bool)
        for x1, y1, x2, y2 in boxes.int().tolist():
            inside[y1:y2, x1:x2] = True
            patch = pixels[y1:y2, x1:x2]
            assert 14 <= max(patch.shape) <= 26
            # no side of the box is empty
            assert min(patch[0].max(), patch[-1].max(), patch[:, 0].max(), patch[:, -1].max()) > 20
        assert pixels[~inside].max() == 0


def test_labels_are_those_of_the_digits():
    """One large, clean digit a scene: whichever digit it equals has its label."""
    made = scenes(count=5, num_objects=(1, 1), object_size=(24, 24), noise=0.0)
    patches = [_cut_out(digit, 24) for digit in DIGITS.pixels[:, 0].numpy()]
    for pixels, boxes, labels in zip(made.pixels[:, 0].numpy(), made.boxes, made.labels, strict=True):
        x1, y1, x2, y2 = boxes[0].int().tolist()
        equal = [i for i, patch in enumerate(patches) if np.array_equal(patch, pixels[y1:y2, x1:x2])]
        assert len(equal) == 1
        assert labels.tolist() == DIGITS.labels[equal].tolist()


def test_one_seed_gives_one_set():
    assert torch.equal(scenes(seed=3).pixels, scenes(seed=3).pixels)
    assert not torch.equal(scenes(seed=3).pixels, scenes(seed=4).pixels)


def test_crowding_brings_objects_together():
    shares = [(largest_overlaps(scenes(crowding=c)) > 0.1).mean() for c in (0.0, 0.4, 0.8)]
    assert shares[0] < shares[1] < shares[2]
    assert shares[2] > 0.6


def test_separated_objects_do_not_overlap():
    assert largest_overlaps(scenes(is_separated=True)).max() <= 0.05
    assert largest_overlaps(scenes(is_separated=True, crowding=0.8)).max() <= 0.05


def test_number_of_objects():
    counts = [len(boxes) for boxes in scenes(count=200).boxes]
    assert set(counts) == {2, 3, 4, 5, 6}


def test_noise():
    empty = scenes(count=5, num_objects=(1, 1), object_size=(1, 1), noise=0.1)
    # half of the noise is cut off at black
    assert (empty.pixels == 0).float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert empty.scaled()[empty.pixels > 0].mean().item() == pytest.approx(0.1 * np.sqrt(2 / np.pi), abs=0.01)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"count": 0}, "got 0"),
        ({"crowding": 1.2}, r"got 1\.2"),
        ({"num_objects": (3, 2)}, r"\(3, 2\)"),
        ({"object_size": (10, 80)}, "canvas of 64"),
        ({"noise": -0.1}, r"-0\.1"),
    ],
)
def test_bad_parameters(more, message):
    with pytest.raises(ValueError, match=message):
        scenes(**more)


def test_bad_digits():
    coloured = Images(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64), ("0",))
    with pytest.raises(ValueError, match="one channel, got 3"):
        digit_scenes(coloured, 1, np.random.default_rng(0))


def test_bad_scenes():
    pixels = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"\(2, 1, 1\)"):
        Scenes(pixels, (torch.zeros(1, 4),), (torch.zeros(1, dtype=torch.int64),))
    with pytest.raises(ValueError, match=r"\[1, 4\], got \[2, 4\]"):
        Scenes(pixels[:1], (torch.zeros(2, 4),), (torch.zeros(1, dtype=torch.int64),))
