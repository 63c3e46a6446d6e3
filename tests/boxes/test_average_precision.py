"""COCO's mean average precision, against cases computed by hand and against pycocotools."""

import contextlib
import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from postern.boxes import average_precision, coco_map, evaluate_detections

SQUARE = [0.0, 0.0, 10.0, 10.0]
FAR = [50.0, 50.0, 60.0, 60.0]


def image(boxes, scores=None, labels=None, **more):
    result = {"boxes": np.array(boxes, dtype=float).reshape(-1, 4)} | more
    if scores is not None:
        result["scores"] = np.array(scores, dtype=float)
    if labels is not None:
        result["labels"] = np.array(labels)
    return result


def shifted(dx):
    """SQUARE moved aside; overlap (10 - dx) / (10 + dx)."""
    return [dx, 0.0, 10.0 + dx, 10.0]


def test_perfect_detections():
    truth = [image([SQUARE, FAR])]
    found = [image([SQUARE, FAR], [0.9, 0.8])]
    assert coco_map(found, truth) == {"map": 1.0, "map_50": 1.0, "map_75": 1.0, "ar": 1.0}


def test_one_object_of_two():
    # Recall 1/2 at precision 1: of the recalls 0.00 .. 1.00 the first 51 are reached.
    result = coco_map([image([SQUARE], [0.9])], [image([SQUARE, FAR])])
    assert result["map"] == pytest.approx(51 / 101)
    assert result["ar"] == 0.5


def test_duplicate_is_an_error():
    # right, duplicate, right: precision 1 up to recall 1/2, then 2/3.
    result = coco_map([image([SQUARE, SQUARE, FAR], [0.9, 0.8, 0.7])], [image([SQUARE, FAR])])
    assert result["map"] == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert result["ar"] == 1.0


def test_precision_is_interpolated():
    # wrong, right: precision 1/2 at recall 1, and so at all recalls below.
    result = coco_map([image([FAR, SQUARE], [0.9, 0.8])], [image([SQUARE])])
    assert result["map"] == pytest.approx(0.5)


def test_overlap_decides_by_threshold():
    # overlap 8/12 = 0.667: right at 0.50 .. 0.65, four thresholds of ten.
    result = coco_map([image([shifted(2.0)], [0.9])], [image([SQUARE])])
    assert result == pytest.approx({"map": 0.4, "map_50": 1.0, "map_75": 0.0, "ar": 0.4})


def test_threshold_itself_is_enough():
    assert coco_map([image([[0, 0, 10, 5]], [0.9])], [image([SQUARE])])["map_50"] == 1.0


def test_better_detection_chooses_first():
    # Both overlap both objects. The first takes the object at 0 (its best); the second is left the one at 4, overlap
    # 8/12. Were the first to take what the second needs, one would be wrong at 0.6.
    truth = [image([SQUARE, shifted(4.0)])]
    found = [image([shifted(1.0), shifted(2.0)], [0.9, 0.8])]
    assert evaluate_detections(found, truth, [0.6]).mean_average_precision == 1.0


def test_classes_are_averaged_and_kept_apart():
    truth = [image([SQUARE, FAR], labels=[3, 7])]
    found = [image([SQUARE, FAR], [0.9, 0.8], labels=[3, 3])]
    scores = evaluate_detections(found, truth)
    assert scores.labels == (3, 7)
    assert scores.mean_average_precision == 0.5


def test_images_are_kept_apart():
    truth = [image([SQUARE]), image([FAR])]
    assert coco_map([image([FAR], [0.9]), image([SQUARE], [0.8])], truth)["map"] == 0.0


def test_scores_rank_over_all_images():
    # right at 0.9, wrong at 0.8 in another image: the wrong one comes after full recall.
    truth = [image([SQUARE]), image([])]
    assert coco_map([image([SQUARE], [0.9]), image([FAR], [0.8])], truth)["map"] == 1.0
    assert coco_map([image([SQUARE], [0.7]), image([FAR], [0.8])], truth)["map"] == pytest.approx(0.5)


