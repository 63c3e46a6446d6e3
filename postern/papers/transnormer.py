"""Linear attention with decay, gates and a tiled kernel, as a language model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from typing import Literal

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from postern.attention import (
    SGLU,
    GatedLinearAttention,
    LightningForm,
    SelfAttention,
    SimpleRMSNorm,
    attend,
    decay_slopes,
    lightning_attention,
)
from postern.claims import AllOf, AtMost, Difference, Metrics, Paper, Ratio, Run, Slope, Within
from postern.nets import LanguageModel, consecutive_windows, language_model_loss, train_language_model
from postern.papers._corpora import Corpus, read_corpus
from postern.timing import best_times, waiting

PAPER = Paper(
    slug="transnormer",
    title="Scaling TransNormer to 175 Billion Parameters",
    date=date(2023, 7, 27),
    arxiv="2307.14995",
    authors=12,
    family="attention",
    summary=(
        "Linear attention promises cost proportional to length and a state of constant size, but used to lose to "
        "softmax in quality, was no faster in causal training, and its decay factors overflowed at inference. Here "
        "every part of the decoder is repaired: positions by rotation with exponential decay, gated linear "
        "attention normalised instead of divided, a gated unit without activation, a norm without parameters, a "
        "tiled kernel called Lightning Attention, and a recurrence that stays in range."
    ),
    reported=(
        "385M parameters after 100k updates: loss 2.362 for the Transformer, 2.248 for TransNormerLLM; 1B: 2.061 "
        "and 1.896.",
        "Without the gate 2.263 (379M parameters), with it 2.248 (385M).",
        "Lightning Attention is at least 2 times faster and takes up to 4 times less memory than PyTorch "
        "NormAttention up to length 8192.",
        "Training speed in tokens per second and GPU: 3362 to 4081 (7B), 106 to 137 (175B).",
        "Longest context on 64 A100: 37K to 48K tokens (7B), 10K to 12K (175B).",
    ),
    code="OpenNLPLab/TransnormerLLM",
    components=(
        "postern.attention.lightning_attention",
        "postern.attention.decay_slopes",
        "postern.attention.LRPE",
        "postern.attention.GatedLinearAttention",
        "postern.attention.SGLU",
        "postern.attention.SimpleRMSNorm",
        "postern.attention.transnormer.TransNormerConfig",
        "postern.attention.transnormer.TransNormerForCausalLM",
    ),
    details=(
        "Keep the state in float32: with a slope of 1/256 a state in bfloat16 is off by a fifth after 1000 tokens. It "
        "always is here.",
        "The text of the paper and its code have different decays: linear in the head, where the first head never "
        "forgets, and geometric as in ALiBi. The released models have the second, which is the default.",
        "The norm runs over all heads together, comes before the gate, and stands in the place of the denominator: "
        "without it outputs grow with the length. Products are not divided by the root of the heads' size.",
        "LRPE doubles the features of queries and keys, and with them the state of its layer. When decoding it needs "
        "the position of the token; the cache counts it.",
        "Padded tokens are left out by zeroing their keys. Positions are relative, so that padding on the left changes "
        "nothing.",
        "A last block that is shorter has decays of its own length.",
        "The state cannot go back to an earlier token, so that assisted generation is refused.",
        "On the CPU a call of fused softmax attention is faster than the layer below some hundred tokens.",
    ),
    differences=(
        "Lightning Attention of this paper goes over all tiles and takes time quadratic in the length. The linear "
        "form, in blocks, is from the authors' later Lightning Attention-2 (arXiv 2401.04658); it is the default here, "
        "and the paper's own is implementation='tiled'.",
        "On GPUs the sequence is cut into segments that run side by side, where the authors' kernel goes through it "
        "from end to end.",
        "Layers of the linear decay are counted from 1, so that the last does not forget, as the text says.",
        "The gated units' hidden size, which the text does not give, is twice the width, as in the authors' small "
        "model. The released models' weights do not load: their parameters have other names.",
        "At small scale 0.18 million parameters on the characters of tiny Shakespeare stand in for 385 million.",
        "The data pipeline, model parallelism and the quantised inference are left out.",
    ),
    example="""import torch

from postern.attention import GatedLinearAttention, decay_slopes, lightning_attention

torch.manual_seed(0)
layer = GatedLinearAttention(64, 4, layer=0, num_layers=12)
text = torch.randn(1, 5000, 64)
with torch.no_grad():
    whole = layer(text)
    cache = layer.new_cache()
    layer(text[:, :-1], cache=cache)  # the past in one matrix a head
    last = layer(text[:, -1:], cache=cache)
print(f"state {list(cache.memory.shape)} after {len(cache)} tokens")
print(f"decoded and computed at once differ by {(last - whole[:, -1:]).abs().max():.1e}")

