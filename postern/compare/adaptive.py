"""Networks that compute less, compared: what each method reaches at a share of the full network's cost."""

from __future__ import annotations

import bisect
import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from postern.adaptive import (
    EarlyExitModel,
    ExitFeatures,
    ExitPolicy,
    FTWTTrainer,
    JEIDNNTrainer,
    MaxProbExit,
    Mixture,
    PatienceExit,
    best_mixture,
    cache_exit_features,
    calibrate_thresholds,
    convert_to_dynamic,
    count_macs,
    counting_macs,
    exit_costs,
    geometric_exit_fractions,
    seconds_per_sample,
    slim_conv_net,
)
from postern.claims import Metrics, Run
from postern.claims.comparison import Contest, Curves, Member, Quantity, Setting
from postern.compare.problems import Part, Rows, problem_of
from postern.compare.training import Learner, best_rate, shared_rate, train
from postern.nets import ConvNet, ResidualMLP, evaluating

WIDTHS = (16, 32, 64, 64, 64)  # of the convolutional network's stages
TABLE_WIDTH, TABLE_DEPTH = 64, 6
Network = ConvNet | ResidualMLP

BUDGETS = tuple(tenth / 10 for tenth in range(1, 11))  # shares of the full network's multiply-adds
RANKED = (0.3, 0.5, 0.7)
SMALLER = (0.15, *RANKED)  # what smaller networks are made for, besides the full one
RATIOS = tuple(float(ratio) for ratio in np.geomspace(0.1, 10, 13))  # of the samples at an exit to those at the next
PRICES = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6)  # nats for the full cost
KEEPS = (0.95, 0.9, 0.8, 0.7)  # shares of the mass

BATCH = 64
DESCENT_RATE = 10.0  # where a method's own trainer descends without Adam: the grid times this
GATE_RATE, PREDICTOR_RATE, PREDICTOR_START_RATE = 0.1, 0.1, 0.3
EVALUATED = 2000  # samples of validation and test part, at most
TIMED = {1: 64, 64: 256}  # batch sizes, and samples that are timed in such batches
_TIMED_PASSES = 5


def percent(share: float) -> int:
    """A share as it is written in the names of metrics."""
    return round(100 * share)


@dataclass(frozen=True, eq=False)
class Point:
    """A method in one of its settings.

    Attributes:
        network: what is put into evaluation mode.
        answer: logits of a batch, computed as in use.
    """

    network: nn.Module
    answer: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, network: nn.Module) -> Point:
        """A network that always does the same."""
        return cls(network, network)

    @classmethod
    def with_policy(cls, model: EarlyExitModel, policy: ExitPolicy) -> Point:
        """A network that is left by a policy."""
        return cls(model, lambda inputs: model.forward_dynamic(inputs, policy=policy).logits)


@dataclass(frozen=True)
class Outcome:
    """What a point costs on a part of the data, in multiply-adds a sample, and the share that it answers rightly."""

    macs: float
    accuracy: float


