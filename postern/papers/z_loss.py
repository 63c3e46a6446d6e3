"""The Z-loss: a ranking loss, and an output layer for it whose cost does not depend on the number of classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Literal

import psutil
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from postern.claims import AllOf, AtMost, Difference, Metrics, Paper, Ratio, Run
from postern.data import TextName, load
from postern.heads import (
    FactoredLinear,
    FactoredSphericalHead,
    SoftmaxHead,
    SphericalLoss,
    SquaredErrorLoss,
    TaylorSoftmaxLoss,
    ZLoss,
)
from postern.nets import evaluating
from postern.papers._output_layers import (
    AdaptiveSoftmax,
    FullSoftmax,
    HierarchicalSoftmax,
    OutputLayer,
    SampledSoftmax,
    restoring,
    zipf_classes,
)
from postern.timing import best_times, waiting

PAPER = Paper(
    slug="z-loss",
    title="The Z-loss: a shift and scale invariant classification loss belonging to the Spherical Family",
    date=date(2016, 4, 29),
    arxiv="1604.08859",
    authors=2,
    family="heads",
    summary=(
        "If a loss depends only on the sum of the scores, the sum of their squares and the score of the target, "
        "its output layer can be trained exactly at a cost that does not depend on the number of classes, without "
        "ever computing the scores. The Z-loss is such a loss, built on the z-score of the target, so that "
        "shifting or scaling all scores changes nothing; two parameters move it towards ranking. It suits very "
        "wide outputs where the rank matters more than a probability. It is not the penalty on log Z that later "
        "work gave the same name."
    ),
    reported=(
        "One Billion Word with 793 471 classes, whole model on one GPU: 40 times faster than log-softmax and more "
        "than 4 times faster than a hierarchical softmax (abstract).",
        "Penn Treebank: significantly better than earlier spherical losses, and better than log-softmax in some "
        "top-k scores (numbers not available to us).",
    ),
    components=(
        "postern.heads.z_loss",
        "postern.heads.ZLoss",
        "postern.heads.ZLossHead",
        "postern.heads.SphericalLoss",
        "postern.heads.SphericalHead",
        "postern.heads.log_taylor_softmax",
        "postern.heads.TaylorSoftmaxLoss",
        "postern.heads.TaylorSoftmaxHead",
        "postern.heads.SphericalSoftmaxLoss",
        "postern.heads.SphericalSoftmaxHead",
        "postern.heads.SquaredErrorLoss",
        "postern.heads.FactoredLinear",
        "postern.heads.FactoredSphericalHead",
    ),
    code="pascal20100/factored_output_layer",
    details=(
        "The z-score of one among D scores is at most sqrt(D - 1), so b must be of the order of what is within reach: "
        "3 to 30 for thousands of words, tuned with a. A small b and a large a give up the first rank for the later "
        "ones.",
        "Only plain gradient descent can be made on the factors. Below the layer any optimiser may work; for the layer "
        "itself step sizes of 1 to 100 go well with Adam at 0.001 to 0.003 below it.",
        "The gradient of the loss by the square sum enters twice: the curvature term is 2 dL/dq times h h^T.",
        "The mean over the batch must be in the loss before the backward pass, as the layer makes its step in it.",
        "A bias is the weight of one more feature that is always 1.",
        "The Taylor and the spherical softmax give strongly negative scores a high probability. Their logits rank by "
        "probability, not by score.",
        "The scores are no logarithms of probabilities: there is no perplexity to report.",
    ),
    differences=(
        "The text of the paper was not available to us: the loss is from its abstract, secondary sources and the "
        "official code (which has a = 1, b = 0), the layer from the code and the companion papers. The n-gram models "
        "and the search over a and b are our reconstruction.",
        "The official code collects each batch's gradients example by example; here they enter through the d x d "
        "matrix S = sum beta h h^T. This makes the update a handful of products and an inverse of U, computed anew "
        "unless the batch has fewer examples than half the features; then it is updated by the Woodbury identity.",
        "The official code brings every singular value of U outside of 0.5 to 2 back to 1. Here the range is 1/8 to 8, "
        "and if one leaves it all those far from 1 are brought back in the same pass over V; after each step, U that "
        "has become nearly singular is folded into V. In float32, Q stays right to some 1e-6 over thousands of steps.",
        "The official example gives the bias a feature of 0.001; here it is 1, as in a linear layer.",
        "Epsilon is added to the variance, squared, not to the standard deviation; so equal scores have a gradient.",
        "At the small scale the training text is Penn Treebank's test file, as the training file may not be "
        "distributed; choices are made on one part of its validation file and judged on another.",
    ),
    example="""import torch

