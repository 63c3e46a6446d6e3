"""What all members go through: training at every learning rate, the choice by validation, one test, time and memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from postern.claims import Metrics, Run
from postern.claims.comparison import Contest, Member, Quantity, Setting
from postern.compare.memory import TensorMemory
from postern.compare.problems import Part, Problem, problem_of
from postern.nets.evaluation import evaluating
from postern.nets.language_model import rate_at
from postern.timing import best_times

ACCURACY = Quantity("accuracy", "test accuracy, %", higher_is_better=True, scale=100.0)
NEXT_WORD = Quantity("accuracy", "next word right, %", higher_is_better=True, scale=100.0)
TOP_10 = Quantity("top10_accuracy", "next word among the first ten, %", higher_is_better=True, scale=100.0)
CROSS_ENTROPY = Quantity("cross_entropy", "test cross-entropy, nats")
SIZE = Quantity("numbers", "numbers in the model, thousands", scale=1e-3)
MEMORY = Quantity("memory_mib", "memory of a training step, MiB")

WEIGHT_DECAY = 0.01
CLIP_NORM = 1.0
_TIMED_STEPS = 20
_TIMING_S = 10.0


class Learner(nn.Module):
    """A member in its network. The shared optimiser trains those of its parameters that require gradients."""

    def loss(self, inputs: Tensor, target: Tensor) -> Tensor:
        """The member's own loss of a batch."""
        raise NotImplementedError

    def scores(self, inputs: Tensor) -> Tensor:
        """One score a class, ``[..., classes]``; the highest is the prediction."""
        raise NotImplementedError

    def log_probabilities(self, scores: Tensor) -> Tensor | None:
        """What the scores say of the probabilities, or None if the member gives none."""
        raise NotImplementedError

    def set_progress(self, share: float) -> None:
        """Adapt what changes over the budget; called before each step with the share of it that is done."""


Trained = TypeVar("Trained")
Builder = Callable[[float], Learner]  # learning rate -> untrained learner
Build = Callable[[str, Problem, float], Learner]  # member, problem, learning rate -> untrained learner
Examination = Callable[[Learner, Problem], Mapping[str, float]]
# setting, problem, run, milliseconds of a training step by member -> the other paces
Timing = Callable[[Setting, Problem, Run, Mapping[str, float]], Mapping[str, float]]


def make_contest(
    *,
    family: str,
    module: str,
    members: Sequence[Member],
    task: Mapping[str, str],
    text_quality: Quantity,
    build: Build,
    prepare: Callable[[Problem], Problem] = lambda problem: problem,
    unsuited: Callable[[Problem], Mapping[str, str]] = lambda problem: {},
    examined: Sequence[Quantity] = (),
    examine: Examination = lambda learner, problem: {},
    paces: Mapping[str, str] | None = None,
    time_more: Timing = lambda setting, problem, run, steps: {},
) -> Contest:
    """A contest whose members are trained and timed as all are, judged by accuracy except on texts.

    Args:
        family: the family.
        module: the calling module.
        members: who can take part, the baseline first.
        task: see `Contest`; data of a kind that it lacks is refused.
        text_quality: what decides on texts.
        build: makes a member's untrained network.
        prepare: turns the data's problem into what the networks take.
        unsuited: see `Contest`.
        examined: what else is looked at in a trained network.
        examine: measures it where a member has it.
        paces: what is timed besides the training step; see `Contest`.
        time_more: times it, and draws and tabulates what else there is to see of all members.
    """
    on_texts = (NEXT_WORD, TOP_10, CROSS_ENTROPY)
    quality = {kind: text_quality if kind == "text" else ACCURACY for kind in task}
    shown = {
        "text": tuple(each for each in on_texts if each != text_quality),
        "table": (CROSS_ENTROPY,),
        "images": (CROSS_ENTROPY,),
    }

    def trial(name: str, setting: Setting, run: Run) -> Metrics:
        problem = prepare(problem_of(setting))
        return tune(partial(build, name, problem), problem, setting, quality[setting.kind], run, examine)

    def time(setting: Setting, run: Run) -> Metrics:
        problem = prepare(problem_of(setting))
        steps = time_steps({name: partial(build, name, problem) for name in setting.members}, problem, setting, run)
        return {**steps, **time_more(setting, problem, run, steps)}

    return Contest(
        family=family,
        module=module,
        members=tuple(members),
        task=task,
        quality=quality,
        costs=(*examined, SIZE, MEMORY),
        train=trial,
        time=time,
        unsuited=lambda setting: unsuited(prepare(problem_of(setting))),
        shown=shown,
        paces=paces or {},
    )