class Classifier(Learner):
    """A network that is trained by cross-entropy: its own, and that of its exits if it has some."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def loss(self, inputs: Tensor, target: Tensor) -> Tensor:
        """The mean over all exits."""
        found = self.network(inputs)
        logits = found if isinstance(found, list) else [found]
        return torch.stack([F.cross_entropy(each, target) for each in logits]).mean()


class Workshop:
    """What a method works with: the data, the network that it may make smaller, a budget and a rate.

    Args:
        problem: the data.
        steps: of a training; there are two, of the network and of what a method adds to it.
        rate: the highest learning rate.
        run: with device and seed.
    """

    def __init__(self, problem: Rows, steps: int, rate: float, run: Run) -> None:
        self.problem, self.steps, self.rate, self.run = problem, steps, rate, run

    def network(self, share: float = 1.0) -> Network:
        """An untrained network whose layers have a share of the full width."""
        features, classes = self.problem.shape, self.problem.num_classes
        if self.problem.kind == "images":
            return ConvNet(features[0], classes, self.widths(share))
        return ResidualMLP(features[0], classes, max(1, round(share * TABLE_WIDTH)), TABLE_DEPTH)

    def widths(self, share: float) -> list[int]:
        """Filters of each stage."""
        return [max(1, round(share * width)) for width in WIDTHS]

    def macs(self, network: nn.Module) -> int:
        """Multiply-adds of a sample."""
        network = copy.deepcopy(network).cpu().eval()
        return count_macs(lambda: network(torch.zeros(1, *self.problem.shape)))

    def width_for(self, budget: float) -> float:
        """The largest share of the width that costs no more than a share of the multiply-adds."""
        most = budget * self.macs(self.network())
        shares = np.linspace(0.02, 1, 197)
        fitting = bisect.bisect_right(shares, most, key=lambda share: self.macs(self.network(float(share))))
        return float(shares[max(0, fitting - 1)])

    def trained(self, network: nn.Module, *, trainings: int = 1) -> nn.Module:
        """Train a network for the budget of so many trainings, in place."""
        train(Classifier(network), self.problem, trainings * self.steps, self.rate, self.run)
        return network.eval()

    def served(self, network: nn.Module) -> nn.Module:
        """The network as it is used: with the normalisations inside the convolutions."""
        return network.fold() if isinstance(network, ConvNet) else network

    def full(self) -> Network:
        """The full network, trained for one training."""
        network = self.network()
        self.trained(network)
        return network

    def with_exits(self, network: Network, *, is_frozen: bool) -> EarlyExitModel:
        """The network with an exit after each layer but the last."""
        is_conv = isinstance(network, ConvNet)
        model = EarlyExitModel(
            network,
            network.layers[:-1],
            self.problem.num_classes,
            WIDTHS[:-1] if is_conv else TABLE_WIDTH,
            norm=None if is_conv else "norm",
            is_frozen=is_frozen,
        )
        return model.to(self.run.device)

    def samples(self, trainings: float = 1.0) -> tuple[Tensor, Tensor, int]:
        """What a trainer that counts in epochs takes in a training: samples, their classes, and epochs."""
        inputs, target = self.problem.parts["train"]
        wanted = max(1, round(trainings * self.steps * BATCH))
        chosen = torch.randperm(len(target), generator=self.run.generator(3))[:wanted]
        return (
            inputs[chosen].to(self.run.device),
            target[chosen].to(self.run.device),
            max(1, round(wanted / len(chosen))),
        )

    def features(self, model: EarlyExitModel) -> tuple[ExitFeatures, ExitFeatures, int]:
        """What exits see of the samples of a training and of validation samples, and epochs."""
        inputs, target, epochs = self.samples()
        batches = zip(torch.split(inputs, 512), torch.split(target, 512), strict=True)
        validation = self.batches("validation")
        return cache_exit_features(model, batches), cache_exit_features(model, validation), epochs

    def exit_trainer(self, model: EarlyExitModel, price: float, *, ratio_grad: bool = False) -> JEIDNNTrainer:
        """The trainer of a frozen network's exits; with the ratio differentiated the gates do not teach the exits."""
        return JEIDNNTrainer(
            model,
            price,
            exit_costs(model, self.problem.parts["train"][0][:1].to(self.run.device)),
            phase_batches=20,
            ratio_grad=ratio_grad,
            gate_lr=GATE_RATE,
            head_lr=DESCENT_RATE * self.rate,
            batch_size=BATCH,
            generator=self.run.generator(2),
        )

    def evaluated(self, part: Part) -> tuple[Tensor, Tensor]:
        """What is answered of a part, drawn for all members and seeds alike: a part may be sorted by class."""
        inputs, target = self.problem.parts[part]
        chosen = torch.randperm(len(target), generator=torch.Generator().manual_seed(0))[:EVALUATED]
        return inputs[chosen].to(self.run.device), target[chosen].to(self.run.device)

    def batches(self, part: Part) -> list[tuple[Tensor, Tensor]]:
        """The same in batches."""
        inputs, target = self.evaluated(part)
        return list(zip(torch.split(inputs, 512), torch.split(target, 512), strict=True))

    @torch.no_grad()
    def outcome(self, point: Point, part: Part) -> Outcome:
        """Answer a part of the data."""
        batches = self.batches(part)
        with evaluating(point.network), counting_macs() as macs:
            right = torch.cat([point.answer(inputs).argmax(1) == target for inputs, target in batches])
            return Outcome(macs() / len(right), right.double().mean().item())

    def guess(self, part: Part) -> Outcome:
        """Always the class that is most frequent in training: what the cheapest answer reaches."""
        most = int(self.problem.counts().argmax())
        right = torch.cat([target == most for _, target in self.batches(part)])
        return Outcome(0.0, right.double().mean().item())