def test_no_more_than_max_detections_count():
    found = [image([FAR, SQUARE], [0.9, 0.8])]
    assert coco_map(found, [image([SQUARE])], max_detections=1)["map"] == 0.0
    assert coco_map(found, [image([SQUARE])], max_detections=2)["map"] == pytest.approx(0.5)


def test_crowd_counts_neither_way():
    truth = [image([SQUARE, [100, 100, 200, 200]], iscrowd=np.array([0, 1]))]
    inside_crowd = [[110, 110, 120, 120], [130, 130, 140, 140]]
    found = [image([*inside_crowd, SQUARE], [0.9, 0.8, 0.7])]
    assert coco_map(found, truth)["map"] == 1.0


def test_sizes():
    small, large = SQUARE, [0.0, 0.0, 100.0, 100.0]
    truth = [image([small]), image([large])]
    result = coco_map([image([small], [0.9]), image([], [])], truth, by_size=True)
    assert result["map_small"] == 1.0
    assert np.isnan(result["map_medium"])
    assert result["map_large"] == 0.0
    assert result["ar_large"] == 0.0


def test_without_objects_there_is_no_average():
    assert np.isnan(coco_map([image([SQUARE], [0.9])], [image([])])["map"])
    assert np.isnan(coco_map([], [])["map"])


def test_without_detections_it_is_zero():
    assert coco_map([image([], [])], [image([SQUARE])]) == {"map": 0.0, "map_50": 0.0, "map_75": 0.0, "ar": 0.0}


def test_tensors_are_accepted():
    truth = [{"boxes": torch.tensor([SQUARE])}]
    assert coco_map([{"boxes": torch.tensor([SQUARE]), "scores": torch.tensor([0.9])}], truth)["map"] == 1.0


@pytest.mark.parametrize(
    ("found", "truth", "more", "message"),
    [
        ([], [image([SQUARE])], {}, "got 0 and 1"),
        ([image([SQUARE])], [image([SQUARE])], {}, "no scores"),
        ([image([SQUARE], [0.9, 0.8])], [image([SQUARE])], {}, r"1 boxes and scores of shape \(2,\)"),
        ([image([SQUARE], [np.nan])], [image([SQUARE])], {}, "NaN"),
        ([image([SQUARE], [0.9])], [image([SQUARE])], {"iou_thresholds": []}, "at least one"),
        ([image([SQUARE], [0.9])], [image([SQUARE])], {"iou_thresholds": [1.5]}, "1.5"),
        ([image([SQUARE], [0.9])], [image([SQUARE])], {"max_detections": 0}, "got 0"),
    ],
)
def test_bad_input(found, truth, more, message):
    with pytest.raises(ValueError, match=message):
        coco_map(found, truth, **more)


def test_threshold_that_was_not_evaluated():
    scores = evaluate_detections([image([SQUARE], [0.9])], [image([SQUARE])], [0.5])
    with pytest.raises(ValueError, match=r"0\.6"):
        scores.average_precision(0.6)


