"""Papers and claims: registration refuses what could never be judged, and a measurement depends on its seed alone."""

import random
from dataclasses import dataclass
from datetime import date

import numpy as np
import pytest
import torch

from postern.claims import AtLeast, Claim, Difference, Metrics, Paper, Run, Unavailable

SCALES = {"smoke": None, "small": None}


def paper(**changes) -> Paper:
    record = {"slug": "a-paper", "title": "A Paper", "date": date(2020, 1, 1), "arxiv": None, "authors": 1}
    return Paper(**record | {"family": "softmax", "summary": "What it is about."} | changes)


def register(record: Paper, experiment=None, **changes) -> Claim:
    def gives_one(config: None, run: Run) -> Metrics:
        return {"value": 1.0}

    terms = {"reported": "-", "holds_when": AtLeast("value", 0.0), "scales": SCALES, "seeds": 3}
    record.claim("It is so.", **terms | changes)(experiment or gives_one)
    return list(record.claims.values())[-1]


def test_a_claim_is_named_after_its_experiment() -> None:
    record = paper()
    assert record.is_planned
    claim = register(record)
    assert not record.is_planned
    assert record.claims == {"gives-one": claim}
    assert claim.key == "a-paper/gives-one"
    assert (claim.seeds_at("smoke"), claim.seeds_at("small"), claim.seeds_at("full")) == (1, 3, 3)
    assert claim.gpu == ("full",)
    assert not claim.exclusive


def test_the_decorator_leaves_the_experiment_callable() -> None:
    record = paper()

    @record.claim("It is so.", reported="-", holds_when=AtLeast("x", 0), scales=SCALES, seeds=2)
    def experiment(config: None, run: Run) -> Metrics:
        return {"x": 4.0}

    assert experiment(None, Run(0, "smoke")) == {"x": 4.0}
    assert record.claims["experiment"].experiment is experiment


def test_source_is_the_text_of_the_module() -> None:
    assert "test_source_is_the_text_of_the_module" in register(paper()).source()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"slug": "A paper"}, "lower-case words"),
        ({"slug": "a--paper"}, "lower-case words"),
        ({"summary": "  "}, "needs a summary"),
    ],
)
def test_a_paper_without_name_or_summary_is_refused(changes: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        paper(**changes)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"scales": {"smoke": None}}, "at least the scales smoke and small"),
        ({"scales": SCALES | {"huge": None}}, "unknown scale 'huge'"),
        ({"gpu": ("big",)}, "unknown scale 'big'"),
        ({"seeds": 1}, "at least two seeds, got 1"),
    ],
)
def test_a_claim_that_cannot_be_judged_is_refused(changes: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        register(paper(), **changes)


def test_two_claims_of_one_name_are_refused() -> None:
    record = paper()
    register(record)
    with pytest.raises(ValueError, match="two claims named 'gives-one'"):
        register(record)


def draws(config: None, run: Run) -> Metrics:
    return {
        "value": torch.randn((), generator=run.generator()).item(),
        "numpy": run.rng().normal(),
        "global torch": torch.randn(()).item(),
        "global numpy": np.random.normal(),  # noqa: NPY002 - this is what is tested
        "global python": random.random(),
    }


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others() -> None:
    claim = register(paper(), draws)
    first = claim.measure("smoke", seed=7).metrics
    again = claim.measure("smoke", seed=7).metrics
    other = claim.measure("smoke", seed=8).metrics
    assert first == again
    assert all(first[name] != other[name] for name in first)


def test_an_experiment_gets_its_configuration_and_what_it_may_use() -> None:
    @dataclass(frozen=True)
    class Sizes:
        count: int

    def experiment(config: Sizes, run: Run) -> Metrics:
        counted = list(run.progress(range(config.count), "counting"))
        run.log(1, loss=0.5)
        run.table("rows", [{"a": 1}])
        is_small = int(run.scale == "small")
        return {"value": len(counted), "threads": run.threads, "seed": run.seed, "small": is_small}

    claim = register(paper(), experiment, scales={"smoke": Sizes(2), "small": Sizes(5)})
    heard: list[tuple[str, int, int | None]] = []
    measured = claim.measure("small", 3, threads=1, on_progress=lambda *news: heard.append(news))
    assert measured.metrics == {"value": 5.0, "threads": 1.0, "seed": 3.0, "small": 1.0}
    assert measured.logs == ({"step": 1, "loss": 0.5},)
    assert measured.tables == {"rows": [{"a": 1}]}
    assert heard[0] == ("counting", 0, 5)
    assert heard[-1] == ("counting", 5, 5)


def test_threads_are_set_for_torch() -> None:
    def experiment(config: None, run: Run) -> Metrics:
        return {"value": torch.get_num_threads()}

    before = torch.get_num_threads()
    try:
        claim = register(paper(), experiment)
        assert claim.measure("smoke", 0, threads=2).metrics == {"value": 2.0}
        assert claim.measure("smoke", 0, threads=1).metrics == {"value": 1.0}
    finally:
        torch.set_num_threads(before)


def test_an_unknown_scale_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="no scale 'full'; it has: smoke, small"):
        register(paper()).measure("full", 0)


def test_a_metric_that_the_criterion_reads_must_be_returned() -> None:
    claim = register(paper(), holds_when=Difference("value", "baseline", at_least=0.0))
    with pytest.raises(ValueError, match="judged by baseline, which its experiment did not return; it returned: value"):
        claim.measure("smoke", 0)


def test_what_the_machine_lacks_is_told_apart_from_what_fails() -> None:
    def experiment(config: None, run: Run) -> Metrics:
        run.require(True, "never seen")
        run.require(False, "needs a thing")
        return {"value": 1.0}

    with pytest.raises(Unavailable, match="needs a thing"):
        register(paper(), experiment).measure("smoke", 0)
