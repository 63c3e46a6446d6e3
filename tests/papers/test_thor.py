"""What the claims of THOR rest on: batches, losses, and as many passes for each arm."""

import importlib.util
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from postern.claims import Run
from postern.experts import StochasticRouter, ensemble_log_probs, expert_draws
from postern.papers import thor

CONFIG = replace(thor._SMOKE, passes=8, pairs=70, validation=20, test=20, checks=4, trial_checks=2)


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
    counted = []

    class Counting(Run):
        def progress(self, iterable, label, total=None):
            counted.append(len(iterable))
            return iter(iterable)

    found = thor._train(CONFIG, arm, corpus, Counting(seed=0, scale="smoke"), alpha=1.0, balance=0.01)
    assert counted == [steps // 2] * 3  # both learning rates, and the rest with the better
    assert list(found.curve) == [2, 4, 6, 8]
    assert set(found.trials) == set(CONFIG.learning_rates)
    assert found.trials[found.learning_rate] == min(found.trials.values()) == min(found.curve[2], found.curve[4])


def test_the_best_learning_rate_is_trained_as_if_it_were_the_only_one_until_then(corpus, run):
    both = thor._train(CONFIG, "dense", corpus, run)
    alone = thor._train(replace(CONFIG, learning_rates=(both.learning_rate,)), "dense", corpus, run)
    assert [alone.curve[passes] for passes in (2, 4)] == [both.curve[passes] for passes in (2, 4)]
    worst = replace(CONFIG, learning_rates=(1e-9, both.learning_rate))
    assert thor._train(worst, "dense", corpus, run).learning_rate == both.learning_rate


def test_a_model_is_best_where_its_validation_loss_was_least(corpus, run, monkeypatch):
    losses = iter([4.0, 2.0, 3.0, 5.0, 1.5, 0.5])
    seen = []

    def loss(model, pairs, run):
        seen.append(model)
        return next(losses)

    monkeypatch.setattr(thor, "_loss", loss)
    found = thor._train(replace(CONFIG, learning_rates=(2e-3,)), "dense", corpus, run)
    assert found.curve == {2: 4.0, 4: 2.0, 6: 3.0, 8: 5.0}
    assert (found.test, found.test_at_half) == (1.5, 0.5)
    assert seen[-2] is seen[-1] is found.best
    assert not torch.equal(found.best.embedding.weight, found.model.embedding.weight)


def test_a_sentence_keeps_its_experts_while_it_is_translated(corpus):
    torch.manual_seed(0)
    model = thor._build(CONFIG, "thor", corpus.languages, 0.0, 0)
    source = corpus.test.source
    torch.manual_seed(1)
    found = thor._translate(model, source)
    routers = [module for module in model.modules() if isinstance(module, StochasticRouter)]
    assert all(router.expert is None for router in routers)
    torch.manual_seed(1)
    for router in routers:
        router.force(router.sample(len(source)))
    model.eval()
    assert torch.equal(found, model.translate(source, 1, 2))
    model.train()
    with expert_draws(model, expert=1):
        fixed = thor._translate(model, source)
    assert not torch.equal(fixed, found)
    assert model.training


def test_sentences_are_the_words_between_their_marks():
    assert thor._sentences(torch.tensor([[1, 7, 8, 2, 0], [1, 9, 2, 0, 0], [1, 2, 0, 0, 0]])) == ["7 8", "9", ""]


def test_bleu_is_that_of_the_translations(corpus, run, monkeypatch):
    pytest.importorskip("sacrebleu")
    torch.manual_seed(0)
    dense, drawn = (thor._build(CONFIG, arm, corpus.languages, 0.0, 0) for arm in ("dense", "thor"))
    pairs = corpus.test
    targets = {tuple(row[row != 0].tolist()): pairs.target[k] for k, row in enumerate(pairs.source)}
    worse = []

    def translate(model, source):
        found = torch.stack([targets[tuple(row[row != 0].tolist())] for row in source])
        if model is drawn:
            worse.append(len(worse))
            found[: len(worse), 1] = 3  # a wrong word more in each translation
        return found

    monkeypatch.setattr(thor, "_translate", translate)
    assert thor._bleu(dense, pairs, run, 3) == (pytest.approx(100), 0.0)
    mean, deviation = thor._bleu(drawn, pairs, run, 3)
    assert len(worse) == 3
    assert 50 < mean < 100
    assert deviation > 0
    with expert_draws(drawn, expert=0):
        thor._bleu(drawn, pairs, run, 3)
    assert len(worse) == 4


def test_the_ceiling_of_bleu_translates_the_same_sentences(corpus, run):
    plain = thor._without_synonyms(CONFIG, run)
    assert torch.equal(plain.source, corpus.test.source)
    same = plain.target == corpus.test.target
    assert 0.8 < same.float().mean() < 1


def test_without_sacrebleu_losses_are_reported_alone(corpus, run, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = thor._train(CONFIG, "dense", corpus, run)
    reporting = Run(seed=0, scale="smoke")
    assert thor._report(CONFIG, corpus, reporting, {"dense": found}, {"dense": "dense"}) == {}
    assert "BLEU" not in reporting.tables["models"][0]


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