from postern.heads import FactoredLinear, FactoredSphericalHead, ZLoss

torch.manual_seed(0)
centres = torch.randn(20_000, 16)  # 20,000 classes, of which the head never computes the scores
network = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Tanh())
head = FactoredSphericalHead(FactoredLinear(64, 20_000, learning_rate=30.0), ZLoss(a=0.3, b=20.0))
optimizer = torch.optim.Adam(network.parameters(), 3e-3)  # of the network alone: the head steps in backward()


def sample(count):
    target = (20_000 * torch.rand(count) ** 4).long()
    return centres[target] + 0.3 * torch.randn(count, 16), target


for step in range(401):
    inputs, target = sample(128)
    optimizer.zero_grad()
    loss = head.loss(network(inputs), target)
    loss.backward()
    optimizer.step()
    if step % 200 == 0:
        inputs, target = sample(500)
        with torch.no_grad():
            best = head.logits(network(inputs)).topk(10).indices
        found = (best == target[:, None]).any(1).float().mean()
        print(f"step {step:3}  loss {loss.item():.2f}  in the top 10: {found:.0%}")
""",
)


# -- the layer is exact -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Exactness:
    """A layer, trained on random hidden vectors."""

    classes: int
    width: int
    batch: int
    steps: int


# Each loss with a step size at which plain gradient descent is stable.
EXACT: Mapping[str, tuple[SphericalLoss, float]] = {
    "Z-loss": (ZLoss(1.0, 8.0), 1.0),
    "Taylor softmax": (TaylorSoftmaxLoss(), 0.5),
    "squared error": (SquaredErrorLoss(), 0.01),
}
PRECISIONS = {"float64": torch.float64, "float32": torch.float32}


@PAPER.claim(
    "The factored layer makes the steps of a dense one: after 200, weights, Gram matrix and column sums are the same.",
    reported="Exact by construction.",
    holds_when=AllOf(
        AtMost("float64_weight_error", 1e-12),
        AtMost("float64_summary_error", 1e-12),
        AtMost("float32_weight_error", 1e-4),
        AtMost("float32_summary_error", 1e-4),
    ),
    scales={
        "smoke": Exactness(500, 16, 8, 200),
        "small": Exactness(2000, 48, 48, 200),
        "full": Exactness(20_000, 128, 128, 200),
    },
    seeds=5,
    gpu=(),
    note=(
        "Errors are relative, the largest of three losses: Z-loss, Taylor softmax and squared error, each against "
        "autograd and torch's SGD in the same precision."
    ),
)
def factored_layer_is_exact(config: Exactness, run: Run) -> Metrics:
    errors = {
        (name, precision): _train_both(config, *EXACT[name], dtype, dtype, run)
        for name in run.progress(EXACT, "losses")
        for precision, dtype in PRECISIONS.items()
    }
    run.table(
        "relative errors",
        [
            {"loss": name, "precision": precision, "weights": weight, "Q and column sums": summary}
            for (name, precision), (weight, summary) in errors.items()
        ],
    )
    return {
        f"{precision}_{part}_error": max(errors[name, precision][index] for name in EXACT)
        for precision in PRECISIONS
        for index, part in enumerate(("weight", "summary"))
    }


@PAPER.claim(
    "The factors do not drift: after thousands of steps they still give the weights of dense training in float64.",
    reported="No numbers; the code stabilises the factors every hundred updates.",
    holds_when=AllOf(AtMost("float64_error", 1e-10), AtMost("float32_error", 1e-3)),
    scales={
        "smoke": Exactness(100, 8, 8, 500),
        "small": Exactness(300, 16, 16, 5000),
        "full": Exactness(300, 16, 16, 100_000),
    },
    seeds=5,
    gpu=(),
    note=(
        "The Z-loss. The error is the largest of those of the weights, Q and the column sums, relative to dense "
        "training in float64. Shown besides: what float32 alone costs the dense layer, and the factors without "
        "stabilisation."
    ),
)
def factors_do_not_drift(config: Exactness, run: Run) -> Metrics:
    criterion, rate = EXACT["Z-loss"]
    never = 10 * config.steps
    errors = {}
    for name, dtype, every in (
        ("float64", torch.float64, 100),
        ("float32", torch.float32, 100),
        ("unstabilised_float32", torch.float32, never),
    ):
        errors[f"{name}_error"] = max(_train_both(config, criterion, rate, dtype, torch.float64, run, every))
    dense = _train_dense(config, criterion, rate, torch.float32, run)
    exact = _train_dense(config, criterion, rate, torch.float64, run)
    return errors | {"dense_float32_error": _relative(dense, exact)}


# -- its time ---------------------------------------------------------------------------------------------------------

LABELS = {
    "factored": "factored Z-loss",
    "softmax": "log-softmax",
    "adaptive": "adaptive softmax (torch)",
    "hierarchical": "two-level softmax",
    "sampled": "sampled softmax",
}
STABILIZE_EVERY = 100  # steps; what is timed ends with a look at the singular values


@dataclass(frozen=True)
class LayerTimes:
    """Output layers of growing size, timed alone."""

    classes: tuple[int, ...]
    judged: int  # number of classes at which log-softmax is compared
    width: int = 128
    batch: int = 128
    repeats: int = 5
    samples: int = 1024  # classes that sampled softmax draws, for a whole batch


@PAPER.claim(
    "A training step of the factored layer takes about the same time whatever the number of classes, and at 100,000 "
    "is 20 times as fast as log-softmax.",
    reported="A cost independent of the number of classes.",
    holds_when=AllOf(
        Ratio("factored_most_ms", "factored_fewest_ms", at_most=2.0),
        Ratio("softmax_judged_ms", "factored_judged_ms", at_least=20.0),
    ),
    scales={
        "smoke": LayerTimes((500, 5000), 5000, width=64, batch=32, repeats=1),
        "small": LayerTimes((1000, 10_000, 100_000, 300_000), 100_000),
        "full": LayerTimes((1000, 10_000, 100_000, 1_000_000), 100_000, width=512, batch=200),
    },
    seeds=5,
    exclusive=True,
    note=(
        "Forward and backward pass and update of the output layer alone, hidden vectors and batch of 128, equal "
        "threads, the words drawn by Zipf's law. The factored layer's time is that of a hundred steps with a look at "
        "the singular values of U and a pass over V that brings a sixth of them back, more than training on text "
        "needs. Adaptive, two-level and sampled softmax approximate or change the model; they are shown, not judged."
    ),
)
def time_does_not_grow_with_classes(config: LayerTimes, run: Run) -> Metrics:
    times = {
        classes: _time_layers(config, classes, run) for classes in run.progress(config.classes, "numbers of classes")
    }
    _show_times(times, run)
    fewest, most = min(config.classes), max(config.classes)
    return {
        "factored_fewest_ms": times[fewest]["factored"],
        "factored_most_ms": times[most]["factored"],
    } | {f"{name}_judged_ms": value for name, value in times[config.judged].items()}


@PAPER.claim(
    "With the 793,471 words of One Billion Word, a training step of the output layer is at least 40 times as fast as "
    "with log-softmax.",
    reported="40 times, the whole model on one GPU, hidden vectors of 512 and a batch of 200.",
    holds_when=Ratio("softmax_ms", "factored_ms", at_least=40.0),
    scales={
        "smoke": LayerTimes((20_000,), 20_000, width=64, batch=32, repeats=1),
        "small": LayerTimes((793_471,), 793_471, repeats=3),
        "full": LayerTimes((793_471,), 793_471, width=512, batch=200),
    },
    seeds=3,
    exclusive=True,
    note="As the claim before. No text is needed: words are drawn by Zipf's law, and the time does not depend on them.",
)
def layer_is_forty_times_as_fast(config: LayerTimes, run: Run) -> Metrics:
    times = _time_layers(config, config.judged, run)
    _show_times({config.judged: times}, run)
    return {f"{name}_ms": value for name, value in times.items()}


@dataclass(frozen=True)
class ModelTimes:
    """A feed-forward language model, timed as a whole."""

    classes: int
    context: int = 4  # words
    embedding_dim: int = 64
    widths: tuple[int, ...] = (256, 256, 128)
    batch: int = 128
    repeats: int = 5
    samples: int = 1024


MODEL_TIMES = {
    "smoke": ModelTimes(20_000, embedding_dim=16, widths=(64, 64), batch=32, repeats=1),
    "small": ModelTimes(100_000),
    # The example of the official code.
    "full": ModelTimes(793_471, 10, 512, (2048, 2048, 512), batch=200),
}
MODEL_NOTE = (
    "A language model of four words with embeddings of 64, hidden layers of 256, 256 and 128, and a batch of 128; "
    "words drawn by Zipf's law; plain gradient descent in which only used embeddings are updated. The full scale is "
    "the example of the official code: ten words, embeddings of 512, layers of 2048, 2048 and 512."
)


@PAPER.claim(
    "A whole language model over 100,000 words trains at least 10 times as fast as with log-softmax.",
    reported="40 times, with 793,471 words on one GPU.",
    holds_when=Ratio("softmax_ms", "factored_ms", at_least=10.0),
    scales=MODEL_TIMES,
    seeds=5,
    exclusive=True,
    note=MODEL_NOTE,
)
def model_trains_faster_than_with_softmax(config: ModelTimes, run: Run) -> Metrics:
    return _time_models(config, run)


@PAPER.claim(
    "A whole language model over 100,000 words trains at least as fast as with a two-level hierarchical softmax.",
    reported="More than 4 times as fast, with 793,471 words on one GPU.",
    holds_when=Ratio("hierarchical_ms", "factored_ms", at_least=1.0),
    scales=MODEL_TIMES,
    seeds=5,
    exclusive=True,
    note=(
        MODEL_NOTE + " The two-level softmax has groups of neighbours in order of frequency, each of the size of the "
        "root of the vocabulary, and computes the groups that occur in a batch only."
    ),
)
def model_trains_faster_than_with_hierarchical_softmax(config: ModelTimes, run: Run) -> Metrics:
    return _time_models(config, run)


# -- its ranking ------------------------------------------------------------------------------------------------------

RANKS = (1, 5, 10, 20, 50, 100)
LATER_RANKS = (10, 20, 50, 100)


@dataclass(frozen=True)
class Recipe:
    """A loss, and how it is trained: Adam below the output layer; on that layer gradient descent or Adam as well."""

    loss: Literal["softmax", "z", "taylor"]
    network_rate: float
    output_rate: float | None = None  # of gradient descent; None is Adam at the network's rate
    a: float = 1.0
    b: float = 0.0

    def __str__(self) -> str:
        output = "Adam" if self.output_rate is None else f"SGD {self.output_rate:g}"
        shape = f", a = {self.a:g}, b = {self.b:g}" if self.loss == "z" else ""
        return f"Adam {self.network_rate:g}, output {output}{shape}"


# The best of a search on seed 0: eleven settings of log-softmax, six of the Taylor softmax, and of the Z-loss eight
# pairs of a from 0.1 to 3 and b from 8 to 28, each at a few rates.
RECIPES = {
    "softmax": (Recipe("softmax", 3e-3), Recipe("softmax", 3e-3, 1.0), Recipe("softmax", 6e-3, 1.0)),
    "z": (Recipe("z", 3e-3, 3.0, 0.3, 8.0), Recipe("z", 3e-3, 10.0, 0.3, 20.0), Recipe("z", 3e-3, 10.0, 0.1, 28.0)),
    "taylor": (Recipe("taylor", 3e-3, 10.0), Recipe("taylor", 3e-3, 30.0), Recipe("taylor", 6e-3, 30.0)),
}
FULL_RECIPES = {
    "softmax": tuple(
        Recipe("softmax", rate, output) for rate in (3e-4, 1e-3, 3e-3) for output in (None, 0.3, 1.0, 3.0)
    ),
    "z": tuple(
        Recipe("z", rate, 10.0, a, b)
        for rate in (3e-4, 1e-3, 3e-3)
        for a, b in ((0.1, 28), (0.3, 8), (0.3, 20), (1, 8))
    ),
    "taylor": tuple(
        Recipe("taylor", rate, output) for rate in (3e-4, 1e-3, 3e-3) for output in (3.0, 10.0, 30.0, 100.0)
    ),
}


@dataclass(frozen=True)
class Ranking:
    """A feed-forward language model, the text it learns, and the recipes that are tried."""

    data: TextName
    training_split: str
    validation_split: str
    test_split: str  # if it is the validation split as well, their words are disjoint
    recipes: Mapping[str, tuple[Recipe, ...]]
    epochs: int = 4
    context: int = 4  # words
    embedding_dim: int = 32
    widths: tuple[int, ...] = (128, 64)
    batch: int = 128
    max_words: int = 10_000  # in the vocabulary
    training_words: int | None = None
    validation_words: int = 10_000  # positions that are predicted
    test_words: int = 20_000


RANKING = {
    "smoke": Ranking(
        "python-stdlib",
        "test",
        "validation",
        "validation",
        {name: recipes[:1] for name, recipes in RECIPES.items()},
        epochs=1,
        max_words=1000,
        training_words=8000,
        validation_words=500,
        test_words=500,
    ),
    "small": Ranking("ptb", "test", "validation", "validation", RECIPES),
    "full": Ranking(
        "ptb",
        "train",
        "validation",
        "test",
        FULL_RECIPES,
        epochs=15,
        embedding_dim=100,
        widths=(500, 200),
        validation_words=70_000,
        test_words=80_000,
    ),
}
RANKING_NOTE = (
    "Four words before, embeddings of 32, hidden layers of 128 and 64, trained for 4 epochs on the 82,000 words of "
    "Penn Treebank's test file (6,049 different ones). Of three recipes for each loss the best and its best epoch are "
    "chosen for each k by the top-k error on 10,000 words of the validation file; the errors are those on 20,000 other "
    "words of it. Spherical losses train through the factored layer."
)


@PAPER.claim(
    "There are later ranks at which the Z-loss has a lower top-k error than log-softmax, k and all settings chosen on "
    "other words.",
    reported="Better than log-softmax at some top-k scores on Penn Treebank.",
    holds_when=Difference("softmax_error_at_chosen_k", "z_error_at_chosen_k", at_least=0.0),
    scales=RANKING,
    seeds=4,
    note=(
        RANKING_NOTE + " Of k = 10, 20, 50 and 100, the one with the largest gain on validation words is judged. "
        "Log-softmax is tried with Adam and with gradient descent on its output layer."
    ),
)
def ranks_better_than_log_softmax(config: Ranking, run: Run) -> Metrics:
    chosen = _compare_rankings(config, ("softmax", "z"), run)
    gains = {k: chosen["softmax"][k].validation_error - chosen["z"][k].validation_error for k in LATER_RANKS}
    k = max(gains, key=gains.__getitem__)
    return _flat(chosen) | {
        "chosen_k": k,
        "softmax_error_at_chosen_k": chosen["softmax"][k].test_error,
        "z_error_at_chosen_k": chosen["z"][k].test_error,
    }


@PAPER.claim(
    "The Z-loss has a lower top-k error than the Taylor softmax at every k from 1 to 100.",
    reported="Significantly better than the spherical losses before it on Penn Treebank.",
    holds_when=AllOf(*(Difference(f"taylor_error_at_{k}", f"z_error_at_{k}", at_least=0.0) for k in RANKS)),
    scales=RANKING,
    seeds=5,
    note=RANKING_NOTE,
)
def ranks_better_than_taylor_softmax(config: Ranking, run: Run) -> Metrics:
    return _flat(_compare_rankings(config, ("taylor", "z"), run))


# -- training dense and factored layers alike -------------------------------------------------------------------------


def _random_batches(config: Exactness, dtype: torch.dtype, run: Run) -> Sequence[tuple[Tensor, Tensor]]:
    """Hidden vectors that depend on their classes, the same in every precision."""
    generator = run.generator(1)
    centres = torch.randn(config.classes, config.width, generator=generator, dtype=torch.float64)
    batches = []
    for _ in range(config.steps):
        target = zipf_classes(config.batch, config.classes, generator)
        noise = torch.randn(config.batch, config.width, generator=generator, dtype=torch.float64)
        hidden = torch.relu(centres[target] + noise)
        batches.append((hidden.float().to(dtype), target))
    return batches


def _initial_layer(config: Exactness, dtype: torch.dtype, run: Run) -> nn.Linear:
    torch.manual_seed(run.seed)
    return nn.Linear(config.width, config.classes).to(dtype)


def _train_dense(config: Exactness, criterion: SphericalLoss, rate: float, dtype: torch.dtype, run: Run) -> Tensor:
    """Train a dense layer by torch's SGD; return its weights with the bias in the last column."""
    layer = _initial_layer(config, dtype, run)
    optimizer = torch.optim.SGD(layer.parameters(), rate)
    for hidden, target in _random_batches(config, dtype, run):
        optimizer.zero_grad()
        torch.autograd.backward([criterion(layer(hidden), target)])
        optimizer.step()
    return _with_bias(layer)


