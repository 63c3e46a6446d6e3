"""Generated translations: words for words, the verb before its subject, and a suffix that agrees with it."""

import math

import pytest
import torch

from postern.data import SyntheticLanguages

# as documented: sizes of the classes of words, in the order in which they are numbered
CLASSES = ["noun"] * 80 + ["verb"] * 50 + ["adjective"] * 40 + ["adverb"] * 14 + ["singular"] * 3 + ["plural"] * 3
CLASSES += ["preposition"] * 8 + ["conjunction"] * 2


def drawn(languages, count=500, seed=0):
    return languages.draw(count, torch.Generator().manual_seed(seed))


def words_of(languages, source):
    tokens = [token for token in source.tolist() if token != languages.pad]
    assert tokens[-1] == languages.end
    return tokens[0] - 3, [token - 3 - languages.num_languages for token in tokens[1:-1]]


def translated(languages, language, words):
    """The only translation without synonyms, clause by clause, written down anew."""
    first = 3 + languages.num_languages + 200 + language * (200 + 184 + 4)
    kinds = [CLASSES[word] for word in words]
    if "conjunction" in kinds:
        place = kinds.index("conjunction")
        parts = [words[:place], words[place + 1 :]]
        return [
            *translated(languages, language, parts[0]),
            first + words[place],
            *translated(languages, language, parts[1]),
        ]
    verb = kinds.index("verb")
    subject = kinds.index("noun")
    suffix = 2 * (kinds[0] == "plural") + languages.genders[language][words[subject]]
    return [first + words[verb], first + 384 + suffix, *(first + word for word in words[:verb] + words[verb + 1 :])]


def test_translations_follow_the_rules():
    languages = SyntheticLanguages(3, seed=5)
    pairs = drawn(languages)
    seen = set()
    for source, target in zip(pairs.source, pairs.target, strict=True):
        language, words = words_of(languages, source)
        tokens = [token for token in target.tolist() if token != languages.pad]
        assert tokens == [languages.start, *translated(languages, language, words), languages.end]
        seen.add(language)
    assert seen == {0, 1, 2}
    assert max(pairs.source.max(), pairs.target.max()) < languages.num_tokens
    assert pairs.source.shape == (500, languages.longest)
    assert pairs.target.shape == (500, languages.longest + 1)


def test_synonyms_come_as_often_as_asked_and_for_content_words_alone():
    languages = SyntheticLanguages(1, synonyms=0.25)
    pairs = drawn(languages, 2000)
    first = 3 + 1 + 200
    target = pairs.target[pairs.target >= first] - first
    assert not ((target >= 384) & (target >= 388)).any()
    content = (target < 184).sum() + ((target >= 200) & (target < 384)).sum()
    assert ((target >= 200) & (target < 384)).sum() / content == pytest.approx(0.25, abs=0.015)
    plain = SyntheticLanguages(1).draw(2000, torch.Generator().manual_seed(0))
    assert not ((plain.target - first >= 200) & (plain.target - first < 384)).any()


def test_the_least_loss_is_the_mean_entropy():
    languages = SyntheticLanguages(2, synonyms=0.25)
    pairs = drawn(languages)
    total = 0.0
    for source in pairs.source:
        _, words = words_of(languages, source)
        for word in words:
            if word < 184:
                total -= 0.25 * math.log(0.25) + 0.75 * math.log(0.75)
    count = (pairs.target != languages.pad).sum().item() - len(pairs)
    assert languages.least_loss(pairs) == pytest.approx(total / count)
    assert SyntheticLanguages(2).least_loss(pairs) == 0


def test_frequent_words_are_frequent():
    languages = SyntheticLanguages(1)
    words = [word for source in drawn(languages, 3000).source for word in words_of(languages, source)[1]]
    counts = torch.bincount(torch.tensor(words), minlength=200).double()
    nouns, verbs = counts[:80], counts[80:130]
    expected = 1 / torch.arange(1, 81)
    torch.testing.assert_close(nouns[:5] / nouns.sum(), (expected / expected.sum()).double()[:5], rtol=0.1, atol=0)
    assert verbs[0] > 3 * verbs[9]


def test_draws_can_be_repeated_and_genders_hang_on_the_seed():
    languages = SyntheticLanguages(2, synonyms=0.2)
    assert torch.equal(drawn(languages, 50, seed=1).target, drawn(languages, 50, seed=1).target)
    assert not torch.equal(drawn(languages, 50, seed=1).target, drawn(languages, 50, seed=2).target)
    assert SyntheticLanguages(2, seed=1).genders != SyntheticLanguages(2, seed=2).genders
    assert 10 < sum(languages.genders[0]) < 70


@pytest.mark.parametrize(
    ("call", "seen"),
    [
        (lambda: SyntheticLanguages(0), "got 0"),
        (lambda: SyntheticLanguages(synonyms=1.5), "a probability, got 1.5"),
        (lambda: SyntheticLanguages().draw(0, torch.Generator()), "got 0"),
    ],
)
def test_refuses_what_cannot_be(call, seen):
    with pytest.raises(ValueError, match=seen):
        call()