query, key, value = torch.randn(3, 1, 4, 1000, 16).unbind()
slopes = decay_slopes(4, layer=3, num_layers=12)
in_blocks, state = lightning_attention(query, key, value, slopes)
by_definition, _ = lightning_attention(query, key, value, slopes, implementation="naive")
print(f"blocks and definition differ by {(in_blocks - by_definition).abs().max():.1e}")
""",
)


# -- the recurrence ----------------------------------------------------------------------------------------------------

DTYPES: Mapping[str, torch.dtype] = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SLOPES = (0.5, 1 / 16, 1 / 256)


@dataclass(frozen=True)
class Recurrence:
    """One head a slope, decoded token by token; the original recurrence for as long as theory lets it live, or less."""

    tokens: int
    original_tokens: int
    head_dim: int = 16


@PAPER.claim(
    "Decoding by S_t = exp(-slope) S_(t-1) + k_t v_t^T is right for 10,000 tokens, where the recurrence with "
    "exp(slope t) overflows, at the latest when that factor alone does; in float32 with a slope of 0.5 at token 177.",
    reported="The original recurrence is numerically unstable; the robust one is equal to it.",
    holds_when=AllOf(
        AtMost("robust_error", 1e-5),
        AtMost("robust_not_finite", 0.0),
        Within("float32_failure_at_half", 174.0, 180.0),
        AtMost("latest_failure", 1.0),
    ),
    scales={
        "smoke": Recurrence(1000, 3000),
        "small": Recurrence(10_000, 25_000),
        "full": Recurrence(100_000, 25_000, 128),
    },
    seeds=5,
    note=(
        "Slopes of 0.5, 1/16 and 1/256; queries and keys are SiLU of normal numbers. The error is relative to the "
        "definition in float64. A failure is the first token whose output is not finite, as a share of "
        "log(largest number) / slope; those that theory puts beyond the tokens of the run are not judged. The table "
        "also has the error of the robust recurrence if its state is kept in 16 bits."
    ),
)
def inference_is_robust(config: Recurrence, run: Run) -> Metrics:
    slopes = torch.tensor(SLOPES, dtype=torch.float64)
    query, key, value = _features(config.tokens, len(SLOPES), config.head_dim, run)
    exact = _exact(query, key, value, slopes, run)
    found, _ = lightning_attention(query.float(), key.float(), value.float(), slopes, implementation="recurrent")
    errors = _relative_by_head(found, exact)
    metrics = {"robust_error": max(errors), "robust_not_finite": float((~torch.isfinite(found)).sum())}
    rows, ratios = [], []
    longer = _features(config.original_tokens, len(SLOPES), config.head_dim, run)
    for name, dtype in run.progress(DTYPES.items(), "dtypes"):
        failures = _original_failures([x.to(dtype) for x in longer], slopes.to(dtype))
        in_own = _robust_with_state_in(dtype, query[:, :, :1000], key[:, :, :1000], value[:, :, :1000], slopes)
        own_errors = _relative_by_head(in_own, exact[:, :, :1000])
        for slope, failure, error, own_error in zip(SLOPES, failures, errors, own_errors, strict=True):
            limit = math.log(torch.finfo(dtype).max) / slope
            if limit < config.original_tokens:
                # one that went on to the end has failed later than theory says
                ratios.append((config.original_tokens if failure is None else failure) / limit)
            rows.append(
                {
                    "dtype": name,
                    "slope": slope,
                    "theory": round(limit),
                    "original fails at token": "not" if failure is None else failure,
                    f"robust error, {config.tokens} tokens, state in float32": error,
                    "robust error, 1000 tokens, state in this dtype": own_error,
                }
            )
        if name == "float32":
            metrics["float32_failure_at_half"] = float(config.original_tokens if failures[0] is None else failures[0])
    run.table("where the recurrences fail", rows)
    return metrics | {"latest_failure": max(ratios)}


@dataclass(frozen=True)
class Forms:
    """All forms of the sums on the same input."""

    tokens: int
    head_dim: int = 32
    block: int = 64


FORMS: tuple[LightningForm, ...] = ("chunk", "tiled", "recurrent", "naive")


@PAPER.claim(
    "Blocks, tiles and the recurrence compute what the matrix of all pairs does, with its gradients.",
    reported="Equal by construction; the robust recurrence by induction.",
    holds_when=AllOf(AtMost("output_error", 1e-5), AtMost("gradient_error", 1e-5)),
    scales={"smoke": Forms(300), "small": Forms(2000), "full": Forms(8000, 128)},
    seeds=5,
    note="In float32, the largest error of any form, relative to the matrix of all pairs in float64.",
)
def all_forms_agree(config: Forms, run: Run) -> Metrics:
    slopes = torch.tensor((0.0, *SLOPES), dtype=torch.float64, device=run.device)
    features = [x.to(run.device) for x in _features(config.tokens, len(slopes), config.head_dim, run)]
    weights = torch.randn(features[2].shape, dtype=torch.float64, generator=run.generator(2)).to(run.device)

    def evaluate(form: LightningForm, dtype: torch.dtype) -> tuple[Tensor, Sequence[Tensor]]:
        leaves = [x.to(dtype).requires_grad_() for x in features]
        query, key, value = leaves
        output, _ = lightning_attention(query, key, value, slopes.to(dtype), block=config.block, implementation=form)
        return output.detach(), torch.autograd.grad((output * weights.to(dtype)).sum(), leaves)

    exact, exact_gradients = evaluate("naive", torch.float64)
    rows = []
    for form in run.progress(FORMS, "forms"):
        found, gradients = evaluate(form, torch.float32)
        errors = [_relative(x, y) for x, y in zip(gradients, exact_gradients, strict=True)]
        rows.append({"form": form, "output": _relative(found, exact)} | dict(zip("qkv", errors, strict=True)))
    run.table("relative errors", rows)
    return {
        "output_error": max(float(row["output"]) for row in rows),
        "gradient_error": max(float(row[name]) for row in rows for name in "qkv"),
    }


def _features(tokens: int, heads: int, head_dim: int, run: Run) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as the layer has them, in float64 with the digits of float32."""
    generator = run.generator(1)
    query, key, value = (torch.randn(1, heads, tokens, head_dim, generator=generator).double() for _ in range(3))
    return F.silu(query).float().double(), F.silu(key).float().double(), value


