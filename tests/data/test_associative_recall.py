import pytest
import torch

from postern.data import multi_query_recall, paired_recall


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("has_random_filler", [False, True])
def test_every_key_is_asked_once_and_answered_by_its_value(has_random_filler):
    drawn = multi_query_recall(300, 32, 5, num_tokens=40, has_random_filler=has_random_filler, generator=seeded())
    keys, values = drawn.inputs[:, 0:10:2], drawn.inputs[:, 1:10:2]
    assert ((keys >= 1) & (keys < 20)).all()
    assert ((values >= 20) & (values < 40)).all()
    for row in range(300):
        assert len(set(keys[row].tolist())) == len(set(values[row].tolist())) == 5
        places = (drawn.target[row] >= 0).nonzero().flatten()
        assert len(places) == 5
        assert (places >= 10).all()
        assert (places % 2 == 0).all()
        answers = dict(zip(keys[row].tolist(), values[row].tolist(), strict=True))
        assert sorted(drawn.inputs[row, places].tolist()) == sorted(answers)
        assert [answers[key] for key in drawn.inputs[row, places].tolist()] == drawn.target[row, places].tolist()
    filler = drawn.inputs[:, 10:][drawn.target[:, 10:] < 0]
    assert bool((filler == 0).all()) is not has_random_filler
    assert set(drawn.target[drawn.target < 0].tolist()) == {-100}


def test_gaps_follow_the_power_law():
    drawn = multi_query_recall(20_000, 24, 1, num_tokens=8, power=0.01, generator=seeded())
    gaps = (drawn.target >= 0).nonzero()[:, 1].sub(2).div(2, rounding_mode="floor")
    found = torch.bincount(gaps, minlength=11) / 20_000
    expected = torch.arange(1, 12) ** -0.99
    assert (found - expected / expected.sum()).abs().max() < 0.01
    assert torch.bincount((multi_query_recall(2000, 40, 1, generator=seeded()).inputs[:, 0] - 1) // 1024).min() > 400


def test_pairs_are_asked_in_another_order():
    drawn = paired_recall(500, 6, num_keys=9, num_values=4, generator=seeded())
    keys, asked = drawn.keys[:, :6], drawn.keys[:, 6:]
    assert torch.equal(keys.sort(1).values, asked.sort(1).values)
    assert all(len(set(row)) == 6 for row in keys.tolist())
    assert (asked == keys).float().mean() == pytest.approx(1 / 6, abs=0.03)
    assert (drawn.values[:, 6:] == 0).all()
    assert set(drawn.values[:, :6].flatten().tolist()) == {1, 2, 3, 4}
    assert (drawn.target[:, :6] == -100).all()
    found = drawn.values[:, :6].gather(1, (asked[:, :, None] == keys[:, None]).int().argmax(-1)) - 1
    assert torch.equal(found, drawn.target[:, 6:])


def test_seeds():
    for draw in (
        lambda seed: multi_query_recall(4, 16, 2, generator=seeded(seed)).inputs,
        lambda seed: paired_recall(4, generator=seeded(seed)).keys,
    ):
        assert torch.equal(draw(1), draw(1))
        assert not torch.equal(draw(1), draw(2))


def test_bad_input():
    with pytest.raises(ValueError, match="four tokens a pair, got count=1, length=15, num_pairs=4"):
        multi_query_recall(1, 15, 4)
    with pytest.raises(ValueError, match="8 tokens give 3 keys, got num_pairs=4"):
        multi_query_recall(1, 16, 4, num_tokens=8)
    with pytest.raises(ValueError, match="power must be positive, got 0"):
        multi_query_recall(1, 16, 4, power=0)
    with pytest.raises(ValueError, match="num_pairs=16, num_keys=8"):
        paired_recall(1, num_keys=8)
