"""Linear attention that does not forget the length of the query."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from typing import Literal

import torch
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.nn import functional as F

from postern.attention import (
    FEATURE_MAPS,
    FramedLinearAttention,
    FramedSoftmaxAttention,
    attention_weights,
    entropy_by_norm,
    linear_attention_weights,
    norm_aware_key_features,
    norm_aware_query_features,
    norm_entropy_correlation,
)
from postern.claims import AllOf, AtLeast, AtMost, Difference, Metrics, Paper, Run, Slope, Within
from postern.data import ImageName, load
from postern.nets import VectorTransformer, evaluating
from postern.timing import best_times, waiting

PAPER = Paper(
    slug="nalaformer",
    title="NaLaFormer: Norm-Aware Linear Attention for Transformer Models",
    date=date(2025, 6, 26),
    arxiv="2506.21137",
    authors=6,
    family="attention",
    summary=(
        "In softmax attention a long query gives a sharp distribution; the normaliser of linear attention cancels "
        "that length, and a ReLU throws away what negative coordinates have in common. NaLaFormer splits vectors "
        "into norm and direction. The norm of the query becomes the exponent of the coordinates of its direction, "
        "which survives normalisation, and a cosine-sine pair keeps each sign, so that equal signs interact and "
        "opposite ones do not."
    ),
    reported=(
        "Up to 4.2 % better on vision and language tasks (abstract).",
        "ImageNet-1k at 224 pixels, 300 epochs: 79.1, 82.6, 84.3, 85.2 and 85.7 % top-1 with 8, 15, 26, 52 and 95 "
        "million parameters (repository).",
    ),
    components=(
        "postern.attention.norm_exponent",
        "postern.attention.norm_aware_query_features",
        "postern.attention.norm_aware_key_features",
        "postern.attention.FEATURE_MAPS",
        "postern.attention.linear_attention",
        "postern.attention.NormAwareLinearAttention",
        "postern.attention.FramedLinearAttention",
        "postern.attention.FramedSoftmaxAttention",
        "postern.attention.attention_entropy",
        "postern.attention.norm_entropy_correlation",
        "postern.nets.NaLaFormer",
    ),
    code="ZacharyMeng/NaLaFormer",
    details=(
        "Only queries are divided by their norm. Keys are raised to the third power with their norm: a long key "
        "weighs much more than a short one.",
        "The exponent is computed from the norm before the division, in float32 at least. It has saturated at norms "
        "above 2: beyond, longer queries are hardly sharper.",
        "Rotations act on each half of the features by itself, and in the numerator alone: in the denominator they "
        "could make it negative. So the weights of a rotated layer do not sum to 1.",
        "eps is compared with the mean over the keys, not with the sum. Keys near 0, as in models whose weights start "
        "small, have features near eps; the normalisation after the heads makes up for their small outputs.",
        "Powers are taken as exponentials of logarithms, and features below 4e-18 are 0. Plain powers of small "
        "coordinates are denormal numbers, which made training on a processor twenty times slower.",
        "Norm, gate, LePE and the convolutions around it make a difference of their own: compare with other attention "
        "in the same frame, FramedLinearAttention or FramedSoftmaxAttention.",
        "The released networks have softmax in the third and fourth stage, and linear attention in the first two.",
    ),
    differences=(
        "A query of zeros gets zeros; the code divides by its norm and gives NaN.",
        "The first version of the paper speaks of the cosine and sine of the direction, whose products can be "
        'negative if taken literally. The phase "soft" is our reading: angles of a quarter turn at most, so that '
        'products stay positive, norms are kept and opposite signs are apart. The phase "sign" is that of the code.',
        "The causal form with sums over earlier tokens, rotations by one position and a cache is ours; no code for "
        "language was published.",
        "Rotated features are paired j with j + dim / 2, as elsewhere here; the code pairs neighbours, which is the "
        "same up to the order of the weights. Query, key, value and gate are four layers instead of one.",
        "The published sizes of the smallest networks, 8 and 15 million parameters, are not those of their published "
        "widths and depths, which make 6.1 and 15.9 million.",
        "Sequences of the pixels of a digit, 64 of them at the small scale and 784 at the full one, stand in for "
        "images of ImageNet.",
    ),
    example="""import torch