def _train_both(
    config: Exactness,
    criterion: SphericalLoss,
    rate: float,
    dtype: torch.dtype,
    dense_dtype: torch.dtype,
    run: Run,
    stabilize_every: int = STABILIZE_EVERY,
) -> tuple[float, float]:
    """Train a dense and a factored layer; return the relative errors of the weights and of what summarises them."""
    exact = _train_dense(config, criterion, rate, dense_dtype, run)
    initial = _initial_layer(config, dtype, run)
    layer = FactoredLinear(
        config.width, config.classes, learning_rate=rate, stabilize_every=stabilize_every, dtype=dtype
    )
    layer.set_weight(initial.weight, initial.bias)
    head = FactoredSphericalHead(layer, criterion)
    for hidden, target in _random_batches(config, dtype, run):
        torch.autograd.backward([head.loss(hidden, target)])
    exact = exact.double()
    return _relative(_with_bias(layer.to_linear()), exact), max(
        _relative(layer.gram, exact.T @ exact), _relative(layer.column_sum, exact.sum(0))
    )


def _with_bias(layer: nn.Linear) -> Tensor:
    return torch.cat([layer.weight, layer.bias[:, None]], 1).detach()


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


# -- timing -----------------------------------------------------------------------------------------------------------


def _layers(width: int, classes: int, samples: int, run: Run) -> dict[str, OutputLayer]:
    rate = 0.1
    factored = FactoredLinear(width, classes, learning_rate=rate, stabilize_every=STABILIZE_EVERY, device=run.device)
    return {
        "factored": FactoredSphericalHead(factored, ZLoss(0.3, 20.0)),
        "softmax": FullSoftmax(width, classes, rate).to(run.device),
        "adaptive": AdaptiveSoftmax(width, classes, rate).to(run.device),
        "hierarchical": HierarchicalSoftmax(width, classes, rate).to(run.device),
        "sampled": SampledSoftmax(width, classes, rate, samples).to(run.device),
    }