def _exact(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor, run: Run, rows: int = 500) -> Tensor:
    """The definition in float64, some rows of the matrix of all pairs at a time."""
    pieces = []
    for start in run.progress(range(0, query.shape[2], rows), "exact outputs"):
        stop = min(start + rows, query.shape[2])
        distance = torch.arange(start, stop)[:, None] - torch.arange(stop)
        fading = torch.exp(-slopes[:, None, None] * distance.clamp_min(0)).where(distance >= 0, 0.0)
        pieces.append(((query[:, :, start:stop] @ key[:, :, :stop].mT) * fading) @ value[:, :, :stop])
    return torch.cat(pieces, 2)


def _original_failures(tensors: Sequence[Tensor], slopes: Tensor) -> list[int | None]:
    """Run ``S_t = S_(t-1) + k_t exp(slope t) v_t^T``, ``o_t = exp(-slope t) q_t S_t``; where each head fails first."""
    query, key, value = (x[0] for x in tensors)
    state = key.new_zeros(len(slopes), key.shape[-1], value.shape[-1])
    failures: list[int | None] = [None] * len(slopes)
    for t in range(key.shape[1]):
        growth = torch.exp(slopes * t)[:, None]
        state = state + (key[:, t] * growth)[:, :, None] * value[:, t, None]
        output = (query[:, t] / growth)[:, None] @ state
        if not torch.isfinite(output).all():
            for head in range(len(slopes)):
                if failures[head] is None and not torch.isfinite(output[head]).all():
                    failures[head] = t
            if None not in failures:
                break
    return failures


