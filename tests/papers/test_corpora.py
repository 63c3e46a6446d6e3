"""How the experiments with small language models read their texts."""

import pytest
import torch

from postern.data import load
from postern.papers._corpora import pieces, read_corpus


def test_characters_are_numbered_alike_in_all_parts():
    corpus = read_corpus("python-stdlib", 3000, has_test=True)
    parts = [corpus.train, corpus.validation, corpus.test]
    assert [len(part) for part in parts] == [3000] * 3
    assert torch.equal(torch.cat(parts).unique(), torch.arange(corpus.num_tokens))
    assert read_corpus("python-stdlib", 3000).test is None
    text = load("python-stdlib", "train", 3000).text
    assert torch.equal(corpus.train == corpus.train[0], torch.tensor([each == text[0] for each in text]))


def test_byte_pairs_are_learnt_from_the_training_part_and_shared():
    pytest.importorskip("tokenizers")
    corpus = read_corpus("python-stdlib", 20_000, 280, has_test=True)
    assert corpus.num_tokens == 280
    for part in (corpus.train, corpus.validation, corpus.test):
        assert int(part.max()) < 280
        assert len(part) < 20_000


def test_pieces_are_the_text_cut_after_lines():
    text = "".join(f"line {index}\n" for index in range(500)) + "the end"
    found = list(pieces(text, 100))
    assert "".join(found) == text
    assert len(found) > 30
    assert all(piece.endswith("\n") and len(piece) <= 110 for piece in found[:-1])