from postern.attention import NormAwareLinearAttention, linear_attention_weights
from postern.attention import norm_aware_key_features, norm_aware_query_features
from postern.nets import NALAFORMER_SIZES, LanguageModel, NaLaFormer

# A longer query is sharper: its largest weight grows.
torch.manual_seed(0)
query, key = torch.randn(1, 16), torch.randn(64, 16)
for norm in (0.1, 1.0, 3.0):
    features = norm_aware_query_features(norm * query / query.norm())
    weights = linear_attention_weights(features, norm_aware_key_features(key))
    print(f"norm {norm}: largest weight {weights.max():.3f}")

# In a language model, with a cache that does not grow.
model = LanguageModel(
    256, 32, 2, context=64, attention=lambda _: NormAwareLinearAttention(32, 4, is_causal=True, rotary="1d")
).eval()
text = torch.randint(0, 256, (1, 20))
cache = model.new_cache()
with torch.no_grad():
    model(text[:, :19], cache=cache)
    step = model(text[:, 19:], cache=cache)[:, -1]
print("decoded with the cache as without:", torch.allclose(step, model(text)[:, -1], atol=1e-4))

# The network for images of the paper, smallest size.
network = NaLaFormer(10, NALAFORMER_SIZES["XT"]).eval()
print("logits of an image", tuple(network(torch.randn(1, 3, 64, 64)).shape))
""",
)

LABELS: Mapping[str, str] = {
    "softmax": "softmax",
    "elu": "elu + 1",
    "relu": "ReLU",
    "relu-cubed": "ReLU cubed",
    "norm-aware": "norm-aware",
    "norm-aware-soft": "norm-aware, soft phase",
    "fixed-exponent": "fixed exponent",
    "fixed-exponent-soft": "fixed exponent, soft phase",
    "unsigned": "norm-aware, no signs",
}


def attention(arm: str, width: int, num_heads: int) -> FramedLinearAttention:
    """One kind of attention; everything around it is the same for all, the drawn weights as well."""
    if arm == "softmax":
        return FramedSoftmaxAttention(width, num_heads)
    features = FEATURE_MAPS[arm]
    return FramedLinearAttention(width, num_heads, query_features=features.query, key_features=features.key)


def _metric(name: str, arm: str) -> str:
    return f"{name}_{arm.replace('-', '_')}"


# The length of the query and the entropy ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lengths:
    """Random directions of queries, stretched to ``norms`` lengths from ``shortest`` to ``longest``; random keys."""

    directions: int
    keys: int = 64
    head_dim: int = 16
    shortest: float = 0.1
    longest: float = 4.0
    norms: int = 14


@PAPER.claim(
    "In any direction, a longer query of norm-aware linear attention is sharper (lower entropy), as under softmax; "
    "with ReLU features, cubed or not, its length makes no difference.",
    reported="entropy falls with the norm of the query under softmax and norm-aware attention; plain linear attention "
    "does not know the norm",
    holds_when=AllOf(
        AtMost("rank_norm_aware", -0.9),
        AtMost("rank_softmax", -0.95),
        Within("rank_relu", -0.05, 0.05),
        Within("rank_relu_cubed", -0.05, 0.05),
        AtLeast("lowest_feature", 0.0),
        AtMost("opposite_signs", 0.0),
        AtMost("error_of_norm", 1e-6),
    ),
    scales={"smoke": Lengths(10, norms=5), "small": Lengths(200)},
    seeds=5,
    note=(
        "Rank correlations of length and entropy along a direction, averaged over the directions; a change below 1e-6 "
        "nats counts as none. Ranks do not tell by how much: elu + 1 is not invariant either, but its entropy falls by "
        "a hundredth of a nat; the table has the entropies. Norm-aware entropy has fallen as far as it will at length "
        "2, and directions differ more than lengths do: over all queries together the correlation is much weaker. "
        "Also checked: no feature is negative, coordinates of opposite signs add exactly nothing, and a phase keeps "
        "the norm of the keys' powers."
    ),
)
def sharpens_with_the_length_of_the_query(config: Lengths, run: Run) -> Metrics:
    """Stretch queries, and look at the entropy of the attention of each kind."""
    generator = run.generator()
    shape = (config.directions, 1, config.head_dim)
    direction = torch.randn(*shape, generator=generator, dtype=torch.float64)
    key = torch.randn(config.directions, config.keys, config.head_dim, generator=generator, dtype=torch.float64)
    norms = torch.linspace(config.shortest, config.longest, config.norms, dtype=torch.float64)
    entropies = {arm: entropy_by_norm(_weigh(arm), direction, key, norms)[:, 0] for arm in LABELS}
    ranks = {arm: norm_entropy_correlation(entropy, norms) for arm, entropy in entropies.items()}
    means = {arm: entropy.mean(0) for arm, entropy in entropies.items()}
    run.table(
        "entropies",
        [
            {
                "attention": LABELS[arm],
                "rank correlation along a direction": round(ranks[arm], 3),
                "over all queries": round(_pooled(entropies[arm], norms), 3),
                f"nats at length {config.shortest:g}": round(means[arm][0].item(), 4),
                f"nats at length {config.longest:g}": round(means[arm][-1].item(), 4),
            }
            for arm in LABELS
        ],
    )
    figure = Figure(figsize=(6, 3.4))
    axes = figure.add_subplot()
    for arm, mean in means.items():
        axes.plot(norms, mean, label=LABELS[arm])
    axes.set(xlabel="length of the query", ylabel="entropy, nats")
    axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    run.figure(
        "entropy",
        figure,
        "Entropy of the attention against the length of the query. From the shortest to the longest: "
        + ", ".join(f"{LABELS[arm]} {mean[0]:.2f} to {mean[-1]:.2f}" for arm, mean in means.items())
        + " nats.",
    )
    return (
        {_metric("rank", arm): rank for arm, rank in ranks.items()}
        | {_metric("fall", arm): (mean[0] - mean[-1]).item() for arm, mean in means.items()}
        | _properties(direction.squeeze(1), key)
    )


def _weigh(arm: str) -> Callable[[Tensor, Tensor], Tensor]:
    if arm == "softmax":
        return lambda query, key: attention_weights(query[:, None], key[:, None])[:, 0]
    features = FEATURE_MAPS[arm]
    return lambda query, key: linear_attention_weights(features.query(query), features.key(key))


def _pooled(entropy: Tensor, norms: Tensor) -> float:
    """The rank correlation over all directions and lengths at once."""
    return float(spearmanr(norms.expand_as(entropy).flatten(), entropy.flatten()).statistic)


def _properties(query: Tensor, key: Tensor) -> dict[str, float]:
    """What must hold exactly: signs, and norms in both phases."""
    features = [norm_aware_query_features(query, phase=phase) for phase in ("sign", "soft")]
    keys = [norm_aware_key_features(key, phase=phase) for phase in ("sign", "soft")]
    powers = (key.abs() ** 3).norm(dim=-1)
    opposite = (features[0] * norm_aware_key_features(-query)).sum(-1)
    return {
        "lowest_feature": min(x.min().item() for x in [*features, *keys]),
        "opposite_signs": opposite.abs().max().item(),
        "error_of_norm": max(((x.norm(dim=-1) - powers) / powers).abs().max().item() for x in keys),
    }


# Training, with the best of several rates -----------------------------------------------------------------------------

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class _Task:
    """Networks that differ in their attention alone, and what they are trained and judged on.

    ``batches`` gives the same ones to every network; ``validation`` chooses the learning rate, ``test`` judges.
    """

    build: Callable[[str], nn.Module]
    batches: Callable[[], Iterator[Batch]]
    steps: int
    validation: Batch
    test: Batch


@dataclass(frozen=True)
class _Trained:
    """One network: its rate, its last training loss in nats, and its accuracies."""

    rate: float
    loss: float
    validation: float
    accuracy: float


def _train(task: _Task, arm: str, rate: float, run: Run) -> _Trained:
    """AdamW, one cycle of the learning rate."""
    torch.manual_seed(run.seed)
    network = task.build(arm).to(run.device)
    optimizer = torch.optim.AdamW(network.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=task.steps)
    losses = []
    batches = run.progress(task.batches(), f"{LABELS[arm]}, rate {rate:g}", total=task.steps)
    for inputs, target in batches:
        logits = network(inputs.to(run.device))
        loss = F.cross_entropy(logits.flatten(0, -2), target.to(run.device).flatten())
        optimizer.zero_grad()
        torch.autograd.backward([loss])
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    loss_at_end = sum(losses[-10:]) / len(losses[-10:])
    return _Trained(rate, loss_at_end, _accuracy(network, task.validation), _accuracy(network, task.test))


@torch.no_grad()
def _accuracy(network: nn.Module, batch: Batch, at_once: int = 256) -> float:
    device = next(network.parameters()).device
    with evaluating(network):
        found = [network(part.to(device)).argmax(-1).cpu() for part in torch.split(batch[0], at_once)]
    return (torch.cat(found) == batch[1]).double().mean().item()


def _compare(task: _Task, arms: Sequence[str], rates: Sequence[float], run: Run) -> dict[str, _Trained]:
    """Train every arm at every rate; of each arm keep the network that validates best."""
    everything = {arm: [_train(task, arm, rate, run) for rate in rates] for arm in arms}
    chosen = {arm: max(trained, key=lambda each: (each.validation, -each.loss)) for arm, trained in everything.items()}
    run.table(
        "accuracies",
        [
            {
                "attention": LABELS[arm],
                "rate": each.rate,
                "chosen": each is chosen[arm],
                "training loss, nats": round(each.loss, 4),
                "validation accuracy": round(each.validation, 4),
                "test accuracy": round(each.accuracy, 4),
            }
            for arm, trained in everything.items()
            for each in trained
        ],
    )
    figure = Figure(figsize=(6, 0.6 + 0.4 * len(arms)))
    axes = figure.add_subplot()
    axes.barh([LABELS[arm] for arm in arms], [100 * chosen[arm].accuracy for arm in arms])
    axes.set(xlabel="test accuracy, %")
    axes.invert_yaxis()
    told = ", ".join(f"{LABELS[arm]} {100 * chosen[arm].accuracy:.1f}" for arm in arms)
    run.figure("accuracy", figure, f"Test accuracy in per cent: {told}.")
    return chosen


# Digits, a pixel a token ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pixels:
    """Digits as sequences of pixels, of 8x8 or 28x28, for a transformer with learned positions.

    A share of ``test`` is held out, and ``validation`` of the rest chooses the rate. Positions start as large as the
    tokens, since a pixel says nothing without its place.
    """

    arms: tuple[str, ...]
    epochs: int
    learning_rates: tuple[float, ...] = (3e-3, 6e-3, 1.2e-2)
    dataset: ImageName = "digits"
    split: Literal["all", "train"] = "all"
    images: int | None = None
    test: float = 0.4
    validation: float = 0.15
    width: int = 32
    layers: int = 2
    heads: int = 2
    batch_size: int = 64
    position_std: float = 1.0


def _pixels(config: Pixels, run: Run) -> _Task:
    digits = load(config.dataset, config.split)
    tokens = digits.pixels.float().flatten(1)[..., None] / digits.pixels.max()
    order = torch.randperm(len(tokens), generator=run.generator())[: config.images]
    num_test = int(config.test * len(order))
    num_validation = int(config.validation * (len(order) - num_test))
    test, validation, train = torch.split(order, [num_test, num_validation, len(order) - num_test - num_validation])
    per_epoch = len(train) // config.batch_size

    def batches() -> Iterator[Batch]:
        generator = run.generator(1)
        for _ in range(config.epochs):
            shuffled = train[torch.randperm(len(train), generator=generator)]
            for rows in torch.split(shuffled[: per_epoch * config.batch_size], config.batch_size):
                yield tokens[rows], digits.labels[rows]

    def build(arm: str) -> nn.Module:
        make = partial(attention, arm, config.width, config.heads)
        return VectorTransformer(
            1,
            tokens.shape[1],
            10,
            config.width,
            config.layers,
            config.heads,
            attention=lambda _: make(),
            position_std=config.position_std,
        )

    held_out = [(tokens[rows], digits.labels[rows]) for rows in (validation, test)]
    return _Task(build, batches, config.epochs * per_epoch, held_out[0], held_out[1])


def _larger(arms: tuple[str, ...], epochs: int) -> Pixels:
    """Digits of 28x28 pixels."""
    return Pixels(
        arms, epochs, (1e-3, 3e-3, 6e-3), "ylecun/mnist", "train", images=20_000, width=128, layers=4, heads=8
    )


_FRAME = (
    "All arms have the same transformer around them, with the normalisation, the gate and the initial weights of the "
    "paper's layer, and each has the best of three learning rates by validation images of the same seed. Tokens are "
    "single pixels, so that attention has to do all the work; 0.02 million parameters. "
)


@PAPER.claim(
    "Reading digits pixel by pixel, norm-aware linear attention is at least one point more accurate than linear "
    "attention on elu or ReLU features, and at most one and a half points less than softmax.",
    reported="up to 4.2 % better on vision and language tasks; 82.6 % top-1 on ImageNet with 15 million parameters",
    holds_when=AllOf(
        Difference("accuracy_norm_aware", "accuracy_elu", at_least=0.01),
        Difference("accuracy_norm_aware", "accuracy_relu", at_least=0.01),
        Difference("accuracy_norm_aware", "accuracy_softmax", at_least=-0.015),
    ),
    scales={
        "smoke": Pixels(("softmax", "elu", "relu", "norm-aware"), 1, (3e-3,), images=320),
        "small": Pixels(("softmax", "elu", "relu", "norm-aware"), 30),
        "full": _larger(("softmax", "elu", "relu", "norm-aware"), 10),
    },
    seeds=5,
    note=_FRAME + "Where softmax has not come to its end in 30 epochs, part of the gain is one of speed: another "
    "claim trains both for 100. On the seed of tuning, ReLU features gained most from higher rates.",
)
def reads_pixels_better_than_linear_attention(config: Pixels, run: Run) -> Metrics:
    """Train transformers on sequences of pixels with each kind of attention."""
    chosen = _compare(_pixels(config, run), config.arms, config.learning_rates, run)
    return _accuracies(chosen)


@PAPER.claim(
    "Reading digits pixel by pixel, norm-aware attention is more accurate than with a fixed exponent in the place of "
    "the query's norm, and more accurate than without the signs of the coordinates.",
    reported="both parts of the idea are said to help; no such ablation was found with numbers",
    holds_when=AllOf(
        Difference("accuracy_norm_aware", "accuracy_fixed_exponent", at_least=0.0),
        Difference("accuracy_norm_aware", "accuracy_unsigned", at_least=0.0),
    ),
    scales={
        "smoke": Pixels(("norm-aware", "fixed-exponent", "unsigned"), 1, (3e-3,), images=320),
        "small": Pixels(("norm-aware", "fixed-exponent", "unsigned"), 30),
        "full": _larger(("norm-aware", "fixed-exponent", "unsigned"), 10),
    },
    seeds=5,
    note=(
        f"{_FRAME}No difference is a possible outcome: then spiky features are what helps, not the norm. Without the "
        "signs the layer came out 1.5 points better (0.3 to 2.6), and a fixed exponent is as good as the norm (-0.3 "
        "points, -1.2 to +0.7): neither of the two is what helps here."
    ),
)
def needs_both_the_norm_and_the_signs(config: Pixels, run: Run) -> Metrics:
    """Take away the norm, and the signs."""
    chosen = _compare(_pixels(config, run), config.arms, config.learning_rates, run)
    return _accuracies(chosen)


@PAPER.claim(
    "After 100 epochs of reading digits pixel by pixel, norm-aware linear attention is at most one and a half points "
    "less accurate than softmax.",
    reported="linear attention as accurate as softmax, or more",
    holds_when=Difference("accuracy_norm_aware", "accuracy_softmax", at_least=-0.015),
    scales={
        "smoke": Pixels(("softmax", "norm-aware"), 2, (3e-3,), images=320),
        "small": Pixels(("softmax", "norm-aware"), 100),
        "full": _larger(("softmax", "norm-aware"), 40),
    },
    seeds=3,
    note=_FRAME,
)
def keeps_up_with_softmax_in_long_training(config: Pixels, run: Run) -> Metrics:
    """Train both for longer."""
    chosen = _compare(_pixels(config, run), config.arms, config.learning_rates, run)
    return _accuracies(chosen)


def _accuracies(chosen: Mapping[str, _Trained]) -> dict[str, float]:
    return {_metric("accuracy", arm): trained.accuracy for arm, trained in chosen.items()} | {
        _metric("loss", arm): trained.loss for arm, trained in chosen.items()
    }


# Recall ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recall:
    """``pairs`` tokens of a key and a value each, then tokens that name one of these keys and want its value.

    ``length`` counts both; keys and values are drawn from ``vocabulary`` each.
    """

    steps: int
    arms: tuple[str, ...] = ("softmax", "elu", "relu", "norm-aware", "fixed-exponent")
    learning_rates: tuple[float, ...] = (3e-3, 1e-2, 3e-2)
    pairs: int = 8
    length: int = 32
    vocabulary: int = 64
    width: int = 32
    heads: int = 2
    batch_size: int = 128
    held_out: int = 1024


class _RecallNetwork(nn.Module):
    """Embeddings of keys and values, one layer of attention, and logits of the value at the tokens that ask."""

    def __init__(self, config: Recall, arm: str) -> None:
        super().__init__()
        self.pairs = config.pairs
        self.key = nn.Embedding(config.vocabulary, config.width)
        self.value = nn.Embedding(config.vocabulary, config.width)
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = attention(arm, config.width, config.heads)
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``[batch, questions, vocabulary]`` of tokens ``[batch, 2, length]``: keys, and values of the first."""
        x = self.key(tokens[:, 0])
        x = torch.cat([x[:, : self.pairs] + self.value(tokens[:, 1, : self.pairs]), x[:, self.pairs :]], dim=1)
        x = x + self.attention(self.attention_norm(x))
        logits: Tensor = self.head(self.norm(x[:, self.pairs :]))
        return logits


