"""Languages to translate into, generated: a lexicon each, another order of words, and verbs that agree with subjects.

A small stand-in for translation corpora, single or multilingual: as there, rare words are seen a few times, endings
hang on words that stand elsewhere, and one sentence has several good translations.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from jaxtyping import Int
from torch import Tensor

# Words of a class are numbered by how frequent they are.
_SIZES = {
    "noun": 80,
    "verb": 50,
    "adjective": 40,
    "adverb": 14,
    "singular": 3,
    "plural": 3,
    "preposition": 8,
    "conjunction": 2,
}
_STARTS = dict(zip(_SIZES, itertools.accumulate(_SIZES.values(), initial=0), strict=False))
_WORDS = sum(_SIZES.values())
_CONTENT = sum(_SIZES[kind] for kind in ("noun", "verb", "adjective", "adverb"))  # words that have synonyms
_SUFFIXES = 4  # two numbers of two genders
_CUMULATIVE = {
    kind: list(itertools.accumulate(1 / (rank + 1) for rank in range(size))) for kind, size in _SIZES.items()
}


@dataclass(frozen=True)
class TranslationPairs:
    """Sentences and their translations, padded with 0 at the end.

    Attributes:
        source: the tag of the language to translate into, words, and the token that ends a sentence.
        target: the token that starts a sentence, words, and the one that ends it.
    """

    source: Int[Tensor, "count source_time"]
    target: Int[Tensor, "count target_time"]

    def __len__(self) -> int:
        return len(self.source)


@dataclass(frozen=True)
class SyntheticLanguages:
    """Translate sentences of 200 words into languages that never were.

    A sentence is one clause, or two that a conjunction joins: a subject, perhaps an adverb, a verb, perhaps an object,
    and in a single clause perhaps a preposition with its noun. Nouns come with an article, which says their number, and
    perhaps an adjective. Words of a class are drawn with odds of one by their rank.

    In a translation each word gives way to the language's own, or to a synonym of that; the verb stands before its
    subject, and is followed by a suffix: one of four, by the number of the subject and by its gender, which each
    language has chosen for each noun.

    Token 0 fills up, 1 starts a translation, 2 ends a sentence, 3 and those after it are tags of the languages.

    Args:
        num_languages: to translate into.
        synonyms: how often a noun, verb, adjective or adverb is translated by its synonym.
        seed: of the genders.

    Raises:
        ValueError: no languages, or a probability outside [0, 1].
    """

    num_languages: int = 3
    synonyms: float = 0.0
    seed: int = 0

    pad: ClassVar[int] = 0
    start: ClassVar[int] = 1
    end: ClassVar[int] = 2
    longest: ClassVar[int] = 20  # tokens of a source or a translation, without the one that starts it

    def __post_init__(self) -> None:
        if self.num_languages < 1:
            raise ValueError(f"there is at least one language to translate into, got {self.num_languages}")
        if not 0 <= self.synonyms <= 1:
            raise ValueError(f"synonyms is a probability, got {self.synonyms}")

    @property
    def num_tokens(self) -> int:
        """Size of the vocabulary, which source and target share."""
        return self._first_of(self.num_languages)

    @cached_property
    def genders(self) -> tuple[tuple[int, ...], ...]:
        """The gender, 0 or 1, of each noun in each language."""
        chance = random.Random(self.seed)
        return tuple(tuple(chance.choices((0, 1), k=_SIZES["noun"])) for _ in range(self.num_languages))

    def draw(self, count: int, generator: torch.Generator) -> TranslationPairs:
        """Draw sentences, each with a language and a translation.

        Args:
            count: how many.
            generator: of the draws; on the CPU.

        Raises:
            ValueError: a count below 1.
        """
        if count < 1:
            raise ValueError(f"at least one pair must be drawn, got {count}")
        chance = random.Random(int(torch.randint(2**62, (), generator=generator)))
        source = torch.full((count, self.longest), self.pad)
        target = torch.full((count, self.longest + 1), self.pad)
        for row in range(count):
            language, words, translation = chance.randrange(self.num_languages), [], []
            for part in self._sentence(chance):
                words += list(itertools.chain(*part))
                translation += self._translate(part, language, chance)
            encoded = [3 + language, *(3 + self.num_languages + word for word in words), self.end]
            source[row, : len(encoded)] = torch.tensor(encoded)
            decoded = [self.start, *translation, self.end]
            target[row, : len(decoded)] = torch.tensor(decoded)
        return TranslationPairs(source, target)

    def least_loss(self, pairs: TranslationPairs) -> float:
        """Mean entropy of translations, in nats a token: what no model can fall below in the long run."""
        if self.synonyms in (0.0, 1.0):
            return 0.0
        entropy = -sum(p * math.log(p) for p in (self.synonyms, 1 - self.synonyms))
        first = 3 + self.num_languages
        is_content = (pairs.source >= first) & (pairs.source < first + _CONTENT)
        return entropy * int(is_content.sum()) / int((pairs.target[:, 1:] != self.pad).sum())

    def _first_of(self, language: int) -> int:
        """The first token of a language: its words, their synonyms, its suffixes."""
        return 3 + self.num_languages + _WORDS + language * (_WORDS + _CONTENT + _SUFFIXES)

    def _sentence(self, chance: random.Random) -> list[list[list[int]]]:
        """Clauses of subject, adverb, verb and what follows; a conjunction is a clause of itself."""
        if chance.random() < 0.25:
            return [self._clause(chance), [[_word("conjunction", chance)]], self._clause(chance)]
        clause = self._clause(chance)
        if chance.random() < 0.4:
            clause.append([_word("preposition", chance), *_noun_phrase(chance)])
        return [clause]

    def _clause(self, chance: random.Random) -> list[list[int]]:
        adverb = [_word("adverb", chance)] if chance.random() < 0.3 else []
        following = _noun_phrase(chance) if chance.random() < 0.7 else []
        return [_noun_phrase(chance), adverb, [_word("verb", chance)], following]

    def _translate(self, clause: Sequence[list[int]], language: int, chance: random.Random) -> list[int]:
        first = self._first_of(language)

        def lexicon(words: Sequence[int]) -> list[int]:
            is_synonym = [word < _CONTENT and chance.random() < self.synonyms for word in words]
            return [
                first + word + (_WORDS if is_other else 0) for word, is_other in zip(words, is_synonym, strict=True)
            ]

        if len(clause) == 1:
            return lexicon(clause[0])
        subject, adverb, verb, *following = clause
        is_plural = subject[0] >= _STARTS["plural"]
        suffix = 2 * is_plural + self.genders[language][subject[-1]]
        suffix_token = first + _WORDS + _CONTENT + suffix
        return [*lexicon(verb), suffix_token, *lexicon([*subject, *adverb, *itertools.chain(*following)])]


def _word(kind: str, chance: random.Random) -> int:
    return _STARTS[kind] + chance.choices(range(_SIZES[kind]), cum_weights=_CUMULATIVE[kind])[0]


def _noun_phrase(chance: random.Random) -> list[int]:
    article = _word(chance.choice(("singular", "plural")), chance)
    adjective = [_word("adjective", chance)] if chance.random() < 0.4 else []
    return [article, *adjective, _word("noun", chance)]
