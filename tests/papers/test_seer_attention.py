"""The experiments of SeerAttention, in small."""

import dataclasses

import pytest
import torch

import postern.papers.seer_attention as paper
from postern.claims import Run

TINY = paper.Copying((32, 64), 2, 2, 20, budgets=(2, 3, 8), width=16)


def test_what_keeps_everything_scores_as_dense_attention():
    trained = paper._CopyingModel(TINY, Run(seed=0, scale="smoke"))
    dense = trained.score(64)
    assert dense.density == 1
    for rule in ({"top_k": 8}, {"threshold": 0.0}):
        kept = trained.score(64, **rule)
        assert kept.density == pytest.approx(1)
        assert kept.accuracy == pytest.approx(dense.accuracy)
        assert kept.loss == pytest.approx(dense.loss, rel=1e-5)
    fewer = trained.score(64, top_k=2)
    assert fewer.density == pytest.approx(15 / 36)
    assert fewer.loss != pytest.approx(dense.loss, rel=1e-5)


@pytest.mark.parametrize("keeps_diagonal", [True, False])
def test_all_arms_keep_equally_many_blocks(keeps_diagonal):
    config = dataclasses.replace(TINY, keeps_diagonal=keeps_diagonal)
    trained = paper._CopyingModel(config, Run(seed=0, scale="smoke"))
    densities = {arm: trained.score(64, scorer, top_k=3).density for arm, scorer in paper.ARMS.items()}
    assert list(densities.values()) == pytest.approx([21 / 36] * len(paper.ARMS))


def test_metrics_of_the_comparison():
    metrics = paper._compare_scorers(TINY, Run(seed=0, scale="smoke"))
    assert metrics["accuracy_heuristic_k2"] == max(metrics[f"accuracy_{arm}_k2"] for arm in paper.HEURISTICS)
    assert metrics["loss_heuristic_k3"] == min(metrics[f"loss_{arm}_k3"] for arm in paper.HEURISTICS)
    assert {"gate", "oracle"}.isdisjoint(paper.HEURISTICS)
    assert metrics["accuracy_gate_k8"] == metrics["accuracy_dense"]


def test_the_full_recipe_runs_in_small():
    full = paper.PAPER.claims["beats-heuristics-beside-the-own-block"].scales["full"]
    config = dataclasses.replace(full, steps=1, gate_steps=1, sequences=2, batch=2, width=64, budgets=(2, 3))
    metrics = paper._compare_scorers(config, Run(seed=0, scale="full"))
    assert metrics["loss_dense"] == pytest.approx(torch.tensor(config.num_tokens).log().item(), rel=0.2)
