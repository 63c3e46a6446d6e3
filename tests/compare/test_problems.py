"""Data as problems: the parts, what is standardised, the vocabulary, and what is refused."""

import numpy as np
import pytest
import torch

from postern.claims.comparison import CannotCompare
from postern.compare.problems import CONTEXT, UNKNOWN, Rows, Words, digest_of, kind_of, make_problem
from postern.data import Images, Table, Text, load

TEXT = Text("the cat sat on the mat . the dog ate the cat . " * 60, "cats")


def test_rows_are_standardised_by_the_training_part() -> None:
    problem = make_problem({"train": load("wine", "all")})
    assert isinstance(problem, Rows)
    train, _ = problem.parts["train"]
    torch.testing.assert_close(train.mean(0), torch.zeros(13), rtol=0, atol=1e-5)
    torch.testing.assert_close(train.std(0, correction=0), torch.ones(13), rtol=1e-4, atol=0)
    test, _ = problem.parts["test"]
    assert test.mean(0).abs().max() > 1e-3  # by their own mean they would be 0
    assert sum(len(y) for _, y in problem.parts.values()) == 178
    assert [len(y) for _, y in problem.parts.values()] == pytest.approx([107, 36, 35], abs=2)


def test_a_test_split_that_is_there_is_kept() -> None:
    images = load("digits", "all")
    test = images.limit(100)
    problem = make_problem({"train": images, "test": test})
    assert torch.equal(problem.parts["test"][1], test.labels)
    assert len(problem.parts["train"][1]) == pytest.approx(0.8 * len(images), abs=10)


def test_parts_do_not_depend_on_chance() -> None:
    torch.manual_seed(1)
    first = make_problem({"train": load("digits", "all")})
    torch.manual_seed(2)
    second = make_problem({"train": load("digits", "all")})
    for part in ("train", "validation", "test"):
        assert torch.equal(first.parts[part][0], second.parts[part][0])


def test_a_constant_column_becomes_zero() -> None:
    features = np.column_stack([np.arange(40.0), np.full(40, 7.0)])
    table = Table(features, np.arange(40) % 2, ("a", "b"), ("x", "y"))
    problem = make_problem({"train": table})
    assert isinstance(problem, Rows)
    assert all(inputs[:, 1].eq(0).all() for inputs, _ in problem.parts.values())


def test_images_become_patches_and_columns_tokens() -> None:
    digits = make_problem({"train": load("digits", "all")})
    assert isinstance(digits, Rows)
    tokens = digits.as_tokens()
    assert tokens.shape == (16, 4)  # 8 x 8 pixels in patches of 2 x 2
    image = digits.parts["test"][0][0, 0]
    assert torch.equal(tokens.parts["test"][0][0, 5], image[2:4, 2:4].flatten())
    wine = make_problem({"train": load("wine", "all")})
    assert isinstance(wine, Rows)
    assert wine.as_tokens().shape == (13, 1)


def test_images_that_no_patch_divides_are_padded() -> None:
    pixels = torch.randint(0, 256, (30, 3, 9, 13), dtype=torch.uint8)
    problem = make_problem({"train": Images(pixels, torch.arange(30) % 2, ("a", "b"))})
    assert isinstance(problem, Rows)
    assert problem.as_tokens().shape == (5 * 7, 3 * 4)


def test_words_are_numbered_by_the_training_part() -> None:
    problem = make_problem({"train": TEXT})
    assert isinstance(problem, Words)
    assert problem.vocabulary[0] == UNKNOWN
    assert set(problem.vocabulary[1:]) == {"the", "cat", "sat", "on", "mat", ".", "dog", "ate"}
    words = [problem.vocabulary[k] for k in problem.parts["test"][:40].tolist()]
    assert " ".join(words) in " ".join(TEXT.text.split())
    assert problem.kind == "text"


def test_rare_and_unseen_words_are_one() -> None:
    rare = Text("zebra " + TEXT.text)
    problem = make_problem({"train": rare, "test": Text("unseen " * 400)})
    assert isinstance(problem, Words)
    assert "zebra" not in problem.vocabulary
    assert (problem.parts["test"] == 0).all()


def test_the_target_of_each_word_is_the_next() -> None:
    problem = make_problem({"train": TEXT})
    inputs, target = problem.draw(torch.Generator().manual_seed(0))
    assert inputs.shape == target.shape
    assert torch.equal(inputs[:, 1:], target[:, :-1])
    for inputs, target in problem.batches("validation"):
        assert inputs.shape[1] == CONTEXT
        assert torch.equal(inputs[:, 1:], target[:, :-1])


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(CannotCompare, match=r"target to regress.*choose a label column with classes"):
        make_problem({"train": load("diabetes", "all")})
    with pytest.raises(CannotCompare, match=r"the validation part of the text has .* words.*take a longer text"):
        make_problem({"train": Text("a b c d " * 40)})


def test_the_digest_is_of_the_content() -> None:
    one, same, other = (load("wine", "all", limit=n) for n in (50, 50, 51))
    assert digest_of({"train": one}) == digest_of({"train": same}) != digest_of({"train": other})
    assert digest_of({"train": one}) != digest_of({"test": one})
    assert digest_of({"train": TEXT}) != digest_of({"train": Text(TEXT.text + "!")})
    digits = load("digits", "all", limit=20)
    assert digest_of({"train": digits}) != digest_of({"train": digits.limit(19)})
    assert [kind_of({"train": each}) for each in (one, TEXT, digits)] == ["table", "text", "images"]
