"""Copied segments: every one stands in the first half, at places that are uniform."""

import pytest
import torch

from postern.data import segment_copies


def test_segments_of_the_second_half_stand_in_the_first():
    tokens = segment_copies(200, 32, num_tokens=1000, segment=4, generator=torch.Generator().manual_seed(0))
    assert tokens.shape == (200, 32)
    first, second = tokens.chunk(2, dim=1)
    windows = first.unfold(1, 4, 1)
    segments = second.unflatten(1, (4, 4))
    found = (segments[:, :, None] == windows[:, None]).all(-1)
    assert found.any(-1).all()
    places = found.int().argmax(-1)
    assert places.unique().tolist() == list(range(13))
    assert (places.flatten().bincount() / 800).sub(1 / 13).abs().max() < 0.05


def test_draws_depend_on_the_generator_alone():
    draws = [segment_copies(3, 16, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert draws[0].max() < 24


@pytest.mark.parametrize(("length", "segment"), [(15, 1), (12, 4), (16, 0)])
def test_rejects_halves_that_do_not_divide(length, segment):
    with pytest.raises(ValueError, match=f"length={length}, num_tokens=24, segment={segment}"):
        segment_copies(1, length, segment=segment)
