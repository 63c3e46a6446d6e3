import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from postern.adaptive import expected_calibration_error


def drawn(samples=300, seed=0):
    rng = np.random.default_rng(seed)
    confidence = rng.uniform(0.3, 1, samples)
    return torch.from_numpy(confidence), torch.from_numpy(rng.uniform(size=samples) < confidence**2)


def test_bins_of_equal_mass_against_sorted_chunks():
    confidence, correct = drawn()
    order = confidence.argsort()
    chunks = zip(confidence[order].chunk(15), correct[order].chunk(15), strict=True)
    expected = sum(abs(right.double().mean() - p.mean()) * len(p) for p, right in chunks) / 300
    assert expected_calibration_error(confidence, correct) == pytest.approx(float(expected))


def test_bins_of_equal_width_against_histograms():
    confidence, correct = drawn()
    edges = np.linspace(0, 1, 16)
    sums = [
        np.histogram(confidence, edges, weights=weights)[0]
        for weights in (confidence.numpy(), correct.double().numpy())
    ]
    expected = np.abs(sums[0] - sums[1]).sum() / 300
    assert expected_calibration_error(confidence, correct, binning="uniform") == pytest.approx(expected)


@pytest.mark.parametrize("binning", ["quantile", "uniform"])
def test_known_gap(binning):
    confidence, correct = torch.full((10,), 0.9), torch.tensor([True] * 7 + [False] * 3)
    assert expected_calibration_error(confidence, correct, binning=binning) == pytest.approx(0.2)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0.2, 0.5, 0.5, 0.9, 1.0]), st.booleans()), min_size=1, max_size=40))
def test_ties_and_order_do_not_matter(samples):
    confidence, correct = (torch.tensor(each) for each in zip(*samples, strict=True))
    found = expected_calibration_error(confidence, correct, num_bins=4)
    assert expected_calibration_error(confidence.flip(0), correct.flip(0), num_bins=4) == pytest.approx(found)
    assert 0 <= found <= 1


def test_one_bin_is_the_mean_gap():
    confidence, correct = drawn(seed=3)
    gap = abs(confidence.mean() - correct.double().mean())
    assert expected_calibration_error(confidence, correct, num_bins=1) == pytest.approx(float(gap))


@pytest.mark.parametrize(
    ("confidence", "options", "message"),
    [
        ([0.5, 0.5], {}, r"\[2\] and \[1\]"),
        ([1.5], {}, "1.5"),
        ([float("nan")], {}, "nan"),
        ([0.5], {"num_bins": 0}, "num_bins=0"),
        ([0.5], {"binning": "mass"}, "'mass'"),
    ],
)
def test_bad_input(confidence, options, message):
    with pytest.raises(ValueError, match=message):
        expected_calibration_error(torch.tensor(confidence), torch.tensor([True]), **options)
