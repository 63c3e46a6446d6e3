"""Bigram-Backcopy: what follows what."""

import pytest
import torch

from postern.data import BigramBackcopy


def drawn(count=400, length=40):
    generator = torch.Generator().manual_seed(0)
    task = BigramBackcopy.draw(8, 2, generator)
    return task, task.sample(count, length, generator)


def test_triggers_copy_and_all_else_follows_the_chain():
    task, tokens = drawn()
    assert int(task.is_trigger.sum()) == 2
    assert (tokens[:, 0] == task.start).all()
    assert int(tokens[:, 1:].max()) < task.num_tokens == 8
    copies = task.follows_trigger(tokens)
    rows, columns = copies.nonzero(as_tuple=True)
    assert len(rows) > 100
    assert (columns >= 3).all()
    assert torch.equal(tokens[rows, columns], tokens[rows, columns - 2])
    is_trigger = task.is_trigger[tokens[:, 1:]]
    assert not (is_trigger[:, 1:] & is_trigger[:, :-1]).any()
    assert torch.equal(copies[:, 2:], is_trigger[:, :-1])
    for token in range(8):
        if not task.is_trigger[token]:
            following = tokens[:, 2:][tokens[:, 1:-1] == token]
            found = torch.bincount(following, minlength=8) / len(following)
            assert (found - task.transitions[token]).abs().max() < 5 * (0.25 / len(following)) ** 0.5


def test_nothing_predicts_better_than_the_chain_itself():
    task, tokens = drawn()
    probabilities = torch.zeros(*tokens[:, 1:].shape, 8)
    for row in range(len(tokens)):
        for column in range(1, tokens.shape[1]):
            last = tokens[row, column - 1]
            if column == 1:
                probabilities[row, 0] = (~task.is_trigger) / 6
            elif task.is_trigger[last]:
                probabilities[row, column - 1, tokens[row, column - 2]] = 1
            else:
                probabilities[row, column - 1] = task.transitions[last]
    expected = -probabilities.gather(2, tokens[:, 1:, None]).log().mean()
    assert task.least_loss(tokens) == pytest.approx(expected.item(), rel=1e-5)


def test_the_seed_decides():
    assert torch.equal(drawn()[1], drawn()[1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BigramBackcopy.draw(4, 4, torch.Generator()), "got 4 triggers among 4 tokens"),
        (lambda: BigramBackcopy.draw(4, 0, torch.Generator()), "got 0 triggers"),
        (lambda: BigramBackcopy.draw(4, 1, torch.Generator(), spread=-1.0), r"spread=-1\.0"),
        (lambda: drawn(length=1), "got 1 and 400"),
        (lambda: drawn(count=0), "got 40 and 0"),
    ],
)
def test_rejects_what_cannot_be(call, message):
    with pytest.raises(ValueError, match=message):
        call()
