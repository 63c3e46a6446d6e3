"""Generated transductions: what targets are, how much noise they have, and how outputs are judged."""

import pytest
import torch

from postern.data import ReversedDigits, SpelledNumbers
from postern.data.transduction import spell


def drawn(task, count=4000, *, is_noisy=False):
    generator = torch.Generator().manual_seed(0)
    sources = task.draw_sources(count, generator)
    return sources, task.draw_targets(sources, generator, is_noisy=is_noisy)


def test_targets_are_the_reverse_and_synonyms_come_as_often_as_asked():
    task = ReversedDigits()
    sources, targets = drawn(task)
    for source, target in zip(sources[:50].tolist(), targets[:50].tolist(), strict=True):
        for digit, token in zip(reversed(source), target, strict=True):
            assert token in ({10 + digit, 20 + digit} if digit < 4 else {10 + digit})
    assert task.is_valid(sources, targets).all()
    among = task.is_synonym(targets)[task.has_synonym(sources)].double().mean().item()
    assert among == pytest.approx(0.3, abs=0.02)
    assert not task.is_synonym(targets)[~task.has_synonym(sources)].any()
    prompts = task.prompts(sources)
    assert torch.equal(prompts[:, :-1], sources)
    assert (prompts[:, -1] == 24).all()
    assert max(prompts.max().item(), targets.max().item()) < task.num_tokens


def test_noise_is_uniform_over_the_target_tokens():
    task = ReversedDigits(noise=0.15)
    sources, targets = drawn(task, 20_000, is_noisy=True)
    valid = task.is_valid(sources, targets)
    # noise is valid by chance, 1 or 2 times in 14: 0.85 + 0.15 * (1 + 0.4) / 14
    assert valid.double().mean().item() == pytest.approx(0.85 + 0.15 * 1.4 / 14, abs=0.005)
    shares = torch.bincount(targets[~valid], minlength=25).double() / (~valid).sum()
    assert (shares[:10] == 0).all()
    assert shares[24] == 0
    assert (shares[10:24] - 1 / 14).abs().max() < 0.012


def test_clean_targets_differ_as_often_as_they_should():
    task = ReversedDigits()
    generator = torch.Generator().manual_seed(0)
    sources = torch.tensor([[0, 1, 5, 6, 7, 8], [9, 9, 9, 9, 9, 9], [3, 2, 1, 0, 3, 2]])
    drawn = torch.stack([task.draw_targets(sources, generator) for _ in range(20_000)])
    differ = (drawn[::2] != drawn[1::2]).any(-1).double().mean(0)
    torch.testing.assert_close(differ, task.clean_diversity(sources), rtol=0, atol=0.02)


def test_synonyms_of_other_digits_are_not_valid():
    task = ReversedDigits(length=2)
    sources = torch.tensor([[5, 1]])
    outputs = torch.tensor([[[11, 15]], [[21, 15]], [[20, 15]], [[11, 25]], [[15, 11]]])
    assert task.is_valid(sources, outputs).all(-1)[:, 0].tolist() == [True, True, False, False, False]


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"),
        (10, "ten"),
        (19, "nineteen"),
        (20, "twenty"),
        (85, "eighty-five"),
        (100, "one hundred"),
        (714, "seven hundred fourteen"),
        (1000, "one thousand"),
        (421_003, "four hundred twenty-one thousand three"),
        (999_999, "nine hundred ninety-nine thousand nine hundred ninety-nine"),
    ],
)
def test_numbers_are_spelled(number, words):
    assert spell(number) == words


@pytest.mark.parametrize("digits", [1, 2, 3, 4])
def test_targets_spell_the_number_and_end(digits):
    task = SpelledNumbers(digits)
    numbers = torch.arange(10**digits)
    prompts, targets = task.encode(numbers)
    lengths = (targets != task.end).sum(1)
    assert lengths.max() == task.longest - 1
    powers = 10 ** torch.arange(digits - 1, -1, -1)
    assert torch.equal(((prompts[:, :-1] - 1) * powers).sum(1), numbers)
    assert all(task.decode(target) == spell(number) for number, target in enumerate(targets[:200]))
    assert max(prompts.max().item(), targets.max().item()) < task.num_tokens


def test_damage_empties_and_replaces_characters():
    task = SpelledNumbers(empty=0.05, noise=0.15)
    _, targets = task.encode(torch.arange(1000).repeat(10))
    damaged = task.damage(targets, torch.Generator().manual_seed(0))
    is_empty = (damaged == task.end).all(1)
    assert is_empty.double().mean().item() == pytest.approx(0.05, abs=0.008)
    before, after = targets[~is_empty], damaged[~is_empty]
    assert torch.equal(before == task.end, after == task.end)
    changed = (before != after)[before != task.end].double().mean().item()
    characters = task.num_tokens - 12
    assert changed == pytest.approx(0.15 * (1 - 1 / characters), abs=0.005)
    assert torch.equal(SpelledNumbers().damage(targets, torch.Generator()), targets)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ReversedDigits(0), "got 0"),
        (lambda: ReversedDigits(noise=1.5), "noise is a probability, got 1.5"),
        (lambda: ReversedDigits(synonyms=-0.1), "synonyms is a probability"),
        (lambda: SpelledNumbers(7), "at most 6 digits, got 7"),
        (lambda: SpelledNumbers(empty=2), "empty is a probability, got 2"),
        (lambda: spell(1_000_000), "got 1000000"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
