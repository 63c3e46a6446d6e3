"""Sequences to sequences, generated: digits to reverse, and numbers to spell, with noise in what is learnt from.

Inputs are prompts of a causal language model, all of one length; outputs are what should follow. Noise spreads the
mass of what a network learns while the preferred output stays what it is, so that decision rules can be told apart.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

_FIRST_TARGET, _FIRST_SYNONYM, _SEPARATOR = 10, 20, 24
_WITH_SYNONYM = 4


@dataclass(frozen=True)
class ReversedDigits:
    """Reverse digits into target tokens, where the digits 0 to 3 have a synonym each.

    Digit ``r`` is token ``r`` in a source, token ``10 + r`` in a target, and there for ``r < 4`` also ``20 + r``;
    token 24 ends a prompt.

    Args:
        length: digits of a source.
        synonyms: how often a digit that has a synonym is written as such.
        noise: probability of a token of a noisy target to be any of the 14 target tokens.

    Raises:
        ValueError: a length below 1 or a probability outside [0, 1].
    """

    length: int = 6
    synonyms: float = 0.3
    noise: float = 0.15

    num_tokens: ClassVar[int] = 25

    def __post_init__(self) -> None:
        _check(self.length, synonyms=self.synonyms, noise=self.noise)

    def draw_sources(self, count: int, generator: torch.Generator) -> Int[Tensor, "count length"]:
        """Draw sources, uniformly."""
        return torch.randint(10, (count, self.length), generator=generator)

    def prompts(self, sources: Int[Tensor, "count length"]) -> Int[Tensor, "count length+1"]:
        """Return the sources with the token that ends a prompt."""
        return _ended(sources, _SEPARATOR)

    def draw_targets(
        self, sources: Int[Tensor, "count length"], generator: torch.Generator, *, is_noisy: bool = False
    ) -> Int[Tensor, "count length"]:
        """Draw targets of sources, clean or noisy."""
        reverse = sources.flip(-1)
        is_synonym = torch.rand(reverse.shape, generator=generator) < self.synonyms
        clean = reverse + torch.where(is_synonym & (reverse < _WITH_SYNONYM), _FIRST_SYNONYM, _FIRST_TARGET)
        if not is_noisy:
            return clean
        is_noise = torch.rand(reverse.shape, generator=generator) < self.noise
        noise = torch.randint(_FIRST_TARGET, _SEPARATOR, reverse.shape, generator=generator)
        return torch.where(is_noise, noise, clean)

    def clean_diversity(self, sources: Int[Tensor, "count length"]) -> Float[Tensor, " count"]:
        """Return the probability that two clean targets of a source differ: ``1 - (s^2 + (1 - s)^2)^n``."""
        agree = self.synonyms**2 + (1 - self.synonyms) ** 2
        return 1 - agree ** self.has_synonym(sources).sum(-1).double()

    def has_synonym(self, sources: Int[Tensor, "count length"]) -> Bool[Tensor, "count length"]:
        """Mark the positions of a target where a synonym is valid."""
        return sources.flip(-1) < _WITH_SYNONYM

    def is_synonym(self, outputs: Int[Tensor, "*batch length"]) -> Bool[Tensor, "*batch length"]:
        """Mark the tokens that are synonyms."""
        return (outputs >= _FIRST_SYNONYM) & (outputs < _SEPARATOR)

    def is_valid(
        self, sources: Int[Tensor, "count length"], outputs: Int[Tensor, "*batch count length"]
    ) -> Bool[Tensor, "*batch count length"]:
        """Mark the tokens of outputs that stand for the right digit, as itself or as a synonym."""
        reverse = sources.flip(-1)
        return (outputs == reverse + _FIRST_TARGET) | (
            (outputs == reverse + _FIRST_SYNONYM) & self.has_synonym(sources)
        )


# fmt: off
_ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
# fmt: on
_CHARACTERS = " -" + "".join(sorted(set("".join([*_ONES, *_TENS, "hundred", "thousand"]))))
_NUMBER_SEPARATOR, _FIRST_CHARACTER = 11, 12
_MOST_DIGITS = 6


def spell(number: int) -> str:
    """Return a number from 0 to 999999 in English: "four hundred twenty-one thousand three".

    Raises:
        ValueError: another number.
    """
    if not 0 <= number < 10**_MOST_DIGITS:
        raise ValueError(f"numbers from 0 to {10**_MOST_DIGITS - 1} can be spelled, got {number}")
    for size, name in ((1000, "thousand"), (100, "hundred")):
        if number >= size:
            many, rest = divmod(number, size)
            return f"{spell(many)} {name}" + (f" {spell(rest)}" if rest else "")
    if number >= 20:
        return _TENS[number // 10 - 2] + (f"-{_ONES[number % 10]}" if number % 10 else "")
    return _ONES[number]


@dataclass(frozen=True)
class SpelledNumbers:
    """Spell numbers in English, character by character: outputs of different lengths.

    Token 0 ends a target and fills it up, 1 to 10 are the digits of a prompt (leading zeros included), 11 ends a
    prompt, and characters follow.

    Args:
        digits: of a number, at most 6.
        empty: share of damaged targets that are nothing at all.
        noise: probability of a character of the other damaged targets to be any character.

    Raises:
        ValueError: no or too many digits, or a probability outside [0, 1].
    """

    digits: int = 3
    empty: float = 0.0
    noise: float = 0.0

    end: ClassVar[int] = 0
    num_tokens: ClassVar[int] = _FIRST_CHARACTER + len(_CHARACTERS)

    def __post_init__(self) -> None:
        _check(self.digits, empty=self.empty, noise=self.noise)
        if self.digits > _MOST_DIGITS:
            raise ValueError(f"numbers have at most {_MOST_DIGITS} digits, got {self.digits}")

    @property
    def longest(self) -> int:
        """Tokens of the longest target, its end included."""
        return _longest(self.digits) + 1

    def encode(
        self, numbers: Int[Tensor, " count"]
    ) -> tuple[Int[Tensor, "count digits+1"], Int[Tensor, "count longest"]]:
        """Return the prompts and the clean targets of numbers."""
        powers = 10 ** torch.arange(self.digits - 1, -1, -1)
        prompts = _ended(numbers[:, None] // powers % 10 + 1, _NUMBER_SEPARATOR)
        targets = torch.full((len(numbers), self.longest), self.end)
        for row, number in enumerate(numbers.tolist()):
            codes = [_FIRST_CHARACTER + _CHARACTERS.index(character) for character in spell(number)]
            targets[row, : len(codes)] = torch.tensor(codes)
        return prompts, targets

    def decode(self, target: Int[Tensor, " time"]) -> str:
        """Return the characters of one target."""
        codes = [code - _FIRST_CHARACTER for code in target.tolist()]
        return "".join(_CHARACTERS[code] for code in codes if code >= 0)

    def damage(self, targets: Int[Tensor, "count time"], generator: torch.Generator) -> Int[Tensor, "count time"]:
        """Empty some targets, and replace some characters of the others."""
        is_noise = (torch.rand(targets.shape, generator=generator) < self.noise) & (targets != self.end)
        noise = torch.randint(_FIRST_CHARACTER, self.num_tokens, targets.shape, generator=generator)
        is_empty = torch.rand(len(targets), 1, generator=generator) < self.empty
        return torch.where(is_noise, noise, targets).masked_fill(is_empty, self.end)


@functools.cache
def _longest(digits: int) -> int:
    """Characters of the longest number of at most so many digits."""
    below_thousand = max(len(spell(number)) for number in range(10 ** min(digits, 3)))
    return below_thousand + (len(" thousand ") + _longest(digits - 3) if digits > 3 else 0)


def _ended(tokens: Tensor, separator: int) -> Tensor:
    return torch.cat([tokens, torch.full_like(tokens[:, :1], separator)], dim=1)


def _check(length: int, **probabilities: float) -> None:
    if length < 1:
        raise ValueError(f"an input has at least one digit, got {length}")
    for name, value in probabilities.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is a probability, got {value}")
