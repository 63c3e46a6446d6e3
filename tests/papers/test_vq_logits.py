"""The parts of the codebook experiments that could be wrong without anyone noticing."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from postern.claims import Run
from postern.data import Text
from postern.heads import AdaptiveSoftmaxHead, LowRankHead, SoftmaxHead, VQLogitsHead, unigram_bias
from postern.papers import vq_logits
from postern.papers.vq_logits import WordModel, _adaptive_shape, _bytes, _encode, _FourGram, _load, _right, _Study

TEXTS = {"train": "a b a c\na b d\n", "validation": "a b e\nc a <unk>\n", "test": "b b\n"}
TINY = WordModel("ptb", "train", None, None, width=8, steps=6, more_steps=4, embedding=8, inner=8, context=4, looks=2)


@pytest.fixture
def texts(monkeypatch):
    monkeypatch.setattr(vq_logits, "load", lambda corpus, split, limit: Text(TEXTS[split]))


def test_words_are_numbered_by_frequency_and_the_unknown_is_one(texts):
    corpus = _load(TINY)
    # a 3, then b 2 and <eos> 2, then c and d, then <unk>, which the training text does not have
    assert corpus.counts.tolist() == [3, 2, 2, 1, 1, 0]
    assert corpus.counts.sum() == len(corpus.train) == 9
    assert torch.cat([corpus.validation, corpus.test]).tolist() == [0, 1, 5, 2, 3, 0, 5, 2]
    assert len(corpus.validation) == len(corpus.test) == 4


def test_a_limited_vocabulary_keeps_the_frequent_words_and_the_unknown(texts):
    corpus = _load(WordModel("ptb", "train", "test", 4, width=8, steps=1, more_steps=1))
    assert corpus.counts.tolist() == [3, 2, 2, 2]
    assert corpus.test.tolist() == [1, 1, 2]


def test_encoding_is_line_by_line():
    index = {"<unk>": 0, "x": 1, "<eos>": 2}
    assert _encode("x y\n\nx", index).tolist() == [1, 0, 2, 2, 1, 2]


def test_the_four_gram_sees_four_words_and_none_to_come():
    network = _FourGram(20, 8, 16, 8).double()
    tokens = torch.randint(20, (1, 9))
    hidden = network(tokens)
    for changed in range(9):
        other = tokens.clone()
        other[0, changed] = (other[0, changed] + 1) % 20
        differs = (network(other) - hidden).abs().amax(-1)[0] > 1e-12
        assert differs.tolist() == [changed <= position < changed + 4 for position in range(9)]


def test_a_tie_of_n_counts_one_in_n():
    mapping = torch.tensor([0, 0, 0, 1])
    head = VQLogitsHead(2, 4, 2, mapping, bias=False)
    with torch.no_grad():
        head.codebook.weight.copy_(torch.tensor([[1.0, 0], [0, 1]]))
    hidden = torch.eye(2)[None]
    assert _right(head, hidden, torch.tensor([[1, 3]])) == pytest.approx(1 / 3 + 1)
    assert _right(head, hidden, torch.tensor([[3, 2]])) == 0
    biased = VQLogitsHead(2, 4, 2, mapping, token_bias=unigram_bias(torch.tensor([1, 5, 2, 9]), mapping), bias=False)
    biased.codebook.load_state_dict(head.codebook.state_dict())
    assert _right(biased, hidden, torch.tensor([[1, 3]])) == 2
    assert _right(biased, hidden, torch.tensor([[2, 3]])) == 1


@pytest.mark.parametrize(("words", "width", "codes"), [(6049, 64, 378), (50_257, 768, 3141), (600, 16, 37)])
def test_rivals_take_no_more_bytes_and_nearly_as_many(words, width, codes):
    counts = 1e6 / torch.arange(1, words + 1)
    mapping = torch.arange(words) % codes
    budget = _bytes(VQLogitsHead(width, words, codes, mapping, token_bias=unigram_bias(counts, mapping)))
    cutoff, divisor = _adaptive_shape(budget // 4, words, width)
    adaptive = _bytes(AdaptiveSoftmaxHead(width, counts, (cutoff,), divisor))
    assert 0.97 * budget < adaptive <= budget
    rank = (budget // 4 - words) // (width + words)
    assert _bytes(LowRankHead(width, words, rank)) <= budget < _bytes(LowRankHead(width, words, rank + 1))


@pytest.mark.parametrize("layers", [0, 1])
def test_the_study_judges_by_the_test_text_and_the_projection_is_a_tied_model(texts, monkeypatch, layers):
    monkeypatch.setitem(TEXTS, "train", TEXTS["train"] * 20)
    monkeypatch.setitem(TEXTS, "validation", TEXTS["validation"] * 20)
    study = _Study(replace(TINY, layers=layers, heads=2), Run(seed=0, scale="smoke"))
    loss = study._loss(study.trunk, study.head, study.corpus.test)
    accuracy = study._accuracy(study.trunk, study.head, study.corpus.test)
    tokens = study.corpus.test[: len(study.corpus.test) - (len(study.corpus.test) - 1) % 4]
    windows = tokens.unfold(0, 5, 4)
    hidden = study.trunk(windows[:, :-1])
    logits = study.head.logits(hidden).flatten(0, 1)
    target = windows[:, 1:].flatten()
    assert loss == pytest.approx(F.cross_entropy(logits, target).item(), rel=1e-5)
    assert accuracy == pytest.approx((logits.argmax(-1) == target).double().mean().item())

    head = study.compressed(2)
    probabilities = logits.softmax(-1)
    same = head.mapping[:, None] == head.mapping
    tied = (probabilities @ same.float()) / same.sum(0)
    assert study.projected(head, study.corpus.test) == pytest.approx(F.nll_loss(tied.log(), target).item(), rel=1e-4)
    result = study.kmeans(2)
    assert result.floor is not None
    assert math.exp(result.loss) >= math.exp(result.floor)
    assert study.dense().loss <= loss + 0.05
    assert isinstance(study.head, SoftmaxHead)