def _require_memory(classes: int, width: int, batch: int, run: Run) -> None:
    # Weights, their gradient and the other layers' weights; scores, their logarithms and gradients.
    needed = 4 * classes * (6 * width + 4 * batch)
    run.require(
        run.device.type != "cpu" or psutil.virtual_memory().available > needed,
        f"needs {needed / 1e9:.0f} GB of free memory for the layers of {classes:,} classes",
    )


def _milliseconds_a_step(
    layers: Mapping[str, OutputLayer], steps: Mapping[str, Callable[[], None]], repeats: int, run: Run
) -> dict[str, float]:
    """Best time of a step of each; for the factored layer with the care for its numerical health."""

    def several() -> None:
        for _ in range(STABILIZE_EVERY):
            steps["factored"]()

    calls = {name: waiting(several if name == "factored" else step, run.device) for name, step in steps.items()}
    seconds = best_times(calls, repeats)
    head = layers["factored"]
    assert isinstance(head, FactoredSphericalHead)
    seconds["factored"] += best_times({"": waiting(restoring(head.layer), run.device)}, repeats)[""]
    seconds["factored"] /= STABILIZE_EVERY
    return {name: 1e3 * value for name, value in seconds.items()}


def _time_layers(config: LayerTimes, classes: int, run: Run) -> dict[str, float]:
    """Milliseconds of a training step of each output layer."""
    _require_memory(classes, config.width, config.batch, run)
    layers = _layers(config.width, classes, config.samples, run)
    generator = run.generator(classes)
    batches = []
    for _ in range(50):
        hidden = torch.randn(config.batch, config.width, generator=generator).relu().to(run.device)
        batches.append((hidden.requires_grad_(), zipf_classes(config.batch, classes, generator).to(run.device)))
    done = 0

    def step(layer: OutputLayer) -> None:
        nonlocal done
        hidden, target = batches[done % len(batches)]
        done += 1
        hidden.grad = None
        torch.autograd.backward([layer.loss(hidden, target)])
        layer.step()

    steps = {name: lambda layer=layer: step(layer) for name, layer in layers.items()}
    return _milliseconds_a_step(layers, steps, config.repeats, run)