def _robust_with_state_in(dtype: torch.dtype, query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    """The robust recurrence with its state in a dtype of few bits, which `lightning_attention` never does."""
    query, key, value = (x.to(dtype) for x in (query, key, value))
    decay = torch.exp(-slopes).to(dtype)[:, None, None]
    state, outputs = key.new_zeros(*key.shape[:2], key.shape[3], value.shape[3]), []
    for t in range(key.shape[2]):
        state = decay * state + key[:, :, t, :, None] * value[:, :, t, None]
        outputs.append(query[:, :, t, None] @ state)
    return torch.cat(outputs, 2)


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def _relative_by_head(found: Tensor, expected: Tensor) -> list[float]:
    return [_relative(found[:, head], expected[:, head]) for head in range(found.shape[1])]


# -- time --------------------------------------------------------------------------------------------------------------

LENGTHS = (512, 1024, 2048, 4096, 8192, 65_536)
SOFTMAX_LENGTHS = LENGTHS[:5]
LATER_LENGTHS = LENGTHS[2:5]


@dataclass(frozen=True)
class LayerTimes:
    """One layer, timed in training or in decoding."""

    width: int = 256
    heads: int = 4
    repeats: int = 3
    dtype: torch.dtype = torch.float32


SMALL_LAYER = LayerTimes()
LAYER_TIMES = {
    "smoke": LayerTimes(32, 1, repeats=0),
    "small": SMALL_LAYER,
    "full": LayerTimes(2048, 16, repeats=10, dtype=torch.bfloat16),
}
LAYER_NOTE = (
    "A layer of width 256 with 4 heads, a batch of one, equal threads; softmax is PyTorch's fused causal kernel with "
    "rotated queries and keys, in a layer of its own."
)


@PAPER.claim(
    "Forward and backward pass of the layer take time linear in the length; with softmax attention they do not, and it "
    "is overtaken below 16,384 tokens.",
    reported="Training 1.2 times as fast as a Transformer at 7B, and contexts of 48K tokens instead of 37K.",
    holds_when=AllOf(
        Slope({length: f"gated_ms_{length}" for length in SOFTMAX_LENGTHS}, at_most=1.25),
        Slope({length: f"softmax_ms_{length}" for length in LATER_LENGTHS}, at_least=1.6),
        AtMost("crossover_tokens", 16_384.0),
    ),
    scales=LAYER_TIMES,
    seeds=3,
    exclusive=True,
    note=(
        LAYER_NOTE + " The kernel is the one in blocks; the paper's own is quadratic. The crossover is interpolated on "
        "logarithmic axes; 512 means that it lies at 512 tokens or below. At 65,536 tokens, shown and not judged, a "
        "token takes about 1.3 times as long as at 1024: there the C library gives each of the layer's tensors, of "
        "64 MiB, back to the system and fetches it anew, page by page."
    ),
)
def time_is_linear(config: LayerTimes, run: Run) -> Metrics:
    torch.manual_seed(run.seed)
    gated, softmax = _layers(config, run)
    times: dict[str, dict[int, float]] = {"gated": {}, "softmax": {}}
    for length in run.progress(LENGTHS, "lengths"):
        x = torch.randn(1, length, config.width, generator=run.generator(length)).to(run.device, config.dtype)
        x.requires_grad_()
        calls = {"gated": _training_step(gated, x, run)}
        if length in SOFTMAX_LENGTHS:
            calls["softmax"] = _training_step(softmax, x, run)
        for name, seconds in best_times(calls, config.repeats).items():
            times[name][length] = 1e3 * seconds
    _show_times(times, run)
    return {f"{name}_ms_{length}": value for name, row in times.items() for length, value in row.items()} | {
        "crossover_tokens": crossover(times["gated"], times["softmax"])
    }


@PAPER.claim(
    "Lightning Attention in blocks takes about as long a token at 65,536 tokens as at 1024, forwards and backwards.",
    reported="Constant training speed whatever the length (in the follow-up, arXiv 2401.04658).",
    holds_when=Ratio("us_a_token_65536", "us_a_token_1024", at_most=1.25),
    scales=LAYER_TIMES,
    seeds=3,
    exclusive=True,
    note="The attention alone, 4 heads of 64 features, one text.",
)
def time_a_token_is_flat(config: LayerTimes, run: Run) -> Metrics:
    slopes = decay_slopes(config.heads, 1, 4, device=run.device)
    metrics = {}
    for length in run.progress((1024, 4096, 16_384, 65_536), "lengths"):
        features = _features(length, config.heads, config.width // config.heads, run)
        tensors = [x.to(run.device, config.dtype).requires_grad_() for x in features]

        def step(tensors: Sequence[Tensor] = tensors) -> None:
            query, key, value = tensors
            torch.autograd.grad(lightning_attention(query, key, value, slopes)[0].sum(), tensors)

        # as many tokens at every length, so that all have as many chances of a quiet moment
        seconds = best_times({"": waiting(step, run.device)}, config.repeats * 65_536 // length)[""]
        metrics[f"us_a_token_{length}"] = 1e6 * seconds / length
    return metrics


@PAPER.claim(
    "A token decoded after 8192 others takes as long as one after 256; with a cache of keys and values it does not.",
    reported="A state whose size does not depend on the length.",
    holds_when=AllOf(
        Ratio("gated_us_8192", "gated_us_256", at_most=1.15),
        Ratio("softmax_us_8192", "softmax_us_256", at_least=1.5),
    ),
    scales=LAYER_TIMES,
    seeds=3,
    exclusive=True,
    note=LAYER_NOTE + " Keys and values lie in room made beforehand, so that nothing is copied.",
)
def decoding_time_is_flat(config: LayerTimes, run: Run) -> Metrics:
    torch.manual_seed(run.seed)
    gated, softmax = _layers(config, run)
    times: dict[str, dict[int, float]] = {"gated": {}, "softmax": {}}
    steps = 20
    with torch.no_grad():
        for length in run.progress((256, 1024, 2048, 8192), "lengths"):
            x = torch.randn(1, length + 1, config.width, generator=run.generator(length)).to(run.device, config.dtype)
            calls = {
                "gated": _decoding(_gated_decoder(gated, x), steps, run),
                "softmax": _decoding(_softmax_decoder(softmax, x), steps, run),
            }
            for name, seconds in best_times(calls, 5 * config.repeats).items():
                times[name][length] = 1e6 * seconds / steps
    run.table(
        "microseconds a token",
        [{"after tokens": n} | {name: round(row[n], 1) for name, row in times.items()} for n in times["gated"]],
    )
    return {f"{name}_us_{length}": value for name, row in times.items() for length, value in row.items()}


@dataclass(frozen=True)
class TileTimes:
    """The paper's kernel and the matrix of all pairs."""

    tokens: int
    heads: int = 4
    head_dim: int = 64
    tile: int = 256
    repeats: int = 3


@PAPER.claim(
    "The paper's own kernel, tile by tile, is at least twice as fast as the matrix of all pairs at 4096 tokens, "
    "forwards and backwards, and keeps at most a quarter as much for the backward pass.",
    reported="At least 2 times faster and up to 4 times less memory than PyTorch, up to 8192 tokens on a GPU.",
    holds_when=AllOf(
        Ratio("naive_ms", "tiled_ms", at_least=2.0),
        Ratio("naive_kept_mb", "tiled_kept_mb", at_least=4.0),
    ),
    scales={
        "smoke": TileTimes(512, 1, 16, 64, repeats=0),
        "small": TileTimes(4096),
        "full": TileTimes(8192, 16, 128, 256),
    },
    seeds=3,
    exclusive=True,
    note=(
        "4 heads of 64 features, tiles of 256 tokens, in plain torch on equal threads. Kept are the tensors that "
        "autograd saves. The form in blocks, from a later paper, is shown, not judged."
    ),
)
def tiles_beat_the_matrix_of_pairs(config: TileTimes, run: Run) -> Metrics:
    slopes = torch.tensor([2.0 ** -(head + 1) for head in range(config.heads)], device=run.device)
    tensors = [
        x.float().to(run.device).requires_grad_() for x in _features(config.tokens, config.heads, config.head_dim, run)
    ]
    forms: Mapping[str, LightningForm] = {"naive": "naive", "tiled": "tiled", "chunk": "chunk"}

    def forward(form: LightningForm) -> Tensor:
        block = 64 if form == "chunk" else config.tile
        query, key, value = tensors
        return lightning_attention(query, key, value, slopes, block=block, implementation=form)[0]

    def step(form: LightningForm) -> None:
        torch.autograd.grad(forward(form).sum(), tensors)

    metrics = {f"{name}_kept_mb": _kept(partial(forward, form)) / 2**20 for name, form in forms.items()}
    calls = {name: waiting(partial(step, form), run.device) for name, form in forms.items()}
    seconds = best_times(calls, config.repeats)
    metrics |= {f"{name}_ms": 1e3 * value for name, value in seconds.items()}
    run.table(
        f"{config.tokens} tokens",
        [
            {"form": name, "milliseconds": metrics[f"{name}_ms"], "kept, MiB": metrics[f"{name}_kept_mb"]}
            for name in forms
        ],
    )
    return metrics


def crossover(ours: Mapping[int, float], theirs: Mapping[int, float]) -> float:
    """The length from which ours takes less time, on logarithmic axes; beyond the last one by its last slope.

    Args:
        ours: time by length.
        theirs: time by length, at two lengths or more that are among ours.
    """
    lengths = sorted(theirs)
    leads = [math.log(theirs[n] / ours[n]) for n in lengths]
    if leads[0] >= 0:
        return float(lengths[0])
    at = next((i for i, lead in enumerate(leads) if lead >= 0), len(lengths) - 1)
    (before, lead_before), (after, lead_after) = ((math.log(lengths[i]), leads[i]) for i in (at - 1, at))
    if lead_after <= lead_before:
        return 1e9  # never, as far as can be seen
    return min(1e9, math.exp(before - lead_before * (after - before) / (lead_after - lead_before)))


def _layers(config: LayerTimes, run: Run) -> tuple[GatedLinearAttention, SelfAttention]:
    gated = GatedLinearAttention(config.width, config.heads, layer=1, num_layers=4)
    softmax = SelfAttention(config.width, config.heads, is_causal=True, bias=False, rotary_base=10_000.0)
    return gated.to(run.device, config.dtype), softmax.to(run.device, config.dtype)


def _training_step(layer: nn.Module, x: Tensor, run: Run) -> Callable[[], None]:
    leaves = [x, *layer.parameters()]

    return waiting(lambda: torch.autograd.grad(layer(x).sum(), leaves), run.device)


def _decoding(decode: Callable[[], object], steps: int, run: Run) -> Callable[[], None]:
    def several() -> None:
        for _ in range(steps):
            decode()

    return waiting(several, run.device)


def _gated_decoder(layer: GatedLinearAttention, x: Tensor) -> Callable[[], Tensor]:
    cache = layer.new_cache()
    layer(x[:, :-1], cache=cache)

    def decode() -> Tensor:
        output: Tensor = layer(x[:, -1:], cache=replace(cache))
        return output

    return decode


def _softmax_decoder(layer: SelfAttention, x: Tensor) -> Callable[[], Tensor]:
    """One token after the others, whose keys and values are there; its own are written behind them."""
    _, keys, values = (y.contiguous() for y in layer.project(x))

    def decode() -> Tensor:
        query, key, value = layer.project(x[:, -1:], x.shape[1] - 1)
        keys[:, :, -1:], values[:, :, -1:] = key, value
        output: Tensor = layer.output(attend(query, keys, values).transpose(1, 2).flatten(2))
        return output

    return decode


def _kept(forward: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass, each storage counted once."""
    storages: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = forward()
        del output
    return sum(storages.values())


def _show_times(times: Mapping[str, Mapping[int, float]], run: Run) -> None:
    run.table(
        "milliseconds, forwards and backwards",
        [
            {
                "tokens": length,
                "gated linear": round(value, 2),
                "a token, µs": round(1e3 * value / length, 2),
                "softmax": round(times["softmax"][length], 2) if length in times["softmax"] else None,
            }
            for length, value in times["gated"].items()
        ],
    )
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    for name, label in (("gated", "gated linear attention"), ("softmax", "softmax attention")):
        axes.loglog(list(times[name]), [1e3 * value / n for n, value in times[name].items()], marker="o", label=label)
    axes.set(xlabel="tokens", ylabel="microseconds a token")
    axes.legend(frameon=False)
    first, last = min(times["gated"]), max(times["gated"])
    run.figure(
        "time-a-token",
        figure,
        "Time of a token in training against the length of the text: "
        f"gated linear attention {1e3 * times['gated'][first] / first:.1f} microseconds at {first} tokens and "
        f"{1e3 * times['gated'][last] / last:.1f} at {last}; softmax "
        + ", ".join(f"{1e3 * value / n:.1f} at {n}" for n, value in times["softmax"].items())
        + ".",
    )


# -- quality -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """A language model on a text, over its characters or, where ``vocabulary`` is not 0, byte-pair tokens.

    ``rates`` are the learning rates of the arms, tuned one by one; the others have that of TransNormer.
    """

    corpus: str
    width: int
    layers: int
    heads: int
    context: int
    batch_size: int
    steps: int
    rates: Mapping[str, float]
    windows: int  # of validation, which judge
    warm_up_steps: int = 50
    weight_decay: float = 0.1
    characters: int | None = None
    vocabulary: int = 0
    accumulation: int = 1
    autocast: torch.dtype | None = None


ArmName = Literal["transnormer", "llama", "learned_positions", "no_decay", "no_gate", "rms_norm", "swiglu"]
LABELS: Mapping[ArmName, str] = {
    "transnormer": "TransNormer",
    "llama": "Llama's layers",
    "learned_positions": "learned positions",
    "no_decay": "LRPE without decay",
    "no_gate": "no gate",
    "rms_norm": "RMSNorm",
    "swiglu": "SwiGLU",
}


@dataclass(frozen=True)
class Arm:
    """What a model is made of; the defaults are TransNormer's.

    ``position`` is "mix" (decay in all layers, LRPE in the first), "lrpe" (in all, without decay) or "learned".
    """

    is_softmax: bool = False
    position: Literal["mix", "lrpe", "learned"] = "mix"
    is_gated: bool = True
    norm: Callable[[int], nn.Module] = lambda _: SimpleRMSNorm()
    feedforward: Callable[[int], nn.Module] = SGLU

    def attention(self, layer: int, width: int, heads: int, layers: int) -> nn.Module:
        """The attention of a layer."""
        if self.is_softmax:
            return SelfAttention(width, heads, is_causal=True, bias=False, rotary_base=10_000.0)
        return GatedLinearAttention(
            width,
            heads,
            layer=layer,
            num_layers=layers,
            decay="alibi" if self.position == "mix" else None,
            has_lrpe={"mix": layer == 0, "lrpe": True, "learned": False}[self.position],
            is_gated=self.is_gated,
            norm=self.norm(width),
        )


def swiglu(width: int) -> SGLU:
    """SwiGLU of the hidden size at which Llama's layers have as many parameters as TransNormer's."""
    return SGLU(width, round(7 * width / 3), activation=F.silu)


ARMS: Mapping[ArmName, Arm] = {
    "transnormer": Arm(),
    "llama": Arm(is_softmax=True, norm=nn.RMSNorm, feedforward=swiglu),
    "learned_positions": Arm(position="learned"),
    "no_decay": Arm(position="lrpe"),
    "no_gate": Arm(is_gated=False),
    "rms_norm": Arm(norm=nn.RMSNorm),
    "swiglu": Arm(feedforward=partial(SGLU, activation=F.silu)),
}
# of 0.004, 0.008 and 0.016 the best of each, on seed 0 and in 300 updates of the small model
RATES: Mapping[str, float] = {"transnormer": 8e-3, "llama": 8e-3}
SMOKE = Training("python-stdlib", 16, 2, 2, 32, 4, 30, RATES, 16, warm_up_steps=5, characters=50_000)
SMALL = Training("karpathy/tiny_shakespeare", 64, 4, 4, 256, 8, 1000, RATES, 256)
# the regime of the smallest model of the paper, on a smaller text
FULL = Training(
    "Salesforce/wikitext/wikitext-103-v1",
    1024,
    24,
    8,
    2048,
    128,
    100_000,
    {"transnormer": 3e-4, "llama": 3e-4},
    128,
    warm_up_steps=2000,
    vocabulary=50_272,
    accumulation=16,
    autocast=torch.bfloat16,
)
TEXT_NOTE = (
    "Characters of tiny Shakespeare, 256 in view, 4 layers of width 64 with 4 heads, 0.18 million parameters, AdamW "
    "with 50 steps of warm-up and linear decay, 8 windows an update. Losses are nats a character on validation text. "
    "All arms of a seed see the same windows."
)


@PAPER.claim(
    "TransNormer reaches a lower loss than a Transformer of Llama's layers with as many parameters, by 0.005 nats or "
    "more.",
    reported="385M: loss 2.362 to 2.248; 1B: 2.061 to 1.896.",
    holds_when=Difference("loss_transnormer", "loss_llama", at_most=-0.005),
    scales={"smoke": SMOKE, "small": SMALL, "full": FULL},
    seeds=4,
    note=(
        TEXT_NOTE + " 1000 updates. Llama's layers are RMSNorm, softmax attention with rotated queries and keys, and "
        "SwiGLU. Each arm has the best of the rates 0.004, 0.008 and 0.016 on a seed that does not count. A difference "
        "of 0.02 nats either way would be parity at this size; TransNormer is behind by 0.07 (0.03 to 0.11)."
    ),
)
def is_better_than_llamas_layers(config: Training, run: Run) -> Metrics:
    return _train_arms(config, ("transnormer", "llama"), run)


SMALL_ABLATION = replace(SMALL, steps=600)
ABLATION_NOTE = TEXT_NOTE + " 600 updates, all arms at the rate of TransNormer."
ABLATION_SCALES = {"smoke": SMOKE, "small": SMALL_ABLATION, "full": FULL}


@PAPER.claim(
    "Decay in all layers with rotation in the first does at least as well as learned positions, and as rotation in all "
    "layers without decay.",
    reported="385M, loss: 2.248 against 2.387 and 2.287.",
    holds_when=AllOf(
        Difference("loss_transnormer", "loss_learned_positions", at_most=0.0),
        Difference("loss_transnormer", "loss_no_decay", at_most=0.0),
    ),
    scales=ABLATION_SCALES,
    seeds=3,
    note=ABLATION_NOTE,
)
def decay_helps(config: Training, run: Run) -> Metrics:
    return _train_arms(config, ("transnormer", "learned_positions", "no_decay"), run)


@PAPER.claim(
    "The gate lowers the loss.",
    reported="Loss 2.263 without (379M), 2.248 with it (385M).",
    holds_when=Difference("loss_transnormer", "loss_no_gate", at_most=0.0),
    scales=ABLATION_SCALES,
    seeds=3,
    note=ABLATION_NOTE + " As in the paper, the model without gates has fewer parameters.",
)
def gate_helps(config: Training, run: Run) -> Metrics:
    return _train_arms(config, ("transnormer", "no_gate"), run)


@PAPER.claim(
    "A norm without parameters gives the loss of RMSNorm within 0.01 nats.",
    reported="No difference.",
    holds_when=Difference("loss_transnormer", "loss_rms_norm", at_least=-0.01, at_most=0.01),
    scales=ABLATION_SCALES,
    seeds=3,
    note=ABLATION_NOTE,
)
def norms_need_no_parameters(config: Training, run: Run) -> Metrics:
    return _train_arms(config, ("transnormer", "rms_norm"), run)


@PAPER.claim(
    "Gated units without activation are no worse than SwiGLU of the same size, by 0.02 nats at most.",
    reported="Perplexity 4.770 without, 4.788 with swish.",
    holds_when=Difference("loss_transnormer", "loss_swiglu", at_most=0.02),
    scales=ABLATION_SCALES,
    seeds=3,
    note=ABLATION_NOTE,
)
def gated_units_need_no_activation(config: Training, run: Run) -> Metrics:
    return _train_arms(config, ("transnormer", "swiglu"), run)


@dataclass(frozen=True)
class NormTimes:
    """Vectors to be normalised."""

    vectors: int
    width: int
    repeats: int = 20


@PAPER.claim(
    "SimpleRMSNorm takes no longer than RMSNorm, forwards and backwards.",
    reported="Its Triton kernel takes 0.46 ms forwards at 8192 vectors of 2048, against 4.36 ms in plain PyTorch.",
    holds_when=Ratio("simple_ms", "rms_norm_ms", at_most=1.0),
    scales={
        "smoke": NormTimes(64, 32, repeats=1),
        "small": NormTimes(1024, 1024),
        "full": NormTimes(8192, 2048),
    },
    seeds=3,
    exclusive=True,
    note="torch.nn.RMSNorm with its learned gains, in float32, equal threads.",
)
def norm_is_not_slower(config: NormTimes, run: Run) -> Metrics:
    x = torch.randn(config.vectors, config.width, generator=run.generator(1)).to(run.device).requires_grad_()
    norms = {"simple": SimpleRMSNorm(), "rms_norm": nn.RMSNorm(config.width, 1e-6).to(run.device)}
    seconds = best_times({name: _training_step(norm, x, run) for name, norm in norms.items()}, config.repeats)
    return {f"{name}_ms": 1e3 * value for name, value in seconds.items()}


def build_model(arm: ArmName, config: Training, num_tokens: int) -> LanguageModel:
    """The language model of an arm."""
    made = ARMS[arm]
    return LanguageModel(
        num_tokens,
        config.width,
        config.layers,
        config.heads,
        config.context,
        attention=lambda layer: made.attention(layer, config.width, config.heads, config.layers),
        feedforward=made.feedforward,
        norm=made.norm,
        has_position_embedding=made.position == "learned",
    )


def _train_arms(config: Training, arms: Sequence[ArmName], run: Run) -> Metrics:
    corpus = read_corpus(config.corpus, config.characters, config.vocabulary)
    losses, curves, rows = {}, {}, []
    for arm in arms:
        losses[arm], curves[arm], parameters = _train(config, corpus, arm, run)
        perplexity = math.exp(losses[arm])
        rows.append({"model": LABELS[arm], "parameters": parameters, "loss": losses[arm], "perplexity": perplexity})
    run.table("models", rows)
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    for arm, curve in curves.items():
        axes.plot(*_smooth(curve), label=LABELS[arm])
    axes.set(xlabel="updates", ylabel="training loss (nats)")
    axes.legend(frameon=False)
    described = "; ".join(f"{LABELS[arm]} {loss:.3f}" for arm, loss in losses.items())
    run.figure("training", figure, f"Training loss against updates. Validation losses at the end: {described}.")
    return {f"loss_{arm}": loss for arm, loss in losses.items()}


def _train(config: Training, corpus: Corpus, arm: ArmName, run: Run) -> tuple[float, list[float], int]:
    """Validation loss, training losses and number of parameters of an arm."""
    torch.manual_seed(run.seed)
    model = build_model(arm, config, corpus.num_tokens).to(run.device)

    def progress(steps: Iterable[int]) -> Iterable[int]:
        return run.progress(steps, LABELS[arm])

    losses = train_language_model(
        model,
        corpus.train,
        context=config.context,
        steps=config.steps,
        batch_size=config.batch_size,
        learning_rate=config.rates.get(arm, config.rates["transnormer"]),
        warm_up_steps=config.warm_up_steps,
        weight_decay=config.weight_decay,
        accumulation=config.accumulation,
        autocast=config.autocast,
        generator=run.generator(1),
        progress=progress,
    )
    windows = consecutive_windows(corpus.validation, config.context + 1, config.windows)
    loss = language_model_loss(model, windows, config.batch_size // config.accumulation)
    return loss, losses, sum(parameter.numel() for parameter in model.parameters())


def _smooth(losses: Sequence[float]) -> tuple[list[int], list[float]]:
    """Means of about forty stretches of a curve, and where they are."""
    stretches = np.array_split(np.asarray(losses), min(40, len(losses)))
    ends = np.cumsum([len(stretch) for stretch in stretches])
    return ends.tolist(), [float(stretch.mean()) for stretch in stretches]
