"""Scoring, choosing and counting, on which the verdicts rest."""

from dataclasses import replace

import pytest
import torch

from postern.claims import Run
from postern.dynamics import InContextRegression
from postern.papers import in_context_linear_regression as paper

RUN = Run(seed=0, scale="smoke")
CONFIG = replace(paper._SMOKE, models=3, test_prompts=3000)


def test_scores_are_mean_squared_errors_on_the_same_prompts():
    task = paper._isotropic(CONFIG)
    model = paper._learner(CONFIG, 2, RUN)
    rivals = {"model": paper._predict(model), "again": paper._predict(model), "zero": lambda p: 1e-9 * p.labels[:, 0]}
    scores = paper._test(rivals, task, 10, 6001, RUN)
    assert torch.equal(scores["model"].error, scores["again"].error)
    assert scores["model"].error.shape == (3,)
    # the prompts of one call come from one generator, in parts
    generator = RUN.generator(10_003)
    parts = [task.sample(count, 10, generator=generator) for count in (5000, 1001)]
    with torch.no_grad():
        output = torch.cat([model(part.examples, part.query) for part in parts], 1).double()
    target = torch.cat([part.target for part in parts]).double()
    torch.testing.assert_close(scores["model"].error, (output - target).square().mean((1, 2)))
    assert scores["zero"].error.item() == pytest.approx(target.square().mean().item(), rel=1e-6)
    for index in range(3):
        scale = torch.linalg.lstsq(output[index], target).solution
        expected = (scale * output[index] - target).square().mean()
        torch.testing.assert_close(scores["model"].rescaled[index], expected)


def test_errors_of_several_outputs_are_averaged():
    task = InContextRegression(4, tasks=[range(4), range(4)])
    score = paper._test({"": lambda p: 1e-9 * p.labels[:, 0]}, task, 10, 20_000, RUN)[""]
    assert score.error.item() == pytest.approx(1.1, rel=0.03)


def test_the_model_that_is_best_on_validation_prompts_is_chosen():
    task = paper._isotropic(CONFIG)
    model = paper._learner(CONFIG, 2, RUN, init="opposite")
    with torch.no_grad():
        model.output[1].zero_()
        model.output[0].fill_(50)
        model.output[2].fill_(-50)
    assert paper._best(model, task, CONFIG, RUN) == 1


def test_arms_of_one_seed_see_the_same_prompts_and_other_starts_per_model():
    task = paper._isotropic(CONFIG)
    first, second = (paper._train(paper._learner(CONFIG, 2, RUN), task, CONFIG, RUN, "") for _ in range(2))
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
        assert not torch.equal(one[0], one[1])


def test_own_task_share_and_even_split():
    mass = torch.tensor([[[1.0, 0], [3, 1], [0, 2], [0, 3]], [[1.0, 0], [3, 1], [2, 0], [0, 3]]])
    share, evenly = paper._own_task(mass)
    torch.testing.assert_close(share, torch.tensor([0.9, 0.9]))
    assert evenly.tolist() == [True, False]


def test_the_two_tasks_overlap_as_in_the_paper():
    task = paper._TWO_TASKS["small"].task()
    assert (task.dim, task.num_outputs, task.is_query_noisy) == (6, 2, False)
    assert task.noise_variance == pytest.approx(0.4)
    prompts = task.sample(20_000, 1, generator=RUN.generator())
    assert prompts.labels.var().item() == pytest.approx(4.4, rel=0.05)
    assert prompts.target.var().item() == pytest.approx(4, rel=0.05)


def test_the_theory_is_tabulated_beside_the_papers_numbers():
    found = paper._repeat_table(paper.Theory(20_000), InContextRegression(5), RUN)
    assert found < 0.05
    assert [row["examples"] for row in RUN.tables["the paper's table"]] == [10, 20, 40, 60, 100]
