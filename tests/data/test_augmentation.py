"""Images that are moved and mirrored, each for itself."""

import pytest
import torch
from torch.nn import functional as F

from postern.data import shift_and_mirror


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("margin", [0, 1, 2])
def test_each_image_has_its_own_place_and_side(margin):
    images = torch.rand(3000, 2, 5, 7, generator=generator(1)) + 1
    places = 2 * margin + 1
    padded = F.pad(images, [margin] * 4)
    crops = [padded[..., down : down + 5, across : across + 7] for down in range(places) for across in range(places)]
    possible = torch.stack([*crops, *(crop.flip(-1) for crop in crops)], dim=1)
    found = shift_and_mirror(images, margin, generator())
    is_it = (possible == found[:, None]).flatten(2).all(2)
    assert (is_it.sum(1) == 1).all()
    torch.testing.assert_close(
        is_it.double().mean(0), torch.full([2 * places**2], 0.5 / places**2, dtype=torch.float64), atol=0.03, rtol=0
    )


def test_draws_depend_on_the_generator_alone():
    images = torch.arange(4 * 36).view(4, 1, 6, 6)
    draws = [shift_and_mirror(images, 2, generator(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    torch.manual_seed(1)
    first = shift_and_mirror(images, 2)
    torch.manual_seed(1)
    assert torch.equal(first, shift_and_mirror(images, 2))


def test_a_single_image_is_a_batch_of_one():
    assert shift_and_mirror(torch.ones(1, 1, 3, 3), 0, generator()).equal(torch.ones(1, 1, 3, 3))
    with pytest.raises(ValueError, match=r"shape=\[1, 3, 3\]"):
        shift_and_mirror(torch.ones(1, 3, 3), 1)
    with pytest.raises(ValueError, match="margin=-1"):
        shift_and_mirror(torch.ones(1, 1, 3, 3), -1)