def shared_rate(done: int, steps: int) -> float:
    """The learning rate of a step, as a share of the highest: up in a line for a tenth of the steps, then down.

    Args:
        done: steps before it; beyond the budget the rate stays.
        steps: the budget.
    """
    return rate_at(min(done, steps - 1), steps, steps // 10)


class Step:
    """One training step after another: AdamW with warm-up, linear decay and clipped gradients.

    Args:
        learner: what is trained.
        problem: where the batches come from.
        steps: the budget, over which the rate warms up (a tenth) and decays.
        rate: the highest learning rate.
        generator: draws the batches.
    """

    def __init__(self, learner: Learner, problem: Problem, steps: int, rate: float, generator: torch.Generator) -> None:
        self.learner, self.problem, self.steps, self.rate, self.generator = learner, problem, steps, rate, generator
        self.device = next(learner.parameters()).device
        self.parameters = [p for p in learner.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=rate, weight_decay=WEIGHT_DECAY)
        self.done = 0

    def __call__(self) -> Tensor:
        """Take a step and return the loss before it."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * shared_rate(self.done, self.steps)
        self.learner.set_progress(self.done / self.steps)
        self.done += 1
        inputs, target = self.problem.draw(self.generator)
        loss = self.learner.loss(inputs.to(self.device), target.to(self.device))
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward([loss])
        torch.nn.utils.clip_grad_norm_(self.parameters, CLIP_NORM)
        self.optimizer.step()
        return loss.detach()


@torch.no_grad()
def evaluate(learner: Learner, problem: Problem, part: Part) -> dict[str, float]:
    """Accuracy, and where they make sense top-10 accuracy and cross-entropy, over all of a part."""
    device = next(learner.parameters()).device
    sums: dict[str, float] = {}
    count = 0

    def add(name: str, value: Tensor) -> None:
        sums[name] = sums.get(name, 0.0) + float(value)

    with evaluating(learner):
        for inputs, target in problem.batches(part):
            scores = learner.scores(inputs.to(device)).flatten(0, -2)
            wanted = target.to(device).flatten()
            count += len(wanted)
            add("accuracy", (scores.argmax(-1) == wanted).sum())
            if problem.num_classes > 50:
                add("top10_accuracy", (scores.topk(10).indices == wanted[:, None]).any(-1).sum())
            log_probabilities = learner.log_probabilities(scores)
            if log_probabilities is not None:
                add("cross_entropy", -log_probabilities.gather(1, wanted[:, None]).sum())
    return {name: total / count for name, total in sums.items()}


def tune(
    build: Builder,
    problem: Problem,
    setting: Setting,
    quality: Quantity,
    run: Run,
    examine: Examination = lambda learner, problem: {},
) -> Metrics:
    """Train with every learning rate of the grid, choose by validation, and test that one.

    Every rate starts from the same parameters and sees the same batches. A rate whose loss is no number any more is
    out.

    Raises:
        ArithmeticError: the loss was no number at any rate.
    """
    sign = 1.0 if quality.higher_is_better else -1.0

    def attempt(rate: float) -> tuple[float, Learner]:
        learner = build(rate)
        train(learner, problem, setting.steps, rate, run)
        return sign * evaluate(learner, problem, "validation")[quality.name], learner

    rate, learner = best_rate(attempt, setting, run)
    return {
        **evaluate(learner, problem, "test"),
        **examine(learner, problem),
        "learning_rate": rate,
        "numbers": float(_numbers(learner)),
        "memory_mib": step_memory(lambda: build(rate), problem, run) / 2**20,
    }


def best_rate(attempt: Callable[[float], tuple[float, Trained]], setting: Setting, run: Run) -> tuple[float, Trained]:
    """The learning rate with the highest score, and what was trained with it.

    Every rate starts with the same seed. One at which training diverges is out.

    Args:
        attempt: trains with a rate and returns a score, by validation data, and what came of it.
        setting: with the rates.
        run: with the seed.

    Raises:
        ArithmeticError: training diverged at every rate.
    """
    best: tuple[float, float, Trained] | None = None
    for rate in setting.learning_rates:
        torch.manual_seed(run.seed)
        try:
            score, trained = attempt(rate)
        except FloatingPointError:
            continue
        if math.isfinite(score) and (best is None or score > best[0]):
            best = score, rate, trained
    if best is None:
        raise ArithmeticError(f"training diverged at every learning rate of {list(setting.learning_rates)}")
    return best[1:]


def _numbers(learner: Learner) -> int:
    """Floating-point numbers of parameters and buffers; those that two parts share count once."""
    tensors = [t for t in learner.state_dict().values() if t.is_floating_point()]
    return sum({t.data_ptr(): t.numel() for t in tensors if t.numel()}.values())


def train(learner: Learner, problem: Problem, steps: int, rate: float, run: Run) -> None:
    """Train a learner on the run's device.

    Args:
        learner: trained in place.
        problem: where the batches come from; every learner of a seed sees the same ones.
        steps: the budget.
        rate: the highest learning rate.
        run: with device and seed.

    Raises:
        FloatingPointError: the loss is no number any more.
    """
    learner.to(run.device).train()
    step = Step(learner, problem, steps, rate, run.generator(1))
    for done in run.progress(range(steps), f"learning rate {rate:g}"):
        loss = step()
        if (done % 50 == 0 or done == steps - 1) and not torch.isfinite(loss):
            raise FloatingPointError(f"the loss of step {done} is {loss.item()}")


def step_memory(build: Callable[[], Learner], problem: Problem, run: Run) -> int:
    """Bytes of all tensors of a training step at its height: parameters, optimiser's state, activations, gradients."""
    memory = TensorMemory()
    with memory:
        learner = build()
        learner.to(run.device)
        step = Step(learner, problem, 10, 1e-4, run.generator(2))
        for _ in range(2):
            step()
    return memory.peak


def time_steps(builders: Mapping[str, Builder], problem: Problem, setting: Setting, run: Run) -> dict[str, float]:
    """Milliseconds of a training step of every member: the best of several, taken by turns on the same batches.

    Of 20, or of as many as fit into ten seconds, but of 3 at least.
    """
    steps: dict[str, Callable[[], object]] = {}
    rate = min(setting.learning_rates)
    for name, build in builders.items():
        torch.manual_seed(run.seed)
        learner = build(rate)
        learner.to(run.device).train()
        steps[name] = Step(learner, problem, setting.steps, rate, run.generator(1))
    first = sum(best_times(steps, 0).values())
    repeats = min(_TIMED_STEPS, max(3, int(_TIMING_S / first)))
    return {name: seconds * 1e3 for name, seconds in best_times(steps, repeats).items()}