def _recall_batch(config: Recall, count: int, generator: torch.Generator) -> Batch:
    """Tokens ``[count, 2, length]`` and the wanted values; the values of tokens that ask are 0 and unused."""
    questions = config.length - config.pairs
    keys = torch.rand(count, config.vocabulary, generator=generator).argsort(1)[:, : config.pairs]
    values = torch.randint(config.vocabulary, (count, config.pairs), generator=generator)
    asked = torch.randint(config.pairs, (count, questions), generator=generator)
    names = torch.cat([keys, keys.gather(1, asked)], 1)
    shown = torch.cat([values, torch.zeros_like(asked)], 1)
    return torch.stack([names, shown], 1), values.gather(1, asked)


_QUESTIONS = (
    "Of 32 tokens some hold a key and a value each, of 64, and the others ask for one of these keys. Two heads of 16 "
    "features; the best of three learning rates for each arm. Signs double the number of norm-aware features, which is "
    "in their favour. With key and value in separate tokens, which would need a second layer, so short a training "
    "teaches nothing. "
)


@PAPER.claim(
    "One layer with norm-aware features recalls 8 values by their keys at least five points more often than with ReLU "
    "features, with heads of the same size.",
    reported="the best of linear attentions on Long Range Arena, and spikier attention",
    holds_when=Difference("accuracy_norm_aware", "accuracy_relu", at_least=0.05),
    scales={
        "smoke": Recall(20, held_out=64),
        "small": Recall(600),
        "full": Recall(6000, pairs=16, length=64, vocabulary=512, width=128, heads=8),
    },
    seeds=3,
    note=(
        f"{_QUESTIONS}With 8 pairs both recall nearly all, 94.8 and 95.3 %; features of elu, 98.1 %, and softmax, 99.5 "
        "%, recall more. See the claim about 16."
    ),
)
def recalls_better_than_relu_features(config: Recall, run: Run) -> Metrics:
    """Train one layer to fetch values."""
    return _recall(config, run)


