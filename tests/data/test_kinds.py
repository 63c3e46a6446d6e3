import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from postern.data import Images, Table, Text


def images(count: int = 4) -> Images:
    pixels = torch.arange(count * 3 * 2 * 2, dtype=torch.uint8).reshape(count, 3, 2, 2)
    return Images(pixels, torch.arange(count) % 2, ("cat", "dog"), "pets, train")


def table(**changes: object) -> Table:
    fields = {
        "features": np.array([[1.0, 5.0], [3.0, 5.0], [2.0, 5.0]]),
        "target": np.array([0, 1, 1]),
        "feature_names": ("length", "constant"),
        "target_names": ("no", "yes"),
    }
    return Table(**{**fields, **changes})  # type: ignore[arg-type]


def test_scaled_images_are_the_pixels_over_255() -> None:
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16)
    scaled = Images(pixels, torch.zeros(1, dtype=torch.int64), ("x",)).scaled()
    assert scaled.dtype == torch.float32
    torch.testing.assert_close(scaled.flatten(), torch.linspace(0, 1, 256))


def test_scaled_table_spans_zero_to_one_and_keeps_constants_finite() -> None:
    np.testing.assert_array_equal(table().scaled(), [[0.0, 0.0], [1.0, 0.0], [0.5, 0.0]])


@given(st.integers(1, 10), st.none() | st.integers(1, 12))
def test_limit_keeps_the_first(count: int, limit: int | None) -> None:
    kept = min(count, limit or count)
    limited = images(count).limit(limit)
    assert len(limited) == kept
    assert torch.equal(limited.pixels, images(count).pixels[:kept])
    assert torch.equal(limited.labels, images(count).labels[:kept])
    assert Text("é" * count).limit(limit).text == "é" * kept


@pytest.mark.parametrize("limit", [0, -1, 2.0, True])
def test_limit_is_a_positive_integer(limit: int) -> None:
    for kind in (images(), table(), Text("abc")):
        with pytest.raises(ValueError, match=f"positive integer or None, got {limit!r}"):
            kind.limit(limit)


def test_text_encodes_to_utf8_bytes() -> None:
    assert Text("aé").encoded().tolist() == list("aé".encode())


def test_representations_say_size_and_origin() -> None:
    assert repr(images()) == "Images(4 images of pets, train, 3x2x2, 2 classes)"
    assert repr(table()) == "Table(3 rows, 2 features, 2 classes)"
    assert repr(table(target_names=(), name="t")) == "Table(3 rows of t, 2 features, a value to regress)"
    assert "3 characters of x" in repr(Text("abc", "x"))


def test_sets_cannot_be_reassigned() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        images().labels = torch.zeros(4, dtype=torch.int64)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("pixels", "labels", "message"),
    [
        (torch.zeros(2, 1, 3, 3), torch.zeros(2, dtype=torch.int64), r"got torch.float32 \[2, 1, 3, 3\]"),
        (torch.zeros(2, 3, 3, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), r"got torch.uint8 \[2, 3, 3\]"),
        (torch.zeros(2, 1, 3, 3, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64), r"\[2\].*got torch.int64 \[3"),
        (torch.zeros(2, 1, 3, 3, dtype=torch.uint8), torch.zeros(2), "got torch.float32"),
        (torch.zeros(0, 1, 3, 3, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64), "at least one image"),
        (torch.zeros(2, 1, 3, 3, dtype=torch.uint8), torch.tensor([0, 2]), r"0\.\.1, got 0\.\.2"),
        (torch.zeros(2, 1, 3, 3, dtype=torch.uint8), torch.tensor([-1, 1]), r"0\.\.1, got -1\.\.1"),
    ],
)
def test_wrong_images_are_refused(pixels: torch.Tensor, labels: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Images(pixels, labels, ("cat", "dog"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": np.zeros((3, 2), dtype=np.float32)}, "got float32"),
        ({"features": np.zeros(3)}, r"got float64 \(3,\)"),
        ({"target": np.array([0, 1])}, r"\[3\], got \(2,\)"),
        ({"features": np.zeros((0, 2)), "target": np.zeros(0, dtype=int)}, "at least one row"),
        ({"feature_names": ("length",)}, "2 columns need as many feature names, got 1"),
        ({"features": np.array([[1.0, 1.0], [1.0, 1.0], [1.0, np.nan]])}, "finite"),
        ({"target": np.array([0, 1, 2])}, r"0\.\.1, got int64 in 0\.\.2"),
        ({"target": np.array([0.0, 1.0, 1.0])}, "got float64"),
    ],
)
def test_wrong_tables_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        table(**changes)


def test_an_empty_text_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one character"):
        Text("")


@pytest.mark.parametrize("indices", [[2, 0, 2], np.array([2, 0, 2], dtype=np.uint8), torch.tensor([2, 0, 2])])
def test_at_takes_these_in_this_order(indices: object) -> None:
    chosen = images().at(indices)  # type: ignore[arg-type]
    assert torch.equal(chosen.pixels, images().pixels[[2, 0, 2]])
    assert chosen.labels.tolist() == [0, 0, 0]
    assert (chosen.class_names, chosen.name) == (images().class_names, images().name)
    rows = table().at(indices)  # type: ignore[arg-type]
    np.testing.assert_array_equal(rows.features, [[2.0, 5.0], [1.0, 5.0], [2.0, 5.0]])
    assert rows.target.tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([], "at least one integer, got an empty list"),
        ([0.0], "got float64"),
        ([True, False, True], "got bool"),
        ([[0, 1]], r"got int64 \[1, 2\]"),
        ([-1, 0], r"0\.\.\d, got -1\.\.0"),
        ([9], r"0\.\.\d, got 9\.\.9"),
    ],
)
def test_at_refuses_what_is_no_number_of_a_row(indices: object, message: str) -> None:
    for kind in (images(), table()):
        with pytest.raises(ValueError, match=message):
            kind.at(indices)  # type: ignore[arg-type]