class WindowModel(nn.Module):
    """The hidden vector of a feed-forward language model: embeddings of the words before, and layers with ReLU."""

    def __init__(
        self, num_words: int, context: int, embedding_dim: int, widths: Sequence[int], *, sparse: bool = False
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_words, embedding_dim, sparse=sparse)
        layers: list[nn.Module] = []
        for before, after in zip((context * embedding_dim, *widths), widths, strict=False):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, words: Tensor) -> Tensor:
        """Return the hidden vectors of ``[batch, context]`` words."""
        hidden: Tensor = self.layers(self.embedding(words).flatten(1))
        return hidden


def _time_models(config: ModelTimes, run: Run) -> Metrics:
    """Milliseconds of a training step of the whole model with each output layer."""
    width = config.widths[-1]
    _require_memory(config.classes, width + config.embedding_dim, config.batch, run)
    layers = _layers(width, config.classes, config.samples, run)
    network = WindowModel(config.classes, config.context, config.embedding_dim, config.widths, sparse=True)
    network.to(run.device)
    optimizer = torch.optim.SGD(network.parameters(), 0.01)
    words = zipf_classes(50 * config.batch * (config.context + 1), config.classes, run.generator())
    batches = words.to(run.device).view(50, config.batch, config.context + 1)
    done = 0

    def step(layer: OutputLayer) -> None:
        nonlocal done
        batch = batches[done % len(batches)]
        done += 1
        optimizer.zero_grad()
        torch.autograd.backward([layer.loss(network(batch[:, :-1]), batch[:, -1])])
        optimizer.step()
        layer.step()

    steps = {name: lambda layer=layer: step(layer) for name, layer in layers.items()}
    times = _milliseconds_a_step(layers, steps, config.repeats, run)
    _show_times({config.classes: times}, run)
    return {f"{name}_ms": value for name, value in times.items()}