# -- the methods ------------------------------------------------------------------------------------------------------

Method = Callable[[Workshop], tuple[nn.Module, list[Point]]]  # the full network as it is used, and the points


def narrow(shop: Workshop) -> tuple[nn.Module, list[Point]]:
    """Networks of several widths, each trained from scratch for both trainings."""
    networks = [shop.network(shop.width_for(budget)) for budget in SMALLER] + [shop.network()]
    served = [shop.served(shop.trained(network, trainings=2)) for network in networks]
    return served[-1], [Point.of(network) for network in served]


def pruned(shop: Workshop) -> tuple[nn.Module, list[Point]]:
    """The trained network without the filters of the smallest weights, trained once more."""
    network = shop.full()
    assert isinstance(network, ConvNet), "tables are refused"
    smaller = [slim_conv_net(network, shop.widths(shop.width_for(budget))) for budget in SMALLER]
    served = [shop.served(shop.trained(each)) for each in (*smaller, network)]
    return served[-1], [Point.of(each) for each in served]


def trained_with_exits(shop: Workshop) -> tuple[nn.Module, list[Point]]:
    """A network that is trained with its exits from the start, left by confidence."""
    network = shop.network()
    model = shop.with_exits(network, is_frozen=False)
    shop.trained(model, trainings=2)
    shop.served(network)
    with torch.no_grad(), evaluating(model):
        found = [model(inputs) for inputs, _ in shop.batches("validation")]
    logits = [torch.cat(each) for each in zip(*found, strict=True)]
    return network, [*_ends(model), *_by_confidence(model, logits)]


def thresholds(shop: Workshop) -> tuple[nn.Module, list[Point]]:
    """Exits of the trained network, left by confidence."""
    model, logits = _with_trained_exits(shop)
    return model.backbone, [*_ends(model), *_by_confidence(model, logits)]


def patience(shop: Workshop) -> tuple[nn.Module, list[Point]]:
    """Exits of the trained network, left as soon as some agree."""
    model, _ = _with_trained_exits(shop)
    policies = [PatienceExit(count) for count in range(1, model.num_exits)]
    return model.backbone, [*_ends(model), *(Point.with_policy(model, each) for each in policies)]


def jei_dnn(shop: Workshop) -> tuple[nn.Module, list[Point]]:
    """Exits of the trained network, learnt together with the gates before them."""
    model, learning, validation, epochs = _with_warm_exits(shop)
    points = _ends(model)
    for price in PRICES:
        priced = copy.deepcopy(model)
        gates = shop.exit_trainer(priced, price).fit(learning, validation, epochs)
        points.append(Point.with_policy(priced, gates))
    return model.backbone, points


def ftwt(shop: Workshop) -> tuple[nn.Module, list[Point]]:
    """Filters of the trained network that are chosen for each input."""
    network = shop.full()
    inputs, target, epochs = shop.samples(0.5)
    points = []
    for keep in KEEPS:
        model = convert_to_dynamic(network, keep).to(shop.run.device)
        trainer = FTWTTrainer(
            model,
            epochs,
            backbone_lr=DESCENT_RATE * shop.rate,
            predictor_lr=PREDICTOR_RATE,
            schedule=_shared_schedule,
            batch_size=BATCH,
            generator=shop.run.generator(2),
        )
        trainer.pretrain_predictors(inputs, epochs=epochs, learning_rate=PREDICTOR_START_RATE)
        trainer.fit(inputs, target)
        points.append(Point.of(model.eval().set_execution("gathered")))
    served = shop.served(network)
    return served, [Point.of(served), *points]


def _ends(model: EarlyExitModel) -> list[Point]:
    """Always the final head, and always the first exit."""
    return [Point.of(model.backbone), Point.with_policy(model, MaxProbExit(0.0))]


