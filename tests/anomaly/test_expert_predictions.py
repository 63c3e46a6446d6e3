import dataclasses

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.linear_model import LogisticRegression

from postern.anomaly import (
    ESZSL,
    ExpertPredictions,
    load_expert_predictions,
    predict_with_experts,
    save_expert_predictions,
)
from tests.anomaly.experts import random_predictions

FIELDS = ("seen_expert", "zero_shot", "labels", "seen", "unseen")


def same(first: ExpertPredictions, second: ExpertPredictions) -> None:
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
        assert getattr(first, name).dtype == getattr(second, name).dtype


@pytest.mark.parametrize("place", ["p.npz", "folder-npy", "folder-csv"])
def test_what_is_written_is_read(tmp_path, place):
    predictions = random_predictions()
    path = save_expert_predictions(tmp_path / place, predictions, "csv" if place.endswith("csv") else "npy")
    same(load_expert_predictions(path), predictions)


def test_float32_and_missing_labels_stay_so(tmp_path):
    predictions = random_predictions()
    single = dataclasses.replace(predictions, zero_shot=predictions.zero_shot.astype(np.float32), labels=None)
    loaded = load_expert_predictions(save_expert_predictions(tmp_path / "p.npz", single))
    assert loaded.zero_shot.dtype == np.float32
    assert loaded.labels is None
    with pytest.raises(ValueError, match="without labels"):
        _ = loaded.is_seen


@pytest.mark.parametrize("key", ["pred_val", "pred_test"])
def test_a_file_of_the_official_repository_with_the_rest_given(tmp_path, key):
    predictions = random_predictions()
    np.savez(tmp_path / "pred_gzsl.npz", **{key: predictions.zero_shot})
    rest = {name: getattr(predictions, name) for name in FIELDS if name != "zero_shot"}
    same(load_expert_predictions(tmp_path / "pred_gzsl.npz", **rest), predictions)
    with pytest.raises(ValueError, match="has zero_shot and lacks seen_expert, seen, unseen"):
        load_expert_predictions(tmp_path / "pred_gzsl.npz")


def test_a_single_line_of_csv_is_a_single_sample(tmp_path):
    one = random_predictions().take([3])
    same(load_expert_predictions(save_expert_predictions(tmp_path / "one", one, "csv")), one)


def test_given_arrays_replace_those_in_the_file(tmp_path):
    predictions = random_predictions()
    path = save_expert_predictions(tmp_path / "p.npz", predictions)
    labels = np.full(len(predictions), predictions.seen[0])
    np.testing.assert_array_equal(load_expert_predictions(path, labels=labels).labels, labels)


def test_take_selects_rows_of_everything():
    predictions = random_predictions()
    rows = np.array([5, 2])
    taken = predictions.take(rows)
    np.testing.assert_array_equal(taken.zero_shot, predictions.zero_shot[rows])
    np.testing.assert_array_equal(taken.seen_expert, predictions.seen_expert[rows])
    np.testing.assert_array_equal(taken.labels, predictions.labels[rows])
    assert len(taken) == 2
    assert len(predictions.take(predictions.is_seen)) == np.isin(predictions.labels, predictions.seen).sum()


def test_ranges_and_whole_floats_are_classes():
    uniform = np.full((2, 4), 0.25)
    predictions = ExpertPredictions(uniform, uniform, range(2), [2.0, 3.0], [0, 3])
    assert predictions.unseen.dtype == np.int64
    np.testing.assert_array_equal(predictions.is_seen, [True, False])


def broken(**changes):
    uniform = np.full((2, 4), 0.25)
    fields = {"seen_expert": uniform, "zero_shot": uniform.copy(), "seen": [0, 1], "unseen": [2, 3], "labels": [0, 3]}
    return fields | changes


def off_by(row, column, value):
    array = np.full((2, 4), 0.25)
    array[row, column] = value
    return array


BROKEN = [
    (broken(zero_shot=np.full((3, 4), 0.25)), r"seen_expert \(2, 4\) and zero_shot \(3, 4\)"),
    (broken(zero_shot=np.full(4, 0.25)), r"row a sample and a column a class.*\(4,\)"),
    (broken(zero_shot=np.zeros((0, 4)), seen_expert=np.zeros((0, 4))), r"at least one of each, got \(0, 4\)"),
    (broken(zero_shot=off_by(1, 2, np.nan)), "zero_shot is finite, but row 1"),
    (broken(seen_expert=off_by(0, 2, np.inf)), "seen_expert is finite, but row 0"),
    (broken(zero_shot=off_by(1, 2, -0.25)), r"row 1 has -0\.25: logits"),
    (broken(zero_shot=off_by(1, 2, 0.3)), r"rows of zero_shot sum to one .* row 1 sums to 1\.05"),
    (broken(zero_shot=np.full((2, 4), "a")), "holds probabilities, got an array of <U1"),
    (broken(labels=[0, 4]), "labels are seen or unseen classes, got 4 for sample 1"),
    (broken(labels=[0]), r"one class a sample, \(2,\), got \(1,\)"),
    (broken(labels=[0.5, 1]), "whole numbers"),
    (broken(labels=[[0], [1]]), r"a list of classes, got shape \(2, 1\)"),
    (broken(seen=[0, 4]), "seen are columns from 0 to 3, got 0 to 4"),
    (broken(unseen=[-1]), "unseen are columns from 0 to 3, got -1"),
    (broken(seen=[]), "seen has at least one class"),
    (broken(seen=[0, 0, 1]), "lists each class once"),
    (broken(seen=[0, 1, 2]), r"but \[2\] are in both lists"),
]