def pycocotools_numbers(found, truth, max_detections=100):
    coco = pytest.importorskip("pycocotools.coco")
    cocoeval = pytest.importorskip("pycocotools.cocoeval")

    def xywh(box):
        return [box[0], box[1], box[2] - box[0], box[3] - box[1]]

    annotations = [
        {
            "image_id": number,
            "category_id": int(label),
            "bbox": xywh(box),
            "area": (box[2] - box[0]) * (box[3] - box[1]),
            "iscrowd": int(crowd),
        }
        for number, each in enumerate(truth)
        for box, label, crowd in zip(each["boxes"], each["labels"], each["iscrowd"], strict=True)
    ]
    results = [
        {"image_id": number, "category_id": int(label), "bbox": xywh(box), "score": float(score)}
        for number, each in enumerate(found)
        for box, label, score in zip(each["boxes"], each["labels"], each["scores"], strict=True)
    ]
    labels = sorted({entry["category_id"] for entry in annotations + results})
    with contextlib.redirect_stdout(io.StringIO()):
        reference = coco.COCO()
        reference.dataset = {
            "info": {},
            "images": [{"id": number} for number in range(len(truth))],
            "categories": [{"id": label} for label in labels],
            "annotations": [entry | {"id": number + 1} for number, entry in enumerate(annotations)],
        }
        reference.createIndex()
        evaluation = cocoeval.COCOeval(reference, reference.loadRes(results), "bbox")
        evaluation.params.maxDets = [1, 2, max_detections]
        evaluation.evaluate()
        evaluation.accumulate()
    precision, recall = evaluation.eval["precision"], evaluation.eval["recall"]

    def mean(values):
        return values[values > -1].mean() if (values > -1).any() else np.nan

    numbers = {
        "map": mean(precision[..., 0, -1]),
        "map_50": mean(precision[0, ..., 0, -1]),
        "map_75": mean(precision[5, ..., 0, -1]),
        "ar": mean(recall[..., 0, -1]),
    }
    for index, size in enumerate(("small", "medium", "large"), start=1):
        numbers |= {f"map_{size}": mean(precision[..., index, -1]), f"ar_{size}": mean(recall[..., index, -1])}
    return numbers


def random_case(seed, images=12, most_objects=6, most_detections=12, size=140):
    """Boxes on a coarse grid with few distinct scores, so that overlaps and scores often tie."""
    rng = np.random.default_rng(seed)

    def boxes(n):
        corner = rng.integers(0, 8, (n, 2)) * size / 14
        return np.concatenate([corner, corner + rng.integers(1, 8, (n, 2)) * size / 14], axis=1)

    truth, found = [], []
    for _ in range(images):
        n, m = rng.integers(0, most_objects), rng.integers(0, most_detections)
        own = boxes(n)
        near = own[rng.integers(0, n, m // 2)] + rng.integers(0, 2, (m // 2, 4)) * size / 70 if n else boxes(0)
        candidates = np.concatenate([near, boxes(m)])
        truth.append(image(own, labels=rng.integers(1, 4, n), iscrowd=(rng.random(n) < 0.15).astype(int)))
        scores = rng.integers(1, 12, len(candidates)) / 12
        found.append(image(candidates, scores, labels=rng.integers(1, 4, len(candidates))))
    return found, truth


@pytest.mark.parametrize("max_detections", [3, 100])
@pytest.mark.parametrize("seed", range(8))
def test_equals_pycocotools(seed, max_detections):
    found, truth = random_case(seed)
    expected = pycocotools_numbers(found, truth, max_detections)
    result = coco_map(found, truth, max_detections=max_detections, by_size=True)
    assert result.keys() == expected.keys()
    for name, number in expected.items():
        assert result[name] == pytest.approx(number, abs=1e-12, nan_ok=True), name


def test_portions_do_not_matter(monkeypatch):
    found, truth = random_case(3)
    expected = coco_map(found, truth, by_size=True)
    monkeypatch.setattr(average_precision, "_OBJECTS_AT_ONCE", 7)
    assert coco_map(found, truth, by_size=True) == pytest.approx(expected, nan_ok=True)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_invariances(seed):
    """Neither the order of images, nor the unit of length, nor a rising function of the scores changes anything."""
    rng = np.random.default_rng(seed)
    found, truth = random_case(seed, images=4)
    for each in found:  # without ties, whose order decides
        each["scores"] = rng.permutation(len(each["scores"])) / 100 + rng.random() / 1000
    expected = coco_map(found, truth)
    order = rng.permutation(4)
    changed = [found[i] | {"boxes": found[i]["boxes"] * 4, "scores": found[i]["scores"] ** 3} for i in order]
    result = coco_map(changed, [truth[i] | {"boxes": truth[i]["boxes"] * 4} for i in order])
    assert result == pytest.approx(expected, abs=1e-12, nan_ok=True)
