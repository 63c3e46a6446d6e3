"""The task of a head that must add nothing, and the parts of the full-scale recipe that small runs leave out."""

import dataclasses
import math

import pytest
import torch

import postern.papers.quantizable_transformers as paper
from postern.claims import Run
from postern.papers._corpora import read_corpus


def drawn(*, blank):
    config = paper.IdleHead(1)
    generator = torch.Generator().manual_seed(0)
    keys = torch.nn.functional.normalize(torch.randn(config.tokens, 8, generator=generator), dim=1)
    return paper._sequences(config, 200, keys, generator, blank=blank)


@pytest.mark.parametrize("blank", [False, True])
def test_active_tokens_want_the_content_behind_the_key_that_they_name(blank):
    sequences = drawn(blank=blank)
    content, key, wanted, shown, first = sequences.tokens.split([8, 8, 8, 1, 1], dim=-1)
    assert torch.equal(shown[..., 0].bool(), sequences.active)
    assert 0.13 < sequences.active.float().mean() < 0.17
    matches = (wanted[:, :, None] == key[:, None]).all(-1)[sequences.active]
    assert (matches.sum(-1) == 1).all()
    rows = torch.arange(200)[:, None].expand_as(sequences.active)[sequences.active]
    torch.testing.assert_close(sequences.target[sequences.active], content[rows, matches.int().argmax(-1)])
    assert (sequences.target[~sequences.active] == 0).all()
    assert (wanted[~sequences.active] == 0).all()
    assert torch.equal(first[..., 0].nonzero()[:, 1], torch.zeros(200, dtype=torch.long))
    assert bool((content[:, 0] == 0).all()) is blank
    assert bool(sequences.active[:, 0].any()) is not blank


def test_the_full_recipe_runs_in_small():
    pytest.importorskip("tokenizers")
    config = dataclasses.replace(
        paper._FULL,
        corpus="python-stdlib",
        characters=60_000,
        vocabulary=300,
        width=16,
        layers=2,
        heads=2,
        context=16,
        batch_size=8,
        accumulation=4,
        steps=3,
        warm_up_steps=1,
        windows=8,
    )
    corpus = read_corpus(config.corpus, config.characters, config.vocabulary)
    assert corpus.num_tokens == 300
    assert len(corpus.train) < 0.8 * 60_000
    assert int(corpus.train.max()) < 300
    for arm in ("softmax", "gated", "clipped"):
        judged = paper._judge(config, corpus, arm, Run(seed=0, scale="full"))
        assert judged.loss == pytest.approx(math.log(300), rel=0.1)
        assert len(judged.per_layer) == 2