@pytest.mark.parametrize(("fields", "message"), BROKEN)
def test_bad_predictions_are_refused_in_memory_and_on_disk(fields, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        ExpertPredictions(**fields)
    np.savez(tmp_path / "p.npz", **fields)
    with pytest.raises(ValueError, match=rf"p\.npz: .*{message}"):
        load_expert_predictions(tmp_path / "p.npz")


def test_bad_files_are_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_expert_predictions(tmp_path / "nowhere.npz")
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(ValueError, match=r"text\.npz should be an \.npz file"):
        load_expert_predictions(tmp_path / "text.npz")
    np.save(tmp_path / "single.npy", np.zeros(3))
    (tmp_path / "single.npy").rename(tmp_path / "single.npz")
    with pytest.raises(ValueError, match="single array"):
        load_expert_predictions(tmp_path / "single.npz")
    np.savez(tmp_path / "objects.npz", zero_shot=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match=r"objects\.npz"):
        load_expert_predictions(tmp_path / "objects.npz")
    whole = save_expert_predictions(tmp_path / "cut.npz", random_predictions()).read_bytes()
    damaged = bytearray(whole)
    damaged[200:260] = bytes(60)
    (tmp_path / "cut.npz").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"cut\.npz"):
        load_expert_predictions(tmp_path / "cut.npz")


def test_bad_folders_are_refused_by_file(tmp_path):
    folder = save_expert_predictions(tmp_path / "folder", random_predictions(), "csv")
    text = (folder / "zero_shot.csv").read_text()
    (folder / "zero_shot.csv").write_text("class 0,class 1\n" + text)
    with pytest.raises(ValueError, match=r"zero_shot\.csv should be numbers separated by commas, without a header"):
        load_expert_predictions(folder)
    (folder / "zero_shot.csv").write_text(text.replace(",", " ", 1))
    with pytest.raises(ValueError, match=r"zero_shot\.csv"):
        load_expert_predictions(folder)
    (folder / "zero_shot.csv").unlink()
    with pytest.raises(ValueError, match="lacks zero_shot"):
        load_expert_predictions(folder)
    np.save(folder / "seen.npy", [1])
    with pytest.raises(ValueError, match=r"both seen\.npy and seen\.csv"):
        load_expert_predictions(folder)
    with pytest.raises(ValueError, match=r"consist of .*; got 'classes'"):
        load_expert_predictions(folder, classes=[1])
    with pytest.raises(ValueError, match="'npy' or 'csv', got 'txt'"):
        save_expert_predictions(folder, random_predictions(), "txt")


def test_experts_are_asked_for_the_classes_of_the_phase():
    """A softmax cut to some classes is the softmax over these; classes of the seen expert go to their columns."""
    rng = np.random.default_rng(0)
    attributes, names = rng.random((5, 4)), np.array(["ant", "bee", "cat", "dog", "eel"])
    features, labels = rng.normal(size=(60, 6)), names[[0, 2, 4]][rng.integers(3, size=60)]
    zero_shot = ESZSL(attributes, names).fit(features, labels)
    seen_expert = LogisticRegression().fit(features, labels)
    asked = predict_with_experts(seen_expert, zero_shot, features, ["eel", "ant", "cat"], ["dog"], labels)
    np.testing.assert_array_equal(asked.seen, [4, 0, 2])
    np.testing.assert_array_equal(asked.unseen, [3])
    np.testing.assert_array_equal(names[asked.labels], labels)
    current = [0, 2, 3, 4]
    expected = softmax(5 * zero_shot.class_scores(features)[:, current], axis=1)
    np.testing.assert_allclose(asked.zero_shot[:, current], expected, rtol=1e-12)
    assert (asked.zero_shot[:, 1] == 0).all()
    np.testing.assert_array_equal(asked.seen_expert[:, [0, 2, 4]], seen_expert.predict_proba(features))
    assert (asked.seen_expert[:, [1, 3]] == 0).all()
    with pytest.raises(ValueError, match=r"unseen has classes that the zero-shot expert does not know: \['fox'\]"):
        predict_with_experts(seen_expert, zero_shot, features, ["ant"], ["fox"])
