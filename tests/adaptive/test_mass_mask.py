import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from postern.adaptive import heatmap_mass_mask, topk_uniform_mask

EXAMPLE = [5.5, 7.9, 0.3, 8.6, 2.2, 3.1, 0.9]


def maps(*rows):
    """Outputs of two by two pixels whose largest magnitudes are these numbers."""
    peaks = torch.tensor(rows, dtype=torch.float64)
    output = peaks[:, :, None, None] * torch.tensor([[0.1, -1.0], [0.5, 0.0]])
    assert torch.equal(output.abs().amax((2, 3)), peaks)
    return output


def test_worked_example():
    assert heatmap_mass_mask(maps(EXAMPLE), 0.95)[0].tolist() == [True, True, False, True, False, True, False]


def loop(peaks, mass, min_keep):
    """The definition, one input."""
    total = sum(peaks)
    kept, cumulative = set(), 0.0
    for rank, channel in enumerate(sorted(range(len(peaks)), key=lambda c: -peaks[c])):
        cumulative += peaks[channel] / total
        if rank < min_keep or (peaks[channel] / total > 1e-5 if mass == 1 else cumulative <= mass + 1e-5):
            kept.add(channel)
    return [channel in kept for channel in range(len(peaks))]


peaks = st.lists(st.integers(1, 1000).map(lambda n: n / 7), min_size=1, max_size=8, unique=True)


@settings(max_examples=100, deadline=None)
@given(peaks, st.sampled_from([0.0, 0.123, 0.5, 0.77, 0.95, 1.0]), st.integers(0, 2))
def test_against_the_definition(values, mass, min_keep):
    assert heatmap_mass_mask(maps(values), mass, min_keep)[0].tolist() == loop(values, mass, min_keep)


def test_the_filter_that_crosses_is_dropped():
    assert heatmap_mass_mask(maps([6.0, 4.0]), 0.9)[0].tolist() == [True, False]
    assert heatmap_mass_mask(maps([6.0, 4.0]), 0.5, min_keep=0)[0].tolist() == [False, False]
    assert heatmap_mass_mask(maps([6.0, 4.0]), 0.5)[0].tolist() == [True, False]


def test_a_mass_of_one_drops_dead_filters_alone():
    assert heatmap_mass_mask(maps([5.0, 0.0, 1e-6, 1.0]), 1.0)[0].tolist() == [True, False, False, True]
    assert heatmap_mass_mask(maps([5.0, 0.0, 1e-6, 1.0]), -1.0)[0].all()


def test_each_input_has_its_own_mask():
    found = heatmap_mass_mask(maps([9.0, 1.0, 0.5], [0.5, 1.0, 9.0]), 0.9)
    assert found.tolist() == [[True, False, False], [False, False, True]]


def test_an_input_that_activates_nothing():
    assert heatmap_mass_mask(torch.zeros(1, 3, 2, 2), 1.0).sum() == 1
    assert topk_uniform_mask(torch.zeros(1, 3, 2, 2), 0.0, min_keep=0).sum() == 0


@settings(max_examples=60, deadline=None)
@given(peaks, st.floats(0, 1))
def test_uniform_drops_the_least_active(values, ratio):
    found = topk_uniform_mask(maps(values), ratio)[0].tolist()
    dropped = sorted(range(len(values)), key=lambda c: values[c])[: int(ratio * len(values))]
    expected = [channel not in dropped for channel in range(len(values))]
    if not any(expected):
        expected[values.index(max(values))] = True
    assert found == expected


def test_half_precision_is_widened():
    peaks = torch.tensor([[100.0] + [0.25] * 63])  # whose cumulative sum stands still in bfloat16
    output = peaks[:, :, None, None].bfloat16()
    assert torch.equal(heatmap_mass_mask(output, 0.95), heatmap_mass_mask(output.float(), 0.95))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: heatmap_mass_mask(torch.ones(1, 1, 1, 1), 1.5), "mass=1.5"),
        (lambda: heatmap_mass_mask(torch.ones(1, 1, 1, 1), 0.5, -1), "min_keep=-1"),
        (lambda: topk_uniform_mask(torch.ones(1, 1, 1, 1), 1.5), "got 1.5"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
