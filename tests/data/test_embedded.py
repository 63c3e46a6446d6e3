import ast
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
import torch

import postern.data._embedded as embedded
from postern.data import DataUnavailable, Images, Table, Text, catalogue, load, locate

SETS = {
    "digits": sklearn.datasets.load_digits,
    "breast-cancer": sklearn.datasets.load_breast_cancer,
    "wine": sklearn.datasets.load_wine,
    "iris": sklearn.datasets.load_iris,
    "diabetes": sklearn.datasets.load_diabetes,
}


def rows_of(loaded: Images | Table | Text) -> np.ndarray:
    if isinstance(loaded, Images):
        return np.concatenate([loaded.pixels.flatten(1).numpy(), loaded.labels[:, None].numpy()], axis=1)
    assert isinstance(loaded, Table)
    return np.concatenate([loaded.features, loaded.target[:, None]], axis=1)


def sorted_rows(rows: np.ndarray) -> np.ndarray:
    return rows[np.lexsort(rows.T)]


@pytest.mark.parametrize("name", SETS)
def test_all_is_scikit_learns_and_train_and_test_part_it(name: str) -> None:
    bunch = SETS[name]()
    everything = load(name, "all")
    if isinstance(everything, Images):
        np.testing.assert_allclose(everything.scaled()[:, 0].numpy(), bunch.images / 16, atol=0.5 / 255 + 1e-7)
        assert torch.equal(everything.labels, torch.from_numpy(bunch.target))
    else:
        assert isinstance(everything, Table)
        np.testing.assert_array_equal(everything.features, bunch.data)
        np.testing.assert_array_equal(everything.target, bunch.target)
        assert everything.feature_names == tuple(bunch.feature_names)
    parts = [load(name, "train"), load(name, "test")]
    np.testing.assert_array_equal(
        sorted_rows(np.concatenate([rows_of(part) for part in parts])), sorted_rows(rows_of(everything))
    )


@pytest.mark.parametrize("name", SETS)
def test_sizes_are_those_of_the_catalogue(name: str) -> None:
    (data_set,) = (item for item in catalogue() if item.name == name)
    assert {split: len(load(name, split)) for split in data_set.splits} == data_set.splits
    assert locate(name).where == "embedded"
    assert locate(name).missing == ()


@pytest.mark.parametrize("name", [name for name in SETS if name != "diabetes"])
def test_splits_are_stratified_and_shuffled(name: str) -> None:
    for split in ("train", "test"):
        loaded = load(name, split)
        target = loaded.labels.numpy() if isinstance(loaded, Images) else loaded.target
        shares = np.bincount(target) / len(target)
        whole = np.bincount(SETS[name]().target) / len(SETS[name]().target)
        np.testing.assert_allclose(shares, whole, atol=0.02)
        assert len(set(target[:10])) > 1, "the first rows are all of one class"


def test_limit_takes_the_first() -> None:
    whole, part = load("digits", "train"), load("digits", "train", limit=7)
    assert torch.equal(part.pixels, whole.pixels[:7])
    assert torch.equal(part.labels, whole.labels[:7])
    assert len(load("iris", "test", limit=1000)) == 30


@pytest.mark.parametrize("limit", [0, -3, 1.5])
def test_a_wrong_limit_is_refused_before_reading(limit: int) -> None:
    with pytest.raises(ValueError, match="positive integer or None"):
        load("digits", "train", limit=limit)


def test_python_stdlib_is_the_librarys_source_in_three_parts() -> None:
    parts = {split: load("python-stdlib", split).text for split in ("train", "validation", "test")}
    sources = [Path(module.__file__ or "").read_text(encoding="utf-8") for module in (ast, __import__("json"))]
    for source in sources:
        assert sum(source in text for text in parts.values()) == 1
    assert len(parts["train"]) > 5_000_000
    for split in ("validation", "test"):
        assert 0.02 < len(parts[split]) / len(parts["train"]) < 0.15
    assert "\x00" not in parts["train"]


def test_python_stdlib_with_a_limit_is_its_beginning() -> None:
    assert load("python-stdlib", "validation", limit=5000).text == load("python-stdlib", "validation").text[:5000]


def test_a_file_stays_in_its_split_whatever_else_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_library", lambda: tmp_path)
    for number in range(100):
        (tmp_path / f"module_{number}.py").write_text(f"number = {number}\n")
    few = {split: load("python-stdlib", split).text for split in ("train", "validation", "test")}
    for number in range(100, 200):
        (tmp_path / f"module_{number}.py").write_text(f"number = {number}\n")
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "other.py").write_text("not = 'library'\n")
    (tmp_path / "_sysconfigdata_x.py").write_text("home = '/here'\n")
    (tmp_path / "broken.py").write_bytes(b"# coding: no-such-codec\n")
    many = {split: load("python-stdlib", split).text for split in ("train", "validation", "test")}
    for split, text in few.items():
        assert set(text.splitlines()) <= set(many[split].splitlines())
    assert sum(len(text.splitlines()) for text in many.values()) == 200


def test_a_library_without_source_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "_library", lambda: tmp_path)
    with pytest.raises(DataUnavailable, match=f"{tmp_path} holds no readable .py files"):
        load("python-stdlib", "train")