def _by_confidence(model: EarlyExitModel, logits: Sequence[Tensor]) -> list[Point]:
    fractions = [geometric_exit_fractions(len(logits), ratio) for ratio in RATIOS]
    return [Point.with_policy(model, MaxProbExit(calibrate_thresholds(logits, each))) for each in fractions]


def _shared_schedule(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """The rates that all trainings here have, for a trainer with an optimiser of its own."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, partial(shared_rate, steps=steps))


def _with_warm_exits(shop: Workshop) -> tuple[EarlyExitModel, ExitFeatures, ExitFeatures, int]:
    """The trained network with exits that had half of a training; what they see, and the epochs that are left."""
    network = shop.full()
    shop.served(network)
    model = shop.with_exits(network, is_frozen=True)
    learning, validation, epochs = shop.features(model)
    before = max(1, epochs // 2)
    shop.exit_trainer(model, 0.0).warm_up(learning, validation, before, patience=before)
    return model, learning, validation, max(1, epochs - before)


def _with_trained_exits(shop: Workshop) -> tuple[EarlyExitModel, list[Tensor]]:
    """The trained network with exits that were trained as often and at the same rates as those beside gates.

    Returns:
        The network, and the logits of its exits and final head of validation samples.
    """
    model, learning, validation, epochs = _with_warm_exits(shop)
    shop.exit_trainer(model, PRICES[0], ratio_grad=True).fit(learning, validation, epochs)
    with torch.no_grad():
        return model, validation.all_logits(model)


METHODS: Mapping[str, Method] = {
    "narrow": narrow,
    "pruned": pruned,
    "trained-exits": trained_with_exits,
    "thresholds": thresholds,
    "patience": patience,
    "jei-dnn": jei_dnn,
    "ftwt": ftwt,
}
MEMBERS = (
    Member("narrow", "narrower networks, each trained from scratch", "postern.nets.ConvNet"),
    Member("pruned", "filters of small weights cut off, the rest trained on", "postern.adaptive.slim_conv_net"),
    Member(
        "trained-exits",
        "trained with exits, each of which is left above a confidence of its own",
        "postern.adaptive.EarlyExitModel",
        "jei-dnn",
    ),
    Member(
        "thresholds",
        "the same exits, on the trained network as it is",
        "postern.adaptive.MaxProbExit",
        "jei-dnn",
    ),
    Member("patience", "the same, left when exits agree", "postern.adaptive.PatienceExit", "jei-dnn"),
    Member("jei-dnn", "the same, with exits and gates learnt together", "postern.adaptive.JEIDNNTrainer", "jei-dnn"),
    Member("ftwt", "filters chosen for each input", "postern.adaptive.convert_to_dynamic", "fire-together"),
)


# -- what they reach --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Reached:
    """The points of a method, what they do on validation samples, and which of them reach each budget best."""

    shop: Workshop
    full: nn.Module
    full_macs: int
    points: tuple[Point, ...]
    validation: tuple[Outcome, ...]  # of the guess, then of the points

    @classmethod
    def by(cls, method: Method, shop: Workshop) -> Reached:
        """Train, and answer validation samples."""
        full, points = method(shop)
        validation = (shop.guess("validation"), *(shop.outcome(point, "validation") for point in points))
        return cls(shop, full, shop.macs(full), tuple(points), validation)

    def mixture(self, budget: float) -> Mixture:
        """The points that reach a share of the full network's multiply-adds best on validation samples."""
        costs, accuracies = zip(*((each.macs, each.accuracy) for each in self.validation), strict=True)
        return best_mixture(costs, accuracies, min(budget * self.full_macs, max(costs)))

    @property
    def score(self) -> float:
        """Validation accuracy, the mean over the budgets that rank."""
        accuracies = [each.accuracy for each in self.validation]
        return float(np.mean([_mixed(accuracies, self.mixture(budget)) for budget in RANKED]))

    def measured(self) -> Metrics:
        """Accuracy, multiply-adds and times on test samples at each budget; times as shares of the full network's."""
        mixtures = {budget: self.mixture(budget) for budget in BUDGETS}
        used = sorted(set(itertools.chain.from_iterable(each[:2] for each in mixtures.values())) - {0})
        test = {0: self.shop.guess("test")} | {k: self.shop.outcome(self.points[k - 1], "test") for k in used}
        accuracies = {k: each.accuracy for k, each in test.items()}
        shares = {k: each.macs / self.full_macs for k, each in test.items()}
        found = {
            f"{name}_{percent(budget)}": _mixed(values, mixture)
            for budget, mixture in mixtures.items()
            for name, values in (("accuracy", accuracies), ("macs", shares))
        }
        for batch_size in TIMED:
            times = self._times(used, batch_size)
            found |= {
                f"time_{batch_size}_{percent(budget)}": _mixed(times, mixture) for budget, mixture in mixtures.items()
            }
        return {"accuracy": float(np.mean([found[f"accuracy_{percent(budget)}"] for budget in RANKED]))} | found

    def _times(self, used: Sequence[int], batch_size: int) -> dict[int, float]:
        """Seconds a sample of points, over those of the full network; the best of several, by turns."""
        inputs = self.shop.evaluated("test")[0][: TIMED[batch_size]]
        calls: dict[str, Callable[[Tensor], object]] = {f"{k}": self.points[k - 1].answer for k in used}
        for k in used:
            self.points[k - 1].network.eval()
        times = seconds_per_sample({"full": self.full, **calls}, inputs, batch_size, _TIMED_PASSES)
        return {0: 0.0} | {k: times[f"{k}"] / times["full"] for k in used}


def _mixed(values: Mapping[int, float] | Sequence[float], mixture: Mixture) -> float:
    first, second, share = mixture
    return (1 - share) * values[first] + share * values[second]


def trial(name: str, setting: Setting, run: Run) -> Metrics:
    """Train a method with every rate, choose by validation samples, and test and time that one."""
    problem = problem_of(setting)
    assert isinstance(problem, Rows), "texts are refused"

    def attempt(rate: float) -> tuple[float, Reached]:
        reached = Reached.by(METHODS[name], Workshop(problem, setting.steps, rate, run))
        return reached.score, reached

    rate, reached = best_rate(attempt, setting, run)
    return {**reached.measured(), "learning_rate": rate}


def unsuited(setting: Setting) -> dict[str, str]:
    """Methods that choose filters, where there are none."""
    if setting.kind == "images":
        return {}
    why = "it leaves out filters of convolutions, which suit images"
    return {"pruned": why, "ftwt": why}


def _budget(share: float) -> Quantity:
    label = f"at {percent(share)} %, %"
    return Quantity(f"accuracy_{percent(share)}", label, higher_is_better=True, scale=100.0)


def _curves(title: str, metric: str, across: str) -> Curves:
    points = tuple((f"{metric}_{percent(budget)}", f"accuracy_{percent(budget)}") for budget in BUDGETS)
    return Curves(title, f"{across}, % of the full network's", "test accuracy, %", points, (100.0, 100.0))


QUALITY = Quantity(
    "accuracy",
    f"test accuracy at {', '.join(f'{percent(share)}' for share in RANKED[:-1])} and {percent(RANKED[-1])} % of the "
    "multiply-adds, %",
    higher_is_better=True,
    scale=100.0,
)
_TASK = (
    "the member makes it compute less: each is read at shares of the full network's multiply-adds, between two of its "
    "settings that validation data choose, or one and a guess."
)
CONTEST = Contest(
    family="adaptive",
    module=__name__,
    members=MEMBERS,
    task={
        "images": f"A convolutional network of {len(WIDTHS)} stages classifies the images; {_TASK}",
        "table": f"A residual perceptron of {TABLE_DEPTH} blocks, {TABLE_WIDTH} wide, classifies the rows; {_TASK}",
    },
    quality={"images": QUALITY, "table": QUALITY},
    costs=(
        *(_budget(share) for share in (*RANKED, 1.0)),
        *(
            Quantity(f"time_{size}_50", f"time at 50 %, batches of {size}, % of the full network's", scale=100.0)
            for size in TIMED
        ),
    ),
    train=trial,
    time=None,
    unsuited=unsuited,
    curves={
        "accuracy-against-time-alone": _curves("Samples one by one", "time_1", "time"),
        "accuracy-against-time-in-batches": _curves("Samples in batches of 64", "time_64", "time"),
        "accuracy-against-multiply-adds": _curves("Multiply-adds", "macs", "multiply-adds"),
    },
)
