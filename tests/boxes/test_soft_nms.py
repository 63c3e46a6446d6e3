"""Soft-NMS against the plain loop in double precision, closed forms, limits and invariances."""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from postern.boxes import _kernel, batched_soft_nms, box_iou, gaussian_decay, soft_nms, soft_nms_1d, soft_nms_reference
from tests.boxes.scenes import crowded_boxes


@pytest.fixture(params=["compiled", "torch"])
def path(request, monkeypatch):
    """Both implementations in turn."""
    if request.param == "torch":
        monkeypatch.setattr(_kernel, "is_available", lambda: False)
    elif not _kernel.is_available():
        pytest.skip("the compiled kernels are missing")


METHODS = ("gaussian", "linear", "hard")
# Overlap 0.6: intersection 0.75, union 1.25.
PAIR = np.array([[0.0, 0.0, 1.0, 1.0], [0.0, 0.25, 1.0, 1.25]])


@pytest.mark.parametrize(
    ("method", "expected"),
    [("hard", [0.9]), ("linear", [0.9, 0.8 * 0.4]), ("gaussian", [0.9, 0.8 * math.exp(-0.36 / 0.5)])],
)
def test_two_boxes(path, method, expected):
    keep, scores = soft_nms(PAIR, np.array([0.9, 0.8]), method)
    assert keep.tolist() == [0, 1][: len(expected)]
    assert scores.tolist() == pytest.approx(expected, rel=1e-12)


def test_scores_come_out_decayed_and_nothing_changes_in_place():
    boxes, scores = PAIR.copy(), np.array([0.8, 0.9])
    keep, decayed = soft_nms(boxes, scores)
    assert keep.tolist() == [1, 0]
    assert decayed[1] < 0.5 < scores[0]
    assert (boxes == PAIR).all()
    assert scores.tolist() == [0.8, 0.9]


def test_order_follows_decayed_scores():
    """A box that stands alone overtakes one that is decayed."""
    boxes = np.concatenate([PAIR, [[5.0, 5.0, 6.0, 6.0]]])
    keep, _ = soft_nms(boxes, np.array([0.9, 0.8, 0.5]))
    assert keep.tolist() == [0, 2, 1]


