"""Attention layers compared: the same transformer around them; also what decoding and longer texts cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from postern.attention import (
    ClippedSoftmaxAttention,
    GatedAttention,
    GatedLinearAttention,
    LinearAttention,
    NormalizedAttention,
    NormAwareLinearAttention,
    PerHeadGatedAttention,
    SelfAttention,
    SplitDecodingAttention,
    first_token_share,
)
from postern.claims import Run
from postern.claims.comparison import Member, Quantity, Setting
from postern.compare.memory import TensorMemory
from postern.compare.problems import Problem, Rows, Words
from postern.compare.training import CROSS_ENTROPY, Learner, make_contest
from postern.compare.transformer import Transformer
from postern.dynamics import QLSTM, S6Mixer, SSDMixer
from postern.nets import LanguageModel, VectorTransformer
from postern.quantize import OutlierStatistics
from postern.timing import best_times

WIDTH, HEADS, LAYERS = 64, 4, 2
CONTEXT = 128  # words
LENGTHS = (128, 512, 2048)  # at which decoding and memory are looked at
ROTARY_BASE = 10_000.0
_TIMED_TOKENS = 15
_PROBED_WINDOWS = 8

FIRST_TOKEN = Quantity("first_token_attention", "attention on the first token, %", scale=100.0)
LARGEST = Quantity("largest_activation", "largest activation")
KURTOSIS = Quantity("kurtosis", "kurtosis of activations")


@dataclass(frozen=True)
class Entry:
    """How a layer takes part.

    Attributes:
        make: makes layer 0 or 1: ``make(layer, is_causal)``.
        is_causal_only: whether it has no bidirectional form.
    """

    make: Callable[[int, bool], nn.Module]
    is_causal_only: bool = False


def _alike(build: Callable[..., nn.Module], **options: Any) -> Callable[[int, bool], nn.Module]:
    """Make all layers in the same way."""
    return lambda layer, is_causal: build(WIDTH, HEADS, is_causal=is_causal, **options)


ENTRIES: Mapping[str, Entry] = {
    "softmax": Entry(_alike(SelfAttention)),
    "softmax-rotary": Entry(_alike(SelfAttention, rotary_base=ROTARY_BASE, has_qk_norm=True)),
    "softmax-grouped": Entry(_alike(SelfAttention, num_kv_heads=1)),
    "split-decoding": Entry(_alike(SplitDecodingAttention)),
    "clipped": Entry(_alike(ClippedSoftmaxAttention, alpha=1.0, length=CONTEXT)),
    "per-head-gate": Entry(_alike(PerHeadGatedAttention, kind="all")),
    "gated": Entry(_alike(GatedAttention)),
    "gated-by-head": Entry(_alike(GatedAttention, granularity="head")),
    "linear": Entry(_alike(LinearAttention)),
    "norm-aware": Entry(_alike(NormAwareLinearAttention)),
    "normalized": Entry(_alike(NormalizedAttention)),
    "transnormer": Entry(
        lambda layer, is_causal: GatedLinearAttention(WIDTH, HEADS, layer=layer, num_layers=LAYERS), is_causal_only=True
    ),
    "s6": Entry(lambda layer, is_causal: S6Mixer(WIDTH, inner_dim=2 * WIDTH), is_causal_only=True),
    "ssd": Entry(lambda layer, is_causal: SSDMixer(WIDTH, HEADS, inner_dim=2 * WIDTH), is_causal_only=True),
    "qlstm": Entry(lambda layer, is_causal: QLSTM(WIDTH), is_causal_only=True),
}
MEMBERS = (
    Member("softmax", "softmax attention on torch's fused kernel", "postern.attention.SelfAttention"),
    Member(
        "softmax-rotary", "the same with rotated and normalised queries and keys", "postern.attention.SelfAttention"
    ),
    Member("softmax-grouped", "the same with one head of keys and values", "postern.attention.SelfAttention"),
    Member(
        "split-decoding",
        "the same, its decoding split into chunks of keys",
        "postern.attention.SplitDecodingAttention",
        "flashdecoding-pp",
    ),
    Member(
        "clipped",
        "its probabilities stretched and clipped",
        "postern.attention.ClippedSoftmaxAttention",
        "quantizable-transformers",
    ),
    Member(
        "per-head-gate",
        "a gate a head and token",
        "postern.attention.PerHeadGatedAttention",
        "quantizable-transformers",
    ),
    Member("gated", "a gate a feature of each head", "postern.attention.GatedAttention", "gated-attention"),
    Member("gated-by-head", "a gate a head, after the paper", "postern.attention.GatedAttention", "gated-attention"),
    Member("linear", "sums of elu features in the place of softmax", "postern.attention.LinearAttention"),
    Member(
        "norm-aware",
        "sums of features whose exponent is the query's norm, a norm and a gate",
        "postern.attention.NormAwareLinearAttention",
        "nalaformer",
    ),
    Member(
        "normalized",
        "sums of signed keys, divided by an exponential of the token",
        "postern.attention.NormalizedAttention",
        "dynamical-systems-framework",
    ),
    Member(
        "transnormer",
        "sums that fade with distance, a norm and a gate",
        "postern.attention.GatedLinearAttention",
        "transnormer",
    ),
    Member("s6", "Mamba's block of 16 states a channel", "postern.dynamics.S6Mixer", "dynamical-systems-framework"),
    Member("ssd", "Mamba-2's block of 64 states a channel", "postern.dynamics.SSDMixer", "dynamical-systems-framework"),
    Member(
        "qlstm",
        "a recurrence whose gates do not see its state, with S6's gate",
        "postern.dynamics.QLSTM",
        "dynamical-systems-framework",
    ),
)


def network(name: str, problem: Problem, context: int | None = None) -> nn.Module:
    """An untrained transformer with the attention of a member, for words or tokens."""
    make = ENTRIES[name].make
    if isinstance(problem, Words):
        length = problem.context if context is None else context
        return LanguageModel(
            problem.num_classes, WIDTH, LAYERS, HEADS, length, attention=lambda layer: make(layer, True)
        )
    tokens, features = problem.shape
    return VectorTransformer(
        features, tokens, problem.num_classes, WIDTH, LAYERS, HEADS, attention=lambda layer: make(layer, False)
    )


def prepare(problem: Problem) -> Problem:
    """Inputs as tokens, and longer windows of a text."""
    return problem.as_tokens() if isinstance(problem, Rows) else replace(problem, context=CONTEXT)


def unsuited(problem: Problem) -> dict[str, str]:
    """Layers that know one direction, where there is none."""
    if isinstance(problem, Words):
        return {}
    return {
        name: "its tokens see earlier ones only, which suits texts, not the columns or patches of a row"
        for name, entry in ENTRIES.items()
        if entry.is_causal_only
    }


@torch.no_grad()
def examine(learner: Learner, problem: Problem) -> dict[str, float]:
    """Outliers of the layers' outputs, and how much of the attention lies on the first token where it has weights."""
    model: Any = learner.network
    device = next(learner.parameters()).device
    inputs = problem.batches("test")[0][0][:_PROBED_WINDOWS].to(device)
    seen: dict[Any, Tensor] = {}

    def keep(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        seen[layer] = args[0]

    hooks = [layer.attention.register_forward_hook(keep) for layer in model.layers]
    learner.eval()
    with OutlierStatistics(model) as outliers:
        model(inputs)
    for hook in hooks:
        hook.remove()
    found = {"largest_activation": outliers.max_infinity_norm, "kurtosis": outliers.mean_kurtosis}
    if isinstance(problem, Words) and all(hasattr(layer, "weights") for layer in seen):
        shares = [first_token_share(layer.weights(x)) for layer, x in seen.items()]
        found["first_token_attention"] = float(torch.stack(shares).mean())
    return found


def time_by_length(setting: Setting, problem: Problem, run: Run, steps: Mapping[str, float]) -> dict[str, float]:
    """Time a decoded word after so many others; count the memory of a layer and of its cache at each length."""
    if not isinstance(problem, Words):
        return {}
    decoding = {length: _decoding_times(setting.members, problem, length, run) for length in LENGTHS}
    training = {name: [_layer_memory(name, length, run) for length in LENGTHS] for name in setting.members}
    caches = {name: [_cache_memory(name, length, run) for length in LENGTHS] for name in setting.members}
    baseline = setting.baseline
    run.table(
        "by length",
        [
            {
                "attention": name,
                "words before": length,
                f"decoded word, times {baseline}'s": decoding[length][name] / decoding[length][baseline],
                "cache of a layer, KiB": caches[name][index] / 2**10,
                "training memory of a layer, MiB": training[name][index] / 2**20,
            }
            for name in setting.members
            for index, length in enumerate(LENGTHS)
        ],
    )
    longest = decoding[LENGTHS[-1]]
    words = problem.draw(run.generator(1))[0].numel()
    run.table(
        "words a second here",
        [
            {
                "attention": name,
                "in training": words / (steps[name] / 1e3),
                f"decoded after {LENGTHS[-1]:,}": 1 / longest[name],
            }
            for name in setting.members
        ],
    )
    run.figure("memory-by-length", _memory_figure(training, caches), _memory_in_words(training, caches))
    return {f"decoding {name}": 1e3 * longest[name] for name in setting.members}


@torch.no_grad()
def _decoding_times(members: Sequence[str], problem: Words, length: int, run: Run) -> dict[str, float]:
    """Seconds of one more word, the best of several, taken by turns."""
    words = torch.randint(problem.num_classes, (1, length + 2 * _TIMED_TOKENS), generator=run.generator(3))
    words = words.to(run.device)
    steps: dict[str, Callable[[], object]] = {}
    for name in members:
        torch.manual_seed(run.seed)
        model: Any = network(name, problem, words.shape[1]).to(run.device).eval()
        cache = model.new_cache()
        model(words[:, :length], cache=cache)
        steps[name] = torch.no_grad()(lambda model=model, cache=cache: model(words[:, :1], cache=cache))
    return best_times(steps, _TIMED_TOKENS)


def _layer_memory(name: str, length: int, run: Run) -> int:
    """Bytes of a layer's forward and backward pass at their height, parameters included."""
    memory = TensorMemory()
    with memory:
        layer: Any = ENTRIES[name].make(0, True).to(run.device)
        x = torch.randn(1, length, WIDTH, device=run.device, requires_grad=True)
        torch.autograd.backward([layer(x).square().mean()])
    return memory.peak


@torch.no_grad()
def _cache_memory(name: str, length: int, run: Run) -> int:
    """Bytes of what a layer keeps of so many tokens."""
    layer: Any = ENTRIES[name].make(0, True).to(run.device).eval()
    cache = layer.new_cache()
    layer(torch.randn(1, length, WIDTH, device=run.device), cache=cache)
    return sum(value.nbytes for value in vars(cache).values() if isinstance(value, Tensor))


def _memory_figure(training: Mapping[str, Sequence[int]], caches: Mapping[str, Sequence[int]]) -> Figure:
    figure = Figure(figsize=(8, 3.6))
    for place, (title, sizes) in enumerate((("training", training), ("cache", caches)), start=1):
        axes = figure.add_subplot(1, 2, place)
        for name, values in sizes.items():
            axes.plot(LENGTHS, [value / 2**20 for value in values], marker="o", markersize=3, label=name)
        axes.set(title=title, xlabel="words", ylabel="MiB a layer", xscale="log", yscale="log")
        axes.set_xticks(LENGTHS, [f"{length:,}" for length in LENGTHS])
        axes.minorticks_off()
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return figure


def _memory_in_words(training: Mapping[str, Sequence[int]], caches: Mapping[str, Sequence[int]]) -> str:
    told = "; ".join(
        f"{name}: training {training[name][0] / 2**20:.2g} to {training[name][-1] / 2**20:.2g} MiB, "
        f"cache {caches[name][0] / 2**10:.3g} to {caches[name][-1] / 2**10:.3g} KiB"
        for name in training
    )
    return f"Memory of one layer for one sequence of {LENGTHS[0]} to {LENGTHS[-1]:,} words. {told}."


CONTEST = make_contest(
    family="attention",
    module=__name__,
    members=MEMBERS,
    task={
        "text": f"A causal transformer of {LAYERS} layers, {WIDTH} wide, tells each word of the text from the "
        f"{CONTEXT} before it; the member is its attention.",
        "table": f"A transformer of {LAYERS} layers, {WIDTH} wide, classifies the rows, a token a column; the member "
        "is its attention.",
        "images": f"A transformer of {LAYERS} layers, {WIDTH} wide, classifies the images, a token a patch; the member "
        "is its attention.",
    },
    text_quality=CROSS_ENTROPY,
    build=lambda name, problem, rate: Transformer(network(name, problem)),
    prepare=prepare,
    unsuited=unsuited,
    examined=(FIRST_TOKEN, LARGEST, KURTOSIS),
    examine=examine,
    paces={"decoding": f"time of a decoded word after {LENGTHS[-1]:,}"},
    time_more=time_by_length,
)
