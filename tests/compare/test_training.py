"""Training, choosing and testing: what all members go through, with learners whose behaviour is known."""

import pytest
import torch
from torch import Tensor, nn

from postern.claims import Run
from postern.claims.comparison import Setting
from postern.compare.problems import Problem, Rows
from postern.compare.training import (
    ACCURACY,
    CROSS_ENTROPY,
    Learner,
    Step,
    evaluate,
    step_memory,
    time_steps,
    tune,
)


def halves(rows: int = 200) -> Rows:
    """Two classes, told apart by the sign of the first of two columns."""
    generator = torch.Generator().manual_seed(0)
    parts = {}
    for part in ("train", "validation", "test"):
        inputs = torch.randn(rows, 2, generator=generator)
        parts[part] = inputs, (inputs[:, 0] > 0).long()
    return Rows("table", 2, parts)


class Linear(Learner):
    def __init__(self, is_fragile: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.is_fragile = is_fragile

    def loss(self, inputs: Tensor, target: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(self.scores(inputs), target)
        return loss * torch.inf if self.is_fragile else loss

    def scores(self, inputs: Tensor) -> Tensor:
        scores: Tensor = self.linear(inputs)
        return scores

    def log_probabilities(self, scores: Tensor) -> Tensor | None:
        return torch.log_softmax(scores, -1)


class Oracle(Linear):
    """Right as often as its learning rate says on validation data, and the other way round on test data."""

    def __init__(self, problem: Rows, rate: float) -> None:
        super().__init__()
        self.problem, self.rate = problem, rate

    def scores(self, inputs: Tensor) -> Tensor:
        for part, share in (("validation", self.rate), ("test", 1 - self.rate)):
            known, target = self.problem.parts[part]
            if torch.equal(inputs, known):
                right = torch.arange(len(known)) < share * len(known)
                return nn.functional.one_hot(torch.where(right, target, 1 - target), 2).float()
        return super().scores(inputs)


def setting(*rates: float, steps: int = 100) -> Setting:
    return Setting("halves", "table", "0", None, ("one", "other"), steps, rates or (1e-2,))


def run(seed: int = 0) -> Run:
    return Run(seed=seed, scale="test")


def test_learns_what_there_is_to_learn() -> None:
    metrics = tune(lambda rate: Linear(), halves(), setting(1e-3, 1e-1), ACCURACY, run())
    assert metrics["numbers"] == 2 * 2 + 2
    assert metrics["accuracy"] > 0.95
    assert metrics["learning_rate"] == 1e-1
    assert metrics["cross_entropy"] < 0.3


@pytest.mark.parametrize("quality", [ACCURACY, CROSS_ENTROPY])
def test_the_rate_is_chosen_on_validation_data_alone(quality) -> None:
    problem = halves()
    metrics = tune(lambda rate: Oracle(problem, rate), problem, setting(0.2, 0.9, 0.5, steps=3), quality, run())
    assert metrics["learning_rate"] == 0.9
    assert metrics["accuracy"] == pytest.approx(0.1)


def test_a_rate_that_diverges_is_out() -> None:
    metrics = tune(lambda rate: Linear(is_fragile=rate > 0.05), halves(), setting(1e-2, 1e-1), ACCURACY, run())
    assert metrics["learning_rate"] == 1e-2
    with pytest.raises(ArithmeticError, match=r"diverged at every learning rate of \[0.01, 0.1\]"):
        tune(lambda rate: Linear(is_fragile=True), halves(), setting(1e-2, 1e-1), ACCURACY, run())


def test_a_seed_decides_everything() -> None:
    same = [tune(lambda rate: Linear(), halves(), setting(steps=20), ACCURACY, run(seed)) for seed in (0, 0, 1)]
    assert same[0] == same[1]
    assert same[0] != same[2]


def test_all_rates_start_alike_and_see_the_same_batches() -> None:
    started, seen = [], []

    class Watched(Linear):
        def loss(self, inputs: Tensor, target: Tensor) -> Tensor:
            seen[-1].append(inputs)
            return super().loss(inputs, target)

    def build(rate: float) -> Learner:
        learner = Watched()
        started.append(learner.linear.weight.detach().clone())
        seen.append([])
        return learner

    tune(build, halves(), setting(1e-3, 1e-2, steps=5), ACCURACY, run())
    assert torch.equal(started[0], started[1])
    assert len(seen[0]) == 5
    assert torch.equal(torch.stack(seen[0]), torch.stack(seen[1]))


def test_the_rate_warms_up_and_decays() -> None:
    step = Step(Linear(), halves(), 100, 0.5, torch.Generator())
    rates = []
    for _ in range(100):
        step()
        rates.append(step.optimizer.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(0.05)
    assert max(rates) == rates[10] == 0.5
    assert rates[-1] == pytest.approx(0.5 / 90)


def test_parameters_without_gradients_are_left_alone() -> None:
    learner = Linear()
    learner.linear.bias.requires_grad_(False)
    before = learner.linear.bias.clone()
    for _ in range(3):
        step = Step(learner, halves(), 10, 0.1, torch.Generator())
        step()
    assert torch.equal(learner.linear.bias, before)


def test_evaluation_counts_every_row_and_leaves_the_mode() -> None:
    problem, learner = halves(777), Linear().train()
    with torch.no_grad():
        learner.linear.weight.copy_(torch.tensor([[-5.0, 0.0], [5.0, 0.0]]))
        learner.linear.bias.zero_()
    found = evaluate(learner, problem, "test")
    inputs, target = problem.parts["test"]
    truth = nn.functional.cross_entropy(learner.scores(inputs), target)
    assert found == pytest.approx({"accuracy": 1.0, "cross_entropy": float(truth.detach())})
    assert learner.training


def test_memory_is_of_parameters_state_gradients_and_activations() -> None:
    small, large = (
        step_memory(lambda width=width: Wide(width), halves(), run())  # type: ignore[misc]
        for width in (1000, 2000)
    )
    # Parameters, gradients and Adam's two averages have 4 numbers a unit each; 64 rows of activations come on top.
    assert small > 4 * 4 * 4 * 1000
    assert 1.8 < large / small < 2.05
    assert small == step_memory(lambda: Wide(1000), halves(), run())


class Wide(Linear):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Sequential(nn.Linear(2, width, bias=False), nn.Linear(width, 2, bias=False))  # type: ignore


def test_steps_are_timed_by_turns() -> None:
    order: list[str] = []

    def builder(name: str):
        class Noted(Linear):
            def loss(self, inputs: Tensor, target: Tensor) -> Tensor:
                order.append(name)
                return super().loss(inputs, target)

        return lambda rate: Noted()

    problem: Problem = halves()
    times = time_steps({"one": builder("one"), "other": builder("other")}, problem, setting(), run())
    assert set(times) == {"one", "other"}
    assert all(0 < ms < 1000 for ms in times.values())
    assert order[-6:] == ["one", "other"] * 3