@pytest.mark.parametrize("is_pixel_inclusive", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("n", [1, 2, 7, 60, 250, 600])
def test_equals_the_loop(path, n, method, is_pixel_inclusive):
    for seed in range(3):
        boxes, scores = crowded_boxes(n, seed)
        options = {"method": method, "sigma": 0.3, "iou_threshold": 0.4, "is_pixel_inclusive": is_pixel_inclusive}
        expected, expected_scores = soft_nms_reference(boxes.tolist(), scores.tolist(), **options)
        keep, kept_scores = soft_nms(boxes, scores, **options)
        assert keep.tolist() == expected
        np.testing.assert_allclose(kept_scores, expected_scores, rtol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_single_precision_selects_as_double_does(path, method):
    boxes, scores = (torch.from_numpy(values).float() for values in crowded_boxes(400, 5))
    expected, expected_scores = soft_nms_reference(boxes.tolist(), scores.tolist(), method)
    keep, kept_scores = soft_nms(boxes, scores, method)
    assert keep.tolist() == expected
    assert kept_scores.dtype == torch.float32
    assert kept_scores.tolist() == torch.tensor(expected_scores).tolist()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(1, 30),
    st.integers(0, 10**6),
    st.sampled_from(METHODS),
    st.sampled_from([0.0, 0.05, 0.5]),
    st.sampled_from([None, 1, 4, 100]),
)
def test_equals_the_loop_with_ties(path, n, seed, method, score_threshold, max_out):
    """Boxes on a coarse grid, many of them identical, and few distinct scores, 0 among them."""
    rng = np.random.default_rng(seed)
    corner = rng.integers(0, 4, (n, 2))
    boxes = np.concatenate([corner, corner + rng.integers(0, 4, (n, 2))], axis=1)
    scores = rng.integers(0, 5, n) / 4
    options = {"method": method, "score_threshold": score_threshold, "max_out": max_out}
    expected, expected_scores = soft_nms_reference(boxes.tolist(), scores.tolist(), **options)
    keep, kept_scores = soft_nms(boxes, scores, **options)
    assert keep.tolist() == expected
    np.testing.assert_allclose(kept_scores, expected_scores, rtol=1e-12)


def hard_nms(boxes, scores, iou_threshold):
    """Classic NMS, written independently: a box stays unless a better one that stays overlaps it too much."""
    order = scores.argsort(descending=True, stable=True).tolist()
    iou = box_iou(boxes, boxes)
    keep: list[int] = []
    for i in order:
        if all(iou[i, j] <= iou_threshold for j in keep):
            keep.append(i)
    return keep


def test_hard_is_classic_nms(path):
    for seed in range(100):
        boxes, scores = (torch.from_numpy(values) for values in crowded_boxes(20, seed))
        keep, kept_scores = soft_nms(boxes, scores, "hard", iou_threshold=0.5)
        assert keep.tolist() == hard_nms(boxes, scores, 0.5)
        torch.testing.assert_close(kept_scores, scores[keep])


def test_limits_of_sigma(path):
    boxes, scores = crowded_boxes(80, 1)
    narrow, _ = soft_nms(boxes, scores, sigma=1e-12)
    hard, _ = soft_nms(boxes, scores, "hard", iou_threshold=0.0)
    assert narrow.tolist() == hard.tolist()
    wide, wide_scores = soft_nms(boxes, scores, sigma=1e12)
    assert wide.tolist() == np.argsort(-scores).tolist()
    np.testing.assert_allclose(wide_scores, np.sort(scores)[::-1])


def test_scores_never_rise_and_never_fall_below_the_threshold():
    boxes, scores = crowded_boxes(200, 2)
    keep, kept_scores = soft_nms(boxes, scores, score_threshold=0.1)
    assert (np.diff(kept_scores) <= 0).all()
    assert (kept_scores <= scores[keep]).all()
    assert kept_scores.min() >= 0.1
    assert len(set(keep.tolist())) == len(keep)


def test_max_out_is_the_head_of_the_full_result(path):
    boxes, scores = crowded_boxes(200, 3)
    keep, kept_scores = soft_nms(boxes, scores)
    first, first_scores = soft_nms(boxes, scores, max_out=17)
    assert first.tolist() == keep[:17].tolist()
    assert first_scores.tolist() == kept_scores[:17].tolist()


def test_threshold_is_for_boxes_that_meet_nothing_too():
    boxes = np.array([[0.0, 0.0, 1.0, 1.0], [5.0, 5.0, 6.0, 6.0]])
    keep, _ = soft_nms(boxes, np.array([0.9, 0.0005]))
    assert keep.tolist() == [0]
    keep, _ = soft_nms(boxes, np.array([0.9, 0.0005]), score_threshold=0.0)
    assert keep.tolist() == [0, 1]


def test_linear_decay_at_threshold_0_is_not_the_gaussian():
    linear = soft_nms(PAIR, np.array([0.9, 0.8]), "linear", iou_threshold=0.0)[1]
    assert linear[1] == pytest.approx(0.8 * 0.4)
    assert abs(linear[1] - soft_nms(PAIR, np.array([0.9, 0.8]))[1][1]) > 0.05


def test_pixel_inclusive_coordinates_change_small_boxes():
    boxes = np.array([[0.0, 0.0, 2.0, 2.0], [2.0, 0.0, 4.0, 2.0]])
    assert soft_nms(boxes, np.array([0.9, 0.8]))[1][1] == pytest.approx(0.8)
    # 3 x 3 pixels each, 3 shared: overlap 3 / 15
    inclusive = soft_nms(boxes, np.array([0.9, 0.8]), is_pixel_inclusive=True)[1][1]
    assert inclusive == pytest.approx(0.8 * math.exp(-(0.2**2) / 0.5))


def test_own_decay():
    boxes, scores = crowded_boxes(60, 4)
    same, same_scores = soft_nms(boxes, scores, decay=lambda iou: gaussian_decay(iou, 0.5))
    keep, kept_scores = soft_nms(boxes, scores)
    assert same.tolist() == keep.tolist()
    np.testing.assert_allclose(same_scores, kept_scores, rtol=1e-12)
    expected, expected_scores = soft_nms_reference(boxes.tolist(), scores.tolist(), decay=lambda v: (1 - v) ** 2)
    keep, kept_scores = soft_nms(boxes, scores, decay=lambda iou: (1 - iou) ** 2)
    assert keep.tolist() == expected
    np.testing.assert_allclose(kept_scores, expected_scores, rtol=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(METHODS))
def test_invariances(seed, method):
    """The order, the place, the unit of length, and mirroring of the boxes change nothing."""
    rng = np.random.default_rng(seed)
    boxes, scores = crowded_boxes(40, seed)
    boxes = boxes.round(2) * 4  # so that the changes below are exact enough
    keep, kept_scores = soft_nms(boxes, scores, method)
    order = rng.permutation(40)
    shuffled, shuffled_scores = soft_nms(boxes[order], scores[order], method)
    assert order[shuffled].tolist() == keep.tolist()
    np.testing.assert_allclose(shuffled_scores, kept_scores, rtol=1e-9)
    for changed in (boxes + 1000, boxes * 3.5, -boxes[:, [2, 3, 0, 1]], boxes[:, [1, 0, 3, 2]]):
        again, again_scores = soft_nms(changed, scores, method)
        assert again.tolist() == keep.tolist()
        np.testing.assert_allclose(again_scores, kept_scores, rtol=1e-9)


def test_groups_leave_each_other_alone(path):
    boxes, scores = crowded_boxes(300, 6)
    idxs = np.random.default_rng(0).integers(-3, 4, 300) * 10**12
    keep, kept_scores = batched_soft_nms(boxes, scores, idxs)
    expected = {}
    for group in np.unique(idxs):
        members = np.flatnonzero(idxs == group)
        own, own_scores = soft_nms_reference(boxes[members].tolist(), scores[members].tolist())
        expected |= dict(zip(members[own].tolist(), own_scores, strict=True))
    assert dict(zip(keep.tolist(), kept_scores.tolist(), strict=True)) == pytest.approx(expected, rel=1e-12)
    assert (np.diff(kept_scores) <= 0).all()
    first, _ = batched_soft_nms(boxes, scores, idxs, max_out=20)
    assert first.tolist() == keep[:20].tolist()


def test_groups_far_apart_keep_half_precision_boxes_apart():
    """Moving classes apart by offsets, as is often done, rounds half-precision boxes to multiples of 32."""
    boxes = torch.tensor([[0.0, 0.0, 8.0, 8.0], [0.0, 2.0, 8.0, 10.0]], dtype=torch.float16)
    scores = torch.tensor([0.9, 0.8], dtype=torch.float16)
    keep, kept_scores = batched_soft_nms(boxes, scores, torch.tensor([500, 500]))
    assert keep.tolist() == [0, 1]
    assert kept_scores.dtype == torch.float16
    assert kept_scores[1].item() == pytest.approx(0.8 * math.exp(-0.72), rel=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_segments_equal_boxes_of_one_height(method):
    rng = np.random.default_rng(0)
    start = rng.uniform(0, 20, 100)
    segments = np.stack([start, start + rng.uniform(1, 5, 100)], axis=1)
    scores = rng.random(100)
    boxes = np.stack([segments[:, 0], np.full(100, 3.0), segments[:, 1], np.full(100, 8.0)], axis=1)
    keep, kept_scores = soft_nms_1d(segments, scores, method)
    expected, expected_scores = soft_nms_reference(boxes.tolist(), scores.tolist(), method)
    assert keep.tolist() == expected
    np.testing.assert_allclose(kept_scores, expected_scores, rtol=1e-12)


def test_inclusive_frames():
    # Frames 0..3 and 2..5 share 2 of 6.
    segments, scores = np.array([[0, 3], [2, 5]]), np.array([0.9, 0.8])
    assert soft_nms_1d(segments, scores, is_pixel_inclusive=True)[1][1] == pytest.approx(
        0.8 * math.exp(-((1 / 3) ** 2) / 0.5)
    )


def test_arrays_give_arrays_and_tensors_tensors():
    boxes, scores = crowded_boxes(10, 0)
    for function, more in ((soft_nms, ()), (batched_soft_nms, (np.zeros(10, int),))):
        keep, kept_scores = function(boxes, scores.astype(np.float32), *more)
        assert isinstance(keep, np.ndarray)
        assert keep.dtype == np.int64
        assert kept_scores.dtype == np.float32
        tensors = [torch.from_numpy(values) for values in (boxes, scores, *more)]
        keep, kept_scores = function(*tensors)
        assert isinstance(keep, torch.Tensor)
        assert kept_scores.dtype == torch.float64


def test_no_boxes():
    keep, scores = soft_nms(torch.zeros(0, 4), torch.zeros(0))
    assert keep.shape == scores.shape == (0,)
    assert keep.dtype == torch.int64
    assert soft_nms(PAIR, np.array([0.1, 0.2]), score_threshold=0.5)[0].tolist() == []


def test_inputs_that_require_gradients():
    boxes, scores = (torch.from_numpy(values).requires_grad_() for values in crowded_boxes(10, 0))
    _, kept_scores = soft_nms(boxes, scores)
    assert not kept_scores.requires_grad


@pytest.mark.parametrize(
    ("boxes", "scores", "more", "message"),
    [
        (torch.zeros(3, 5), torch.zeros(3), {}, r"\[3, 5\]"),
        (torch.zeros(3, 4), torch.zeros(2), {}, r"3 floating-point numbers.*\[2\]"),
        (torch.zeros(3, 4), torch.zeros(3, dtype=torch.long), {}, "int64"),
        (torch.tensor([[1.0, 0.0, 0.0, 1.0]]), torch.ones(1), {}, "x1 <= x2"),
        (torch.full((1, 4), math.nan), torch.ones(1), {}, "finite"),
        (torch.zeros(1, 4), torch.tensor([math.nan]), {}, "finite"),
        (torch.zeros(1, 4), torch.tensor([-0.5]), {}, "negative"),
        (torch.zeros(1, 4), torch.ones(1), {"method": "gauss"}, "'gauss'"),
        (torch.zeros(1, 4), torch.ones(1), {"iou_threshold": 1.5}, r"1\.5"),
        (torch.zeros(1, 4), torch.ones(1), {"sigma": 0.0}, "sigma.*0"),
        (torch.zeros(1, 4), torch.ones(1), {"score_threshold": -1.0}, "-1"),
        (torch.zeros(1, 4), torch.ones(1), {"max_out": 0}, "max_out.*0"),
        (torch.zeros(1, 4), torch.ones(1), {"decay": lambda iou: 1 + iou}, r"decay\(0\.01\) = 1\.01"),
        (torch.zeros(1, 4), torch.ones(1), {"decay": lambda iou: iou.sum()}, "same shape"),
    ],
)
def test_bad_input(boxes, scores, more, message):
    with pytest.raises(ValueError, match=message):
        soft_nms(boxes, scores, **more)


def test_bad_groups():
    for idxs, message in ((torch.zeros(2, dtype=torch.long), r"\[2\]"), (torch.zeros(1), "float32")):
        with pytest.raises(ValueError, match=message):
            batched_soft_nms(torch.zeros(1, 4), torch.ones(1), idxs)


def test_many_sizes_of_groups(path):
    boxes, scores = crowded_boxes(600, 7)
    idxs = np.repeat(np.arange(30), np.arange(30) * 2)[:600]
    idxs = np.random.default_rng(0).permutation(np.concatenate([idxs, np.full(600 - len(idxs), 99)]))
    keep, kept_scores = batched_soft_nms(boxes, scores, idxs, "linear")
    found = dict(zip(keep.tolist(), kept_scores.tolist(), strict=True))
    for group in np.unique(idxs):
        members = np.flatnonzero(idxs == group)
        own, own_scores = soft_nms_reference(boxes[members].tolist(), scores[members].tolist(), "linear")
        assert [found.pop(members[i]) for i in own] == pytest.approx(own_scores, rel=1e-12)
    assert not found


def test_compiles_whole():
    def detect(boxes, scores):
        keep, kept_scores = soft_nms(boxes * 2, scores)
        return boxes[keep], kept_scores + 1

    boxes, scores = (torch.from_numpy(values) for values in crowded_boxes(30, 0))
    torch.compiler.reset()
    compiled = torch.compile(detect, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(boxes, scores), detect(boxes, scores), strict=True):
        torch.testing.assert_close(found, expected)
