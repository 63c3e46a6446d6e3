import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from postern.anomaly import gzsl_split


def rows_of(labels, classes):
    return set(np.flatnonzero(np.isin(labels, classes)))


@given(
    st.lists(st.integers(8, 30), min_size=4, max_size=9),
    st.integers(0, 2**31),
    st.sampled_from([0.2, 0.25, 0.4]),
    st.integers(1, 2),
    st.integers(0, 1),
)
def test_tuning_sees_no_test_class_and_no_test_sample(counts, seed, held_out, num_validation, num_test):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)) * 3, counts))
    split = gzsl_split(labels, num_validation, num_test, held_out, seed)
    validation, test = split.validation, split.test
    assert len(validation.unseen) == num_validation
    assert len(test.unseen) == num_test
    all_classes = [*validation.seen, *validation.unseen, *test.unseen]
    assert sorted(all_classes) == np.unique(labels).tolist()
    np.testing.assert_array_equal(test.seen, np.sort([*validation.seen, *validation.unseen]))

    parts = [set(validation.train), set(validation.evaluation), set(test.evaluation)]
    assert sum(map(len, parts)) == len(labels) == len(set.union(*parts))
    assert set(test.train) == parts[0] | parts[1]
    assert set(labels[validation.train]) == set(validation.seen)
    assert set(labels[validation.evaluation]) == set(validation.seen) | set(validation.unseen)
    assert set(labels[test.evaluation]) == set(test.seen) | set(test.unseen)
    assert rows_of(labels, test.unseen) <= parts[2]
    for label in validation.seen:
        size = (labels == label).sum()
        for part in parts[1:]:
            assert len(part & rows_of(labels, [label])) == round(held_out * size)
    for label in validation.unseen:
        size = (labels == label).sum()
        assert len(parts[2] & rows_of(labels, [label])) == round(held_out * size)


def test_named_classes_and_the_same_seed():
    labels = np.repeat(["a", "b", "c", "d", "e"], 12)
    split = gzsl_split(labels, ["b"], ["d", "a"], random_state=3)
    assert split.validation.unseen.tolist() == ["b"]
    assert split.test.unseen.tolist() == ["a", "d"]
    again, other = (
        gzsl_split(labels, ["b"], ["d", "a"], random_state=3),
        gzsl_split(labels, ["b"], ["d", "a"], random_state=4),
    )
    np.testing.assert_array_equal(again.test.evaluation, split.test.evaluation)
    assert not np.array_equal(other.test.evaluation, split.test.evaluation)
    drawn = {tuple(gzsl_split(labels, 1, 1, random_state=seed).test.unseen) for seed in range(20)}
    assert len(drawn) > 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 1, 0.5), r"between 0 and 0\.5, got 0\.5"),
        ((1, 1, 0.0), r"got 0\.0"),
        ((0, 1), "got 4 and 0"),
        ((2, 3), "got 0 and 2"),
        ((9, 1), "4 classes that are left, got 9"),
        ((-1, 1), "got -1"),
        ((["a", "a"], 1), "different classes"),
        ((["x"], 1), r"there and not taken, got \['x'\]"),
        ((["a"], ["a"]), r"got \['a'\]"),
        ((1, 1, 0.01), "has 12"),
        ((1, 1, 0.46), "has 12"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        gzsl_split(np.repeat(["a", "b", "c", "d", "e"], 12), *arguments)
    with pytest.raises(ValueError, match="at least one"):
        gzsl_split([], 1, 1)