def _show_times(times: Mapping[int, Mapping[str, float]], run: Run) -> None:
    run.table(
        "milliseconds a training step",
        [
            {"classes": classes}
            | {LABELS[name]: round(value, 3) for name, value in row.items()}
            | {"log-softmax / factored": round(row["softmax"] / row["factored"], 2)}
            for classes, row in times.items()
        ],
    )
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    last = times[max(times)]
    if len(times) > 1:
        for name, label in LABELS.items():
            axes.loglog(list(times), [row[name] for row in times.values()], marker="o", markersize=3, label=label)
        axes.set(xlabel="classes", ylabel="milliseconds a step")
        axes.legend(frameon=False)
    else:
        axes.barh([LABELS[name] for name in last], list(last.values()))
        axes.set(xlabel="milliseconds a step", xscale="log")
        axes.invert_yaxis()
    run.figure(
        "time",
        figure,
        f"Time of a training step, in milliseconds, at {max(times):,} classes: "
        + ", ".join(f"{LABELS[name]} {value:.3g}" for name, value in last.items())
        + ".",
    )


# -- language models --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Words:
    """Contexts and next words."""

    context: Tensor  # [count, context]
    target: Tensor  # [count]

    def __getitem__(self, index: Tensor | slice) -> Words:
        return Words(self.context[index], self.target[index])

    def to(self, device: torch.device) -> Words:
        """The same on a device."""
        return Words(self.context.to(device), self.target.to(device))