_CROWDED = ("relu", "norm-aware", "fixed-exponent", "unsigned")


@PAPER.claim(
    "Of 16 values, as many as a head has features, one layer with norm-aware features recalls at least five points "
    "more than with ReLU features.",
    reported="the best of linear attentions on Long Range Arena, and spikier attention",
    holds_when=Difference("accuracy_norm_aware", "accuracy_relu", at_least=0.05),
    scales={
        "smoke": Recall(20, _CROWDED, pairs=16, held_out=64),
        "small": Recall(600, _CROWDED, pairs=16),
        "full": Recall(6000, _CROWDED, pairs=32, length=64, vocabulary=512, width=128, heads=8),
    },
    seeds=3,
    note=_QUESTIONS
    + "This claim was added when 8 pairs had turned out to be easy on the seed of tuning, where 16 were "
    "not. There the gain came from the signs: without them, with as many features as ReLU has, norm-aware attention "
    "was no better, and with a fixed exponent it was as good.",
)
def recalls_more_than_relu_features_when_crowded(config: Recall, run: Run) -> Metrics:
    """Train one layer to fetch values, of more pairs."""
    return _recall(config, run)


def _recall(config: Recall, run: Run) -> dict[str, float]:
    def batches() -> Iterator[Batch]:
        generator = run.generator(1)
        for _ in range(config.steps):
            yield _recall_batch(config, config.batch_size, generator)

    held_out = run.generator(2)
    validation, test = (_recall_batch(config, config.held_out, held_out) for _ in range(2))
    task = _Task(lambda arm: _RecallNetwork(config, arm), batches, config.steps, validation, test)
    return _accuracies(_compare(task, config.arms, config.learning_rates, run))


