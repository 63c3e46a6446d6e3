"""What an experiment sees of its run, and what it leaves behind."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from postern.claims import Run
from postern.claims.run import check_metrics


def test_generators_depend_on_seed_and_stream_alone() -> None:
    def draw(seed: int, stream: int) -> tuple[float, float]:
        run = Run(seed, "smoke")
        return torch.rand((), generator=run.generator(stream)).item(), run.rng(stream).random()

    torch.rand(5)
    assert draw(3, 0) == draw(3, 0)
    seen = [draw(seed, stream) for seed in range(20) for stream in range(20)]
    assert len({torch_draw for torch_draw, _ in seen}) == len({numpy_draw for _, numpy_draw in seen}) == len(seen)


def test_the_first_generator_can_be_asked_for_again() -> None:
    run = Run(0, "smoke")
    first = torch.rand(3, generator=run.generator())
    assert torch.equal(first, torch.rand(3, generator=run.generator()))


def test_progress_counts_what_has_been_done() -> None:
    told: list[tuple[str, int, int | None]] = []
    run = Run(0, "smoke", on_progress=lambda *news: told.append(news))
    assert list(run.progress("abc", "letters")) == ["a", "b", "c"]
    assert told == [("letters", 0, 3), ("letters", 1, 3), ("letters", 2, 3), ("letters", 3, 3)]
    told.clear()
    assert list(run.progress(iter("ab"), "letters")) == ["a", "b"]
    assert told[-1] == ("letters", 2, None)
    told.clear()
    list(run.progress(iter("ab"), "letters", total=2))
    assert told[-1] == ("letters", 2, 2)


def test_progress_needs_nobody_to_watch() -> None:
    assert list(Run(0, "smoke").progress([1, 2], "alone")) == [1, 2]


def test_log_takes_numbers_of_all_kinds_and_nothing_else() -> None:
    run = Run(0, "smoke")
    run.log(np.int64(3), a=1, b=np.float32(0.5), c=torch.tensor(2.0), d=Fraction(1, 4))
    assert run.logs == [{"step": 3, "a": 1.0, "b": 0.5, "c": 2.0, "d": 0.25}]
    with pytest.raises(ValueError, match="'a' must be a number, got 'high' of type str"):
        run.log(4, a="high")  # type: ignore[arg-type]
    assert len(run.logs) == 1


def test_figure_is_kept_as_svg_with_its_description() -> None:
    run = Run(0, "smoke")
    figure = Figure()
    figure.subplots().plot([0, 1], [0, 1])
    run.figure("line", figure, "A line that rises.")
    assert run.figures["line"].svg.startswith("<?xml")
    assert "</svg>" in run.figures["line"].svg
    assert run.figures["line"].description == "A line that rises."
    with pytest.raises(ValueError, match="'bare' needs a description"):
        run.figure("bare", figure, " ")


def test_table_keeps_plain_values() -> None:
    run = Run(0, "smoke")
    run.table("rows", [{"name": "x", "value": torch.tensor(1.5), "count": np.int64(2), "best": True, "of": (1, 2)}])
    assert run.tables["rows"] == [{"name": "x", "value": 1.5, "count": 2, "best": True, "of": "(1, 2)"}]


@pytest.mark.parametrize(
    ("rows", "told"),
    [([], "has no rows"), ([{"a": 1}, {"b": 1}], r"columns \['b'\], the first has \['a'\]")],
)
def test_table_refuses_rows_that_make_none(rows: list, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Run(0, "smoke").table("rows", rows)


def test_metrics_of_all_number_types_become_floats() -> None:
    returned = {"a": 1, "b": np.float32(0.5), "c": torch.tensor([2.0]), "d": Fraction(1, 2)}
    metrics = check_metrics(returned)
    assert metrics == {"a": 1.0, "b": 0.5, "c": 2.0, "d": 0.5}
    assert {type(value) for value in metrics.values()} == {float}


@pytest.mark.parametrize(
    ("returned", "told"),
    [
        (None, "mapping of metric names to numbers, got NoneType"),
        ([1.0], "got list"),
        ({}, "at least one metric"),
        ({1: 1.0}, "metric names are strings, got 1"),
        ({"a": math.nan}, "'a' is nan: the experiment diverged"),
        ({"a": -math.inf}, "'a' is -inf"),
        ({"a": True}, "'a' must be a number, got True of type bool"),
        ({"a": np.bool_(True)}, "must be a number"),
        ({"a": "high"}, "got 'high' of type str"),
        ({"a": torch.ones(2)}, "must be a number, got tensor"),
        ({"a": 1j}, "must be a number"),
        ({"a": None}, "must be a number, got None"),
    ],
)
def test_metrics_that_are_no_finite_numbers_are_refused(returned: object, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        check_metrics(returned)