@dataclass
class _Corpus:
    num_words: int
    train: Words
    validation: Words
    test: Words


def read_words(text: str, limit: int | None = None) -> list[str]:
    """Words of a text, with ``<eos>`` at the ends of lines."""
    return text.replace("\n", " <eos> ").split()[:limit]


def as_windows(words: Sequence[str], vocabulary: Mapping[str, int], context: int) -> Words:
    """Every word of a text after ``context`` others; unknown ones are ``<unk>``."""
    unknown = vocabulary["<unk>"]
    tokens = torch.tensor([vocabulary.get(word, unknown) for word in words])
    windows = tokens.unfold(0, context + 1, 1)
    return Words(windows[:, :-1], windows[:, -1])


def vocabulary_of(words: Sequence[str], max_words: int) -> dict[str, int]:
    """The most frequent words and ``<unk>``, by decreasing frequency; ``<unk>`` counts what is left out."""
    counts = Counter(words)
    del counts["<unk>"]
    kept = dict(counts.most_common(max_words - 1))
    kept["<unk>"] = len(words) - sum(kept.values())
    return {word: index for index, word in enumerate(sorted(kept, key=lambda word: -kept[word]))}


def _load_corpus(config: Ranking, run: Run) -> _Corpus:
    training = read_words(load(config.data, config.training_split).text, config.training_words)
    vocabulary = vocabulary_of(training, config.max_words)
    held_out = {
        split: as_windows(read_words(load(config.data, split).text), vocabulary, config.context)
        for split in {config.validation_split, config.test_split}
    }
    generator = run.generator()
    validation = held_out[config.validation_split]
    order = torch.randperm(len(validation.target), generator=generator)
    validation_rows, test_rows = order[: config.validation_words], order[config.validation_words :]
    test = validation
    if config.test_split != config.validation_split:
        test = held_out[config.test_split]
        test_rows = torch.randperm(len(test.target), generator=generator)
    return _Corpus(
        len(vocabulary),
        as_windows(training, vocabulary, config.context).to(run.device),
        validation[validation_rows].to(run.device),
        test[test_rows[: config.test_words]].to(run.device),
    )


@dataclass
class _Chosen:
    """A recipe and an epoch, chosen for one k; errors in per cent."""

    recipe: Recipe
    epoch: int
    validation_error: float
    test_error: float


def _compare_rankings(config: Ranking, losses: Sequence[str], run: Run) -> dict[str, dict[int, _Chosen]]:
    """Train every recipe of some losses; for each k choose one and its epoch on validation words, and test it."""
    corpus = _load_corpus(config, run)
    chosen: dict[str, dict[int, _Chosen]] = {}
    for loss in losses:
        candidates = []
        for recipe in config.recipes[loss]:
            model, head = _build(recipe, config, corpus, run)
            for epoch, states in enumerate(_train(recipe, model, head, config, corpus, run), start=1):
                candidates.append((recipe, epoch, states, top_k_errors(model, head, corpus.validation)))
        tested: dict[int, dict[int, float]] = {}
        chosen[loss] = {}
        for k in RANKS:
            best = min(range(len(candidates)), key=lambda index: candidates[index][3][k])
            recipe, epoch, states, errors = candidates[best]
            if best not in tested:
                model, head = _build(recipe, config, corpus, run)
                model.load_state_dict(states[0])
                head.load_state_dict(states[1])
                tested[best] = top_k_errors(model, head, corpus.test)
            chosen[loss][k] = _Chosen(recipe, epoch, errors[k], tested[best][k])
    _show_rankings(chosen, run)
    return chosen