# Cost -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """Forward and backward passes of a layer over one sequence of each length, the best of ``repeats`` and one."""

    lengths: tuple[int, ...]
    repeats: int
    arms: tuple[str, ...] = ("softmax", "relu", "norm-aware")
    width: int = 64
    heads: int = 4


_LENGTHS = (256, 512, 1024, 2048, 4096, 8192)


@PAPER.claim(
    "The time of a norm-aware layer, forward and backward, grows at most like the length to the power of 1.2 from 256 "
    "to 8192 tokens.",
    reported="linear cost; 92.3 % less peak memory than softmax in super-resolution with over 70 thousand tokens",
    holds_when=Slope({length: f"ms_norm_aware_{length}" for length in _LENGTHS}, at_most=1.2),
    scales={
        "smoke": Cost(_LENGTHS, 0, arms=("norm-aware",)),
        "small": Cost(_LENGTHS, 3),
        "full": Cost(_LENGTHS, 20, width=1024, heads=16),
    },
    seeds=3,
    exclusive=True,
    note=(
        "Layers of 4 heads, 64 wide, in the same frame, one sequence. Softmax runs on torch's fused kernel, which does "
        "not keep the weights: so its memory grows linearly too, and norm-aware features, twice as many as the heads' "
        "and in single precision, take more. The table has both, and the length from which linear attention is faster."
    ),
)
def costs_linear_time(config: Cost, run: Run) -> Metrics:
    """Time layers over longer and longer sequences."""
    torch.manual_seed(run.seed)
    layers = {arm: attention(arm, config.width, config.heads).to(run.device) for arm in config.arms}
    times: dict[int, dict[str, float]] = {}
    kept: dict[int, dict[str, int]] = {}
    for length in run.progress(config.lengths, "timing layers"):
        x = torch.randn(1, length, config.width, device=run.device, requires_grad=True)
        steps = {arm: waiting(partial(_step, layer, x), run.device) for arm, layer in layers.items()}
        kept[length] = {arm: _kept_bytes(layer, x) for arm, layer in layers.items()}
        times[length] = best_times(steps, config.repeats)
    run.table(
        "cost",
        [
            {
                "attention": LABELS[arm],
                "tokens": length,
                "milliseconds": 1e3 * times[length][arm],
                "kept for the backward pass, MiB": kept[length][arm] / 2**20,
            }
            for arm in config.arms
            for length in config.lengths
        ],
    )
    figure = Figure(figsize=(6, 3.4))
    axes = figure.add_subplot()
    for arm in config.arms:
        axes.plot(config.lengths, [1e3 * times[length][arm] for length in config.lengths], "o-", label=LABELS[arm])
    axes.set(xlabel="tokens", ylabel="milliseconds", xscale="log", yscale="log")
    axes.legend(fontsize="small")
    longest = config.lengths[-1]
    told = ", ".join(f"{LABELS[arm]} {1e3 * seconds:.0f} ms" for arm, seconds in times[longest].items())
    run.figure("time", figure, f"Time of a layer by length. At {longest:,} tokens: {told}. {_crossover(times)}")
    return {
        f"{_metric('ms', arm)}_{length}": 1e3 * seconds for length, row in times.items() for arm, seconds in row.items()
    }


def _step(layer: nn.Module, x: Tensor) -> None:
    torch.autograd.backward([layer(x).square().mean()])


def _kept_bytes(layer: nn.Module, x: Tensor) -> int:
    """Bytes that a forward pass keeps for the backward pass, parameters and input included."""
    seen: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = layer(x)
    del output
    return sum(seen.values())


def _crossover(times: Mapping[int, Mapping[str, float]]) -> str:
    if any("softmax" not in row for row in times.values()):
        return "Softmax was not timed."
    faster = [length for length, row in times.items() if row["norm-aware"] < row["softmax"]]
    return f"Norm-aware attention is faster from {min(faster):,} tokens on." if faster else "Softmax is faster at all."
