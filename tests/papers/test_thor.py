"""What the claims of THOR rest on: batches, losses, and as many passes for each arm."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from postern.claims import Run
from postern.experts import ensemble_log_probs, expert_draws
from postern.papers import thor

CONFIG = replace(thor._SMOKE, passes=8, pairs=70, validation=20, test=20)


@pytest.fixture(scope="module")
def run():
    return Run(seed=0, scale="smoke")


@pytest.fixture(scope="module")
def corpus(run):
    return thor._Corpus(CONFIG, run)


def test_each_round_of_batches_has_every_pair_once(corpus, run):
    batches = thor._batches(corpus.train, 32, run.generator(), run.device)
    pairs = corpus.train
    for _ in range(2):
        seen = []
        for _ in range(3):
            source, target = next(batches)
            assert (source != 0).any(0).all()
            assert (target != 0).any(0).all()
            padding = F.pad(source, (0, 20 - source.shape[1])), F.pad(target, (0, 21 - target.shape[1]))
            seen.append(torch.cat(padding, dim=1))
        found = sorted(map(tuple, torch.cat(seen).tolist()))
        assert found == sorted(map(tuple, torch.cat([pairs.source, pairs.target], dim=1).tolist()))


@pytest.mark.parametrize(("arm", "steps"), [("dense", 8), ("switch", 8), ("thor", 4), ("rdrop", 4)])
def test_arms_take_as_many_passes_and_keep_the_best_of_their_models(arm, steps, corpus, run):
    labels = []

    class Counting(Run):
        def progress(self, iterable, label, total=None):
            labels.append((label, len(iterable)))
            return iter(iterable)

    found = thor._train(CONFIG, arm, corpus, Counting(seed=0, scale="smoke"), alpha=1.0, balance=0.01)
    ((_, counted),) = labels
    assert counted == steps
    assert list(found.curve) == [4, 8]
    assert found.validation == min(found.curve.values())


def test_losses_are_means_over_tokens(corpus, run):
    torch.manual_seed(0)
    model = thor._build(CONFIG, "thor", corpus.languages, 0.0, 0)
    pairs = corpus.test
    wanted = pairs.target[:, 1:]
    with torch.no_grad(), expert_draws(model.eval(), expert=1):
        log_probs = model(pairs.source, pairs.target[:, :-1]).log_softmax(-1)
        expected = -log_probs.gather(-1, wanted[..., None])[..., 0][wanted != 0].mean().item()
        assert thor._loss(model, pairs, run) == pytest.approx(expected, rel=1e-4)
    log_probs = ensemble_log_probs(model, (pairs.source, pairs.target[:, :-1]))
    expected = -log_probs.gather(-1, wanted[..., None])[..., 0][wanted != 0].mean().item()
    assert thor._loss(model, pairs, run, is_ensemble=True) == pytest.approx(expected, rel=1e-4)


def test_experts_are_in_every_second_layer_and_as_wide_as_a_dense_block():
    config = replace(CONFIG, layers=3)
    languages = thor._Corpus(CONFIG, Run(seed=0, scale="smoke")).languages
    model = thor._build(config, "switch", languages, 0.01, 0)
    names = {name.rsplit(".", 2)[0] for name, _ in model.named_parameters() if ".experts." in name}
    assert names == {f"{stack}.{layer}.feedforward" for stack in ("encoder", "decoder") for layer in (0, 2)}
    bank = model.encoder[0].feedforward.experts
    assert bank.expand.shape == (config.experts, config.width, model.encoder[1].feedforward[0].out_features)