TrainedHead = SoftmaxHead | FactoredSphericalHead
State = dict[str, Tensor]


def _build(recipe: Recipe, config: Ranking, corpus: _Corpus, run: Run) -> tuple[WindowModel, TrainedHead]:
    torch.manual_seed(run.seed)
    model = WindowModel(corpus.num_words, config.context, config.embedding_dim, config.widths)
    width = config.widths[-1]
    head: TrainedHead
    if recipe.loss == "softmax":
        head = SoftmaxHead(width, corpus.num_words)
    else:
        assert recipe.output_rate is not None, "factors have no Adam"
        criterion = ZLoss(recipe.a, recipe.b) if recipe.loss == "z" else TaylorSoftmaxLoss()
        layer = FactoredLinear(width, corpus.num_words, learning_rate=recipe.output_rate)
        head = FactoredSphericalHead(layer, criterion)
    return model.to(run.device), head.to(run.device)


def _train(
    recipe: Recipe, model: WindowModel, head: TrainedHead, config: Ranking, corpus: _Corpus, run: Run
) -> Iterator[tuple[State, State]]:
    """Train; yield the states of the network and the head after every epoch."""
    optimizers: list[torch.optim.Optimizer] = []
    if recipe.output_rate is None:
        optimizers.append(torch.optim.Adam([*model.parameters(), *head.parameters()], recipe.network_rate))
    else:
        optimizers.append(torch.optim.Adam(model.parameters(), recipe.network_rate))
        if recipe.loss == "softmax":
            optimizers.append(torch.optim.SGD(head.parameters(), recipe.output_rate))
    generator = run.generator(1)
    count = len(corpus.train.target)
    for epoch in range(config.epochs):
        order = torch.randperm(count, generator=generator).to(run.device)
        batches = order[: count - count % config.batch].view(-1, config.batch)
        for rows in run.progress(batches, f"{recipe.loss}, epoch {epoch + 1}", total=len(batches)):
            words = corpus.train[rows]
            for optimizer in optimizers:
                optimizer.zero_grad()
            torch.autograd.backward([head.loss(model(words.context), words.target)])
            for optimizer in optimizers:
                optimizer.step()
        yield _state(model), _state(head)


def _state(module: nn.Module) -> State:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


@torch.no_grad()
def top_k_errors(model: nn.Module, head: TrainedHead, words: Words, at_once: int = 500) -> dict[int, float]:
    """Per cent of words that are not among the k with the highest logits; ties count against the model."""
    ranks = []
    with evaluating(model), evaluating(head):
        for start in range(0, len(words.target), at_once):
            part = words[start : start + at_once]
            logits = head.logits(model(part.context))
            ranks.append((logits >= logits.gather(1, part.target[:, None])).sum(1))
    rank = torch.cat(ranks)
    return {k: 100 * (rank > k).double().mean().item() for k in RANKS}


def _flat(chosen: Mapping[str, Mapping[int, _Chosen]]) -> dict[str, float]:
    return {f"{loss}_error_at_{k}": choice.test_error for loss, row in chosen.items() for k, choice in row.items()}


def _show_rankings(chosen: Mapping[str, Mapping[int, _Chosen]], run: Run) -> None:
    run.table(
        "top-k errors, per cent",
        [
            {
                "loss": loss,
                "k": k,
                "test error": round(choice.test_error, 2),
                "validation error": round(choice.validation_error, 2),
                "chosen epoch": choice.epoch,
                "chosen recipe": str(choice.recipe),
            }
            for loss, row in chosen.items()
            for k, choice in row.items()
        ],
    )
    rival, z = chosen
    gains = [chosen[rival][k].test_error - chosen[z][k].test_error for k in RANKS]
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    axes.bar([str(k) for k in RANKS], gains)
    axes.axhline(0, color="grey", linewidth=1)
    axes.set(xlabel="k", ylabel=f"gain over {rival}, points")
    run.figure(
        "gain",
        figure,
        f"By how many points the Z-loss's top-k error lies below that of {rival}: "
        + ", ".join(f"{gain:.2f} at {k}" for k, gain in zip(RANKS, gains, strict=True))
        + ".",
    )
