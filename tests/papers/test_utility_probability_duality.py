"""Judging samples, following rows in the cache, holding numbers out; and the full recipe in small."""

import dataclasses

import pytest
import torch

import postern.papers.utility_probability_duality as paper
from postern.claims import Run
from postern.data import ReversedDigits, SpelledNumbers
from postern.heads import PowerTransform, beam_search
from postern.nets import LanguageModel

TINY = paper.Transformer(4, width=16, layers=1, heads=2, feedforward_dim=16, batch_size=8)


def test_quality_of_samples():
    task = ReversedDigits(length=2)
    sources = torch.tensor([[5, 1], [7, 8]])  # reversed: 1 with a synonym, then 5; 8 and 7 without
    samples = torch.tensor([[[11, 15], [18, 17]], [[21, 15], [18, 17]], [[11, 16], [18, 10]]])
    quality = paper._quality(task, sources, samples)
    assert quality.valid == pytest.approx(4 / 6)
    # three valid tokens could be synonyms, one is; of the first source's three pairs all differ
    assert quality.synonyms == pytest.approx(1 / 3)
    assert quality.differ == 1.0
    assert paper._quality(task, sources, samples[:1].expand(3, -1, -1)).differ == 0.0


def test_clean_samples_are_judged_as_what_they_are():
    task = ReversedDigits()
    generator = torch.Generator().manual_seed(0)
    sources = task.draw_sources(3000, generator)
    quality = paper._quality(task, sources, torch.stack([task.draw_targets(sources, generator) for _ in range(4)]))
    assert quality.valid == 1.0
    assert quality.synonyms == pytest.approx(0.3, abs=0.01)
    # two tokens with synonyms agree with probability 0.58; given at least one digit of six that has a synonym
    expected = (1 - (0.6 + 0.4 * 0.58) ** 6) / (1 - 0.6**6)
    assert quality.differ == pytest.approx(expected, abs=0.01)
    experiment = paper._Experiment(paper.Transduction(TINY, validation=3000), Run(seed=0, scale="smoke"))
    assert experiment.validation.clean.differ == pytest.approx(expected, abs=0.01)
    assert experiment.validation.clean.synonyms == 0.3


def test_the_cache_follows_its_rows():
    torch.manual_seed(0)
    model = LanguageModel(6, 8, 2, 2, context=10, initial_std=0.5).double().eval()
    prompts = torch.randint(6, (4, 3))
    cached, plain = (
        beam_search(next_logits, prompts, 6, num_beams=3, num_results=3, end=0)
        for next_logits in (paper._Cached(model), lambda prefixes, _: model(prefixes)[:, -1])
    )
    assert torch.equal(cached.tokens, plain.tokens)


def test_the_tuner_keeps_what_it_saw_and_finds_the_nearest_diversity():
    experiment = paper._Experiment(paper.Transduction(TINY, validation=12, test=12), Run(seed=0, scale="smoke"))
    tuner = paper._Tuner(experiment, experiment.train(0.0, "training"))
    fitted = tuner.fit("power", PowerTransform())
    assert list(tuner.curves["power"]) == pytest.approx(PowerTransform.grid)
    clean = experiment.validation.clean
    scores = {value: q.valid - abs(q.synonyms - clean.synonyms) for value, q in tuner.curves["power"].items()}
    assert scores[fitted.value] == max(scores.values())

    seen = list(tuner.curves["power"])
    matched = tuner.match("power", fitted)
    assert len(tuner.curves["power"]) == len(seen) + 8
    distances = {value: abs(q.differ - clean.differ) for value, q in tuner.curves["power"].items()}
    assert distances[matched.value] == min(distances.values())


def test_numbers_to_test_on_are_never_learnt_from():
    config = paper.NumberWords(TINY, validation=50, test=70)
    experiment = paper._NumberExperiment(config, Run(seed=3, scale="smoke"))
    parts = [set(part.tolist()) for part in (experiment.train, experiment.validation, experiment.test)]
    assert [len(part) for part in parts] == [880, 50, 70]
    assert set.union(*parts) == set(range(1000))


def test_training_ignores_what_follows_the_end():
    task = SpelledNumbers(2)
    _, targets = task.encode(torch.tensor([1, 77]))
    counted = paper._counted(targets, task.end)
    assert counted.sum(1).tolist() == [len("one") + 1, len("seventy-seven") + 1]


@pytest.mark.parametrize(
    "name",
    ["sampling-gains-double-digits-in-reconstruction", "transformed-beams-withstand-damaged-targets-in-reconstruction"],
)
def test_the_full_recipe_runs_in_small(name):
    claim = paper.PAPER.claims[name]
    full = claim.scales["full"]
    assert full.transformer.width == 512
    task = dataclasses.replace(full.task, length=8) if isinstance(full.task, ReversedDigits) else full.task
    config = dataclasses.replace(full, transformer=TINY, task=task, validation=10, test=10)
    run = Run(seed=0, scale="full")
    metrics = claim.experiment(config, run)
    assert claim.holds_when.metrics() <= metrics.keys()
    assert run.tables
    assert run.figures
