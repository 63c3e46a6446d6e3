from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from postern.data import Images, Table, Text, load, split_rows
from postern.data.splitting import apportion


def numbered(labels: list[int], is_regression: bool = False) -> Table:
    """A table whose only column is the number of the row."""
    target = np.array(labels, dtype=np.float64 if is_regression else np.int64)
    names = () if is_regression else tuple("abcdef")
    return Table(np.arange(len(labels), dtype=np.float64)[:, None], target, ("row",), names, "mine")


@given(st.lists(st.integers(0, 2), max_size=40), st.integers(0, 5))
def test_the_parts_are_the_whole_and_each_has_every_class(extra: list[int], seed: int) -> None:
    labels = [0, 1, 2] * 3 + extra
    parts = split_rows(numbered(labels), seed=seed)
    rows = [part.features[:, 0].astype(int).tolist() for part in parts]
    assert sorted(row for part in rows for row in part) == list(range(len(labels)))
    for part, numbers in zip(parts, rows, strict=True):
        assert part.target.tolist() == [labels[number] for number in numbers]
        assert set(part.target) == {0, 1, 2}
    for index, count in Counter(labels).items():
        sizes = [(part.target == index).sum() for part in parts]
        assert all(abs(size - share * count) <= 1 for size, share in zip(sizes, (0.6, 0.2, 0.2), strict=True))


def test_images_are_split_with_their_labels() -> None:
    digits = load("digits", "all")
    parts = split_rows(digits, (0.5, 0.25, 0.25), seed=3)
    assert [len(part) for part in parts] == pytest.approx([898, 449, 449], abs=6)
    assert sum(part.labels.bincount() for part in parts).tolist() == digits.labels.bincount().tolist()
    known = {image.numpy().tobytes(): int(label) for image, label in zip(digits.pixels, digits.labels, strict=True)}
    for part in parts:
        assert part.class_names == digits.class_names
        assert (part.labels.bincount() / len(part) - 0.1).abs().max() < 0.01
        assert all(
            known[image.numpy().tobytes()] == int(label) for image, label in zip(part.pixels, part.labels, strict=True)
        )


def test_the_seed_decides() -> None:
    whole = numbered([0] * 20 + [1] * 20)
    first, again, other = (split_rows(whole, seed=seed)[0].features[:, 0].tolist() for seed in (0, 0, 1))
    assert first == again != other
    classes = split_rows(whole)[0].target
    assert (np.diff(classes) != 0).sum() > 3, "the classes are mixed"


def test_a_regression_is_split_without_regard_to_its_values() -> None:
    parts = split_rows(numbered(list(range(10)), is_regression=True))
    assert [len(part) for part in parts] == [6, 2, 2]
    assert sorted(np.concatenate([part.target for part in parts]).tolist()) == list(range(10))


@given(st.text(min_size=3, max_size=200), st.sampled_from([None, (0.5, 0.3, 0.2), (0.98, 0.01, 0.01)]))
def test_a_text_is_cut_in_its_order(content: str, shares: tuple[float, ...] | None) -> None:
    parts = split_rows(Text(content, "mine"), shares)
    assert "".join(part.text for part in parts) == content
    assert all(len(part) for part in parts)
    assert {part.name for part in parts} == {"mine"}


def test_a_text_keeps_eight_tenths_to_train() -> None:
    assert [len(part) for part in split_rows(Text("a" * 1000))] == [800, 100, 100]


def test_too_little_is_refused() -> None:
    with pytest.raises(ValueError, match="mine has 2 of 'b'; 3 parts need at least 3 of each class"):
        split_rows(numbered([0, 0, 0, 1, 1]))
    with pytest.raises(ValueError, match="a text of 2 characters cannot be cut"):
        split_rows(Text("ab"))
    pixels = torch.zeros(2, 1, 2, 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match="the data set has 2 of 'x'"):
        split_rows(Images(pixels, torch.zeros(2, dtype=torch.int64), ("x",)))


@pytest.mark.parametrize(
    "shares", [(1.0,), (0.6, 0.3), (0.6, 0.4, 0.0), (0.5, 0.5, 0.5), (float("nan"), 0.5, 0.5), (2, -0.5, -0.5)]
)
def test_shares_are_positive_numbers_with_the_sum_one(shares: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="two or more positive numbers with the sum 1"):
        split_rows(Text("abc"), shares)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.integers(0, 200))
def test_apportion_keeps_the_sum_and_the_minimum(weights: list[int], extra: int) -> None:
    total = 2 * len(weights) + extra
    shares = [weight / sum(weights) for weight in weights]
    sizes = apportion(total, shares, at_least=2)
    assert sum(sizes) == total
    assert min(sizes) >= 2
    if min(share * total for share in shares) >= 2:
        assert all(abs(size - share * total) < 1 + 1e-9 for size, share in zip(sizes, shares, strict=True))
