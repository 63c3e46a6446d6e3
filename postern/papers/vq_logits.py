"""An output layer with a few shared vectors instead of one a token."""

from __future__ import annotations

import copy
import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from typing import cast

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from postern.claims import AllOf, AtLeast, AtMost, Metrics, Paper, Ratio, Run
from postern.data import Text, load
from postern.heads import (
    AdaptiveSoftmaxHead,
    Head,
    LowRankHead,
    SoftmaxHead,
    StraightThroughVQHead,
    VQLogitsHead,
    head_cost,
    projection_bound,
    random_mapping,
    tying_floor,
)
from postern.heads.vq_logits import MappingMethod
from postern.nets import LanguageModel, consecutive_windows, evaluating, random_windows
from postern.timing import best_times, waiting

PAPER = Paper(
    slug="vq-logits",
    title="VQ-Logits: Compressing the Output Bottleneck of Large Language Models via Vector Quantized Logits",
    date=date(2025, 5, 15),
    arxiv="2505.10202",
    authors=7,
    family="heads",
    summary=(
        "The output layer of a language model keeps one vector for each token of its vocabulary. VQ-Logits keeps "
        "far fewer, and a fixed table from tokens to vectors: all tokens of one vector get the same logit. "
        "Parameters and products shrink by the ratio, at the price that such tokens are equally likely in every "
        "context. It aims at edge devices, drafts for speculative decoding, and small models dominated by their "
        "vocabulary."
    ),
    reported=(
        "Up to 99 % fewer parameters in the output layer on WikiText-103 and C4 (abstract).",
        "Logits computed 6 times faster, for 4 % more perplexity than the full softmax (abstract).",
        "Starting from k-means helps, and the result is robust to the number of vectors (numbers not available to us).",
    ),
    components=(
        "postern.heads.VQLogitsHead",
        "postern.heads.StraightThroughVQHead",
        "postern.heads.kmeans",
        "postern.heads.frequency_kmeans_mapping",
        "postern.heads.frequency_mapping",
        "postern.heads.unigram_bias",
        "postern.heads.projection_bound",
        "postern.heads.tying_floor",
        "postern.heads.head_cost",
        "postern.heads.replace_lm_head",
        "postern.heads.LowRankHead",
        "postern.heads.AdaptiveSoftmaxHead",
    ),
    details=(
        "The normaliser over V tokens is one over K codes, with the logarithms of their sizes added: the loss is the "
        "cross-entropy of the codes plus a constant. Nothing as wide as the vocabulary is needed in training, for "
        "samples, or for the k best tokens; only whoever wants all logits pays for the scatter.",
        "Tokens of one code are equally likely in every context. So no training brings the perplexity of a text below "
        "exp(mean of log n), n being the size of the code of each token. The bound by projection tells what a mapping "
        "costs a given model, before any training.",
        "Training cannot repair that; a bias a token can, in part. For a fixed mapping the best one is known in closed "
        "form, the logarithm of the token's share of its code in the training text, and the layer becomes a "
        "class-based softmax.",
        "Without token biases it matters more that the words of a code are about as frequent than that they are alike. "
        "In our experiments codes that are cut from the order of frequencies, which need no trained rows, cost a small "
        "codebook half as much as k-means does, or less.",
        "The rows of frequent words stand apart and want codes of their own. A k-means that starts from a sample of "
        "the rows misses them, and cost a third more perplexity at nearly the same distortion.",
        "The bias of the dense layer holds the unigram distribution. Cluster rows with the bias as a last coordinate, "
        "or that is lost.",
        "The table is not free: ceil(log2 K) bits a token in a file, four bytes a token in memory here.",
        "Where the output layer shares its weights with the input embedding, as in many small models, a codebook adds "
        "parameters and removes none.",
        "Of equally likely tokens none is the best: a tie counts 1/n for accuracy.",
    ),
    differences=(
        "A reconstruction from the abstract and published summaries; there is no official code. A survey says that the "
        "paper was withdrawn for insufficient experiments, which we could not confirm.",
        "The token bias, the codes for frequent tokens, the loss and the samples from codes, and the bounds are ours. "
        "The default without a token bias computes the paper's logits.",
        "How the paper learns its mapping is not known to us. Here rows are quantised through a straight-through "
        "estimator and assigned anew every so many steps.",
        "Our models are 4-gram networks on 82 000 words of the Penn Treebank at small scale. The full scale trains a "
        "transformer of GPT-2's size on WikiText-103 with its 50 257 most frequent words.",
    ),
    example="""import torch

from postern.heads import SoftmaxHead, VQLogitsHead, head_cost

torch.manual_seed(0)
counts = 20_000 / torch.arange(1, 1001)  # a vocabulary of 1000 tokens, as frequent as words are
dense, hidden = SoftmaxHead(64, 1000), torch.randn(512, 64)
target = torch.multinomial(counts, 512, replacement=True)
with torch.no_grad():
    dense.linear.bias.copy_(counts.log())
    print(f"dense: {dense.loss(hidden, target):.2f} nats, {head_cost(64, 1000).bytes:,} bytes")
    for token_bias in (None, "unigram"):
        head = VQLogitsHead.from_linear(dense.linear, 32, counts=counts, token_bias=token_bias)
        cost = head_cost(64, 1000, 32, has_token_bias=token_bias is not None)
        print(f"32 codes, {token_bias} bias: {head.loss(hidden, target):.2f} nats, {cost.bytes:,} bytes")
    log_probs, best = head.topk(hidden, k=3)
print("likeliest tokens:", best[0].tolist(), "a sample:", head.sample(hidden)[0].item())
""",
)


# Size and speed ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layers:
    """Output layers of two widths for one vocabulary, with few and with many codes, on so many positions at once."""

    vocabulary: int = 50_257
    narrow: int = 256
    wide: int = 768
    few: int = 512
    many: int = 2048
    positions: int = 64
    repeats: int = 7


_LAYERS = {
    "smoke": Layers(vocabulary=4000, narrow=64, wide=128, few=40, many=160, positions=16, repeats=2),
    "small": Layers(),
    "full": Layers(narrow=768, wide=4096, positions=256, repeats=50),
}


@PAPER.claim(
    "With 512 codes the output layer for 50 257 tokens takes 99 % less memory, to the nearest percent, its table and a "
    "bias a token included.",
    reported="up to 99 % fewer parameters",
    holds_when=AtLeast("cut_with_token_bias", 0.985),
    scales={"smoke": Layers(), "small": Layers(), "full": Layers()},
    seeds=2,
    gpu=(),
    note="Arithmetic, for 768 features a token and 32 bits a number; it does not depend on the seed.",
)
def takes_99_percent_less_memory(config: Layers, run: Run) -> Metrics:
    """Count bytes of the dense layer and of codebooks."""
    dense = head_cost(config.wide, config.vocabulary)
    rows, metrics = [], {}
    for codes in (config.few, config.many):
        for has_bias in (False, True):
            cost = head_cost(config.wide, config.vocabulary, codes, has_token_bias=has_bias)
            rows.append(
                {
                    "codes": codes,
                    "token bias": has_bias,
                    "parameters": cost.parameters,
                    "bits of the table": cost.mapping_bits,
                    "bytes": cost.bytes,
                    "bytes saved": 1 - cost.bytes / dense.bytes,
                    "products a position": cost.flops // 2,
                }
            )
            if codes == config.few:
                metrics["cut_with_token_bias" if has_bias else "cut"] = 1 - cost.bytes / dense.bytes
    run.table("memory", rows)
    return metrics


_TIMED_NOTE = (
    "One thread, float32, 64 positions at once; both widths, 256 and 768. One position at a time is timed as well, but "
    "does not count for the verdict. The loss includes its gradients. All logits end in writing a number a token and "
    "position, whatever the number of codes."
)


@PAPER.claim(
    "With 2048 codes all logits of 50 257 tokens come at least 3 times as fast as from the dense layer, and the loss "
    "with its gradients at least 10 times as fast.",
    reported="logits 6 times faster",
    holds_when=AllOf(
        Ratio("dense_narrow_s", "vq_narrow_s", at_least=3),
        Ratio("dense_wide_s", "vq_wide_s", at_least=3),
        Ratio("dense_loss_narrow_s", "vq_loss_narrow_s", at_least=10),
        Ratio("dense_loss_wide_s", "vq_loss_wide_s", at_least=10),
    ),
    scales=_LAYERS,
    seeds=5,
    exclusive=True,
    note=_TIMED_NOTE,
)
def computes_logits_and_losses_faster(config: Layers, run: Run) -> Metrics:
    return _time_layers(config, run)


@PAPER.claim(
    "With 2048 codes all logits of 50 257 tokens come at least 6 times as fast as from the dense layer.",
    reported="logits 6 times faster, with a number of codes that is not known to us",
    holds_when=AllOf(
        Ratio("dense_narrow_s", "vq_narrow_s", at_least=6), Ratio("dense_wide_s", "vq_wide_s", at_least=6)
    ),
    scales=_LAYERS,
    seeds=5,
    exclusive=True,
    note=_TIMED_NOTE,
)
def computes_logits_six_times_faster(config: Layers, run: Run) -> Metrics:
    return _time_layers(config, run)


def _time_layers(config: Layers, run: Run) -> dict[str, float]:
    """Time the dense layer and codebooks side by side: code logits, all logits, and the loss with its gradients."""
    metrics: dict[str, float] = {}
    rows = []
    for name, width, positions in (
        ("narrow", config.narrow, config.positions),
        ("wide", config.wide, config.positions),
        ("one", config.wide, 1),
    ):
        hidden = torch.randn(positions, width, device=run.device, requires_grad=True)
        target = torch.randint(config.vocabulary, (positions,), device=run.device)
        heads: dict[str, SoftmaxHead | VQLogitsHead] = {
            "dense": SoftmaxHead(width, config.vocabulary).to(run.device),
            "few": VQLogitsHead(width, config.vocabulary, config.few).to(run.device),
            "many": VQLogitsHead(width, config.vocabulary, config.many).to(run.device),
        }
        seconds = best_times(_calls(heads, hidden, target, run), config.repeats)
        for head in heads:
            code = seconds.get(f"{head} codes")
            rows.append(
                {
                    "positions": positions,
                    "features": width,
                    "codes": {"dense": None, "few": config.few, "many": config.many}[head],
                    "logits of the codes, ms": None if code is None else 1e3 * code,
                    "all logits, ms": 1e3 * seconds[f"{head} logits"],
                    "times as fast": seconds["dense logits"] / seconds[f"{head} logits"],
                    "loss and gradients, ms": 1e3 * seconds[f"{head} loss"],
                    "times as fast, loss": seconds["dense loss"] / seconds[f"{head} loss"],
                }
            )
        metrics |= {
            f"dense_{name}_s": seconds["dense logits"],
            f"vq_{name}_s": seconds["many logits"],
            f"vq_codes_{name}_s": seconds["many codes"],
            f"vq_few_{name}_s": seconds["few logits"],
            f"dense_loss_{name}_s": seconds["dense loss"],
            f"vq_loss_{name}_s": seconds["many loss"],
        }
    run.table(f"{config.vocabulary} tokens", rows)
    return metrics


def _calls(
    heads: Mapping[str, SoftmaxHead | VQLogitsHead], hidden: Tensor, target: Tensor, run: Run
) -> dict[str, Callable[[], None]]:
    def logits(head: SoftmaxHead | VQLogitsHead) -> Callable[[], object]:
        return torch.no_grad()(lambda: head.logits(hidden))

    def code_logits(head: VQLogitsHead) -> Callable[[], object]:
        return torch.no_grad()(lambda: head.code_logits(hidden))

    def loss(head: SoftmaxHead | VQLogitsHead) -> Callable[[], object]:
        leaves = [hidden, *head.parameters()]
        return lambda: torch.autograd.grad(head.loss(hidden, target), leaves)

    calls = {}
    for name, head in heads.items():
        calls[f"{name} logits"] = logits(head)
        calls[f"{name} loss"] = loss(head)
        if isinstance(head, VQLogitsHead):
            calls[f"{name} codes"] = code_logits(head)
    return {name: waiting(call, run.device) for name, call in calls.items()}


# Identities ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Identities:
    """So many random layers, up to a size, in double precision."""

    layers: int
    vocabulary: int


@PAPER.claim(
    "The loss from one logit a code is the cross-entropy of all logits, tokens of a code are equally likely, and the "
    "bound by projection is its definition, all to 1e-6.",
    reported="-",
    holds_when=AtMost("largest_difference", 1e-6),
    scales={"smoke": Identities(5, 50), "small": Identities(100, 500), "full": Identities(100, 500)},
    seeds=3,
    gpu=(),
    note="What the other experiments rest on: they train and judge codebooks by these identities.",
)
def identities_are_exact(config: Identities, run: Run) -> Metrics:
    """Compare losses, gradients, probabilities and bounds with their definitions, on random layers."""
    rng = run.rng()
    worst = dict.fromkeys(("loss", "gradient", "ties", "bound"), 0.0)

    def note(name: str, found: Tensor, expected: Tensor) -> None:
        worst[name] = max(worst[name], (found - expected).abs().max().item())

    for index in run.progress(range(config.layers), "random layers"):
        vocabulary = int(rng.integers(2, config.vocabulary + 1))
        codes, width = int(rng.integers(1, vocabulary + 1)), int(rng.integers(1, 30))
        generator = run.generator(index)
        mapping = torch.randint(codes, (vocabulary,), generator=generator)
        bias = torch.randn(vocabulary, generator=generator) if index % 2 else None
        head = VQLogitsHead(width, vocabulary, codes, mapping, token_bias=bias).double()
        hidden = torch.randn(9, width, generator=generator, dtype=torch.float64, requires_grad=True)
        target = torch.randint(vocabulary, (9,), generator=generator)
        small, large = head.loss(hidden, target), F.cross_entropy(head.logits(hidden), target)
        note("loss", small, large)
        leaves = [hidden, *head.parameters()]
        for ours, theirs in zip(torch.autograd.grad(small, leaves), torch.autograd.grad(large, leaves), strict=True):
            note("gradient", ours, theirs)
        log_probs = F.log_softmax(2 * torch.randn(9, vocabulary, generator=generator, dtype=torch.float64), -1)
        probabilities = log_probs.exp()
        same_code = (mapping[:, None] == mapping).double()
        tied = (probabilities @ same_code / same_code.sum(0)).log()
        bound = (log_probs - tied).gather(1, target[:, None]).mean()
        note("bound", torch.tensor(projection_bound(log_probs, mapping, target), dtype=torch.float64), bound)
        divergence = (probabilities * (log_probs - tied)).sum(1).mean()
        note("bound", torch.tensor(projection_bound(log_probs, mapping), dtype=torch.float64), divergence)
        if bias is None:
            predicted = head.logits(hidden).softmax(-1)
            note("ties", predicted, predicted @ same_code / same_code.sum(0))
    run.table("largest differences", [{"of": name, "difference": value} for name, value in worst.items()])
    return {"largest_difference": max(worst.values())} | worst


# Quality -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WordModel:
    """A language model over words, whose dense output layer is replaced.

    ``train_split`` is trained on. ``test_split`` judges and the validation split chooses; where it is None, the first
    half of the validation split chooses and the second judges. The model is a 4-gram network, or a transformer of
    ``layers`` layers. It is trained for ``steps`` at every one of the ``rates``, and on with each output layer for
    ``more_steps`` at every one of ``more_rates``. The first ``validation_windows`` of the validation text, looked at
    ``looks`` times in each training, choose the rate and when to stop. Numbers of codes are shares of the vocabulary:
    one code for so many words.
    """

    corpus: str
    train_split: str
    test_split: str | None
    vocabulary: int | None
    width: int
    steps: int
    more_steps: int
    characters: int | None = None
    embedding: int = 64
    inner: int = 128
    layers: int = 0
    heads: int = 12
    context: int = 32
    batch_size: int = 16
    rates: tuple[float, ...] = (1e-3, 3e-3)
    more_rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    looks: int = 4
    few: int = 100
    some: int = 16
    many: int = 6
    autocast: torch.dtype | None = None
    validation_windows: int = 400


_MODELS = {
    "smoke": WordModel(
        "python-stdlib", "train", None, 600, width=16, steps=40, more_steps=20, characters=150_000, inner=32, looks=2,
        validation_windows=40,
    ),
    "small": WordModel("ptb", "test", None, None, width=64, steps=480, more_steps=320),
    "full": WordModel(
        "Salesforce/wikitext/wikitext-103-v1", "train", "test", 50_257, width=768, steps=100_000, more_steps=20_000,
        layers=12, context=512, batch_size=32, rates=(3e-4, 6e-4), more_rates=(3e-5, 1e-4, 3e-4), looks=10,
        autocast=torch.bfloat16,
    ),
}  # fmt: skip

_SPLIT_NOTE = (
    "A 4-gram network of 64 features, trained on the test file of the Penn Treebank (82 000 words, 6049 different "
    "ones), as its training file is not at hand; the first half of its validation file chooses learning rate and "
    "stopping time, the second half judges. Every layer, the dense one included, gets the same further steps from the "
    "same trained model, at the best of the same three rates. "
)


@PAPER.claim(
    "With one code for a hundred words, at 99 % fewer parameters, k-means and fine-tuning, the paper's layer raises "
    "perplexity by at most 10 %.",
    reported="4 % more perplexity, at up to 99 % fewer parameters",
    holds_when=Ratio("perplexity_few", "perplexity_dense", at_most=1.10),
    scales=_MODELS,
    seeds=3,
    note=_SPLIT_NOTE + "The bound, two and a half times the paper's 4 %, leaves room for smaller models.",
)
def costs_at_most_ten_percent_of_perplexity(config: WordModel, run: Run) -> Metrics:
    """Fine-tune the dense layer and the paper's, from k-means, with few codes."""
    study = _Study(config, run)
    results = {"dense": study.dense(), "few": study.kmeans(config.few)}
    study.report(results)
    return _perplexities(results)


@PAPER.claim(
    "A bias a token, its share of its code in the training text, takes away at least a third of what the paper's layer "
    "costs.",
    reported="- (our extension)",
    holds_when=AllOf(
        Ratio("cost_few_unigram", "cost_few", at_most=2 / 3), Ratio("cost_some_unigram", "cost_some", at_most=2 / 3)
    ),
    scales=_MODELS,
    seeds=3,
    note=(
        _SPLIT_NOTE + "Costs are nats a word above the dense layer, with one code for a hundred words and for sixteen."
    ),
)
def token_bias_repairs_a_third(config: WordModel, run: Run) -> Metrics:
    """Fine-tune the paper's layer and the one with token biases, from the same clusters."""
    study = _Study(config, run)
    results = {"dense": study.dense()}
    for name, share in (("few", config.few), ("some", config.some)):
        results[name] = study.kmeans(share)
        results[f"{name}_unigram"] = study.kmeans(share, has_token_bias=True)
    study.report(results)
    return _perplexities(results) | _costs(results)


@PAPER.claim(
    "The bound by projection tells beforehand what the paper's layer will cost: after fine-tuning its perplexity is "
    "within 5 % below and 10 % above the bound.",
    reported="- (our analysis)",
    holds_when=AllOf(
        *(Ratio(f"perplexity_{name}", f"bound_{name}", at_least=0.95, at_most=1.10) for name in ("few", "some", "many"))
    ),
    scales=_MODELS,
    seeds=5,
    note=(
        _SPLIT_NOTE + "The bound is that of the trained model before fine-tuning, with its codes' masses kept. Codes "
        "for a hundred, sixteen and six words."
    ),
)
def bound_predicts_the_cost(config: WordModel, run: Run) -> Metrics:
    """Project the trained model on what each mapping can express; then fine-tune with it."""
    study = _Study(config, run)
    results, bounds = {}, {}
    for name, share in (("few", config.few), ("some", config.some), ("many", config.many)):
        results[name] = study.kmeans(share)
        bounds[f"bound_{name}"] = math.exp(study.projected(study.compressed(share), study.corpus.test))
    study.report(results, {name: bounds[f"bound_{name}"] for name in results})
    return _perplexities(results) | bounds


@PAPER.claim(
    "Starting from k-means gives at least 10 % less perplexity than a random mapping trained from the beginning.",
    reported="k-means initialisation helps (numbers not available to us)",
    holds_when=Ratio("perplexity_some", "perplexity_random", at_most=0.9),
    scales=_MODELS,
    seeds=5,
    note=(
        _SPLIT_NOTE
        + "One code for sixteen words. The random mapping is balanced, and its model is trained with it for "
        "as many steps as the other's two trainings together."
    ),
)
def kmeans_is_better_than_random(config: WordModel, run: Run) -> Metrics:
    """Train with a random mapping from scratch, and fine-tune from k-means."""
    study = _Study(config, run)
    results = {"some": study.kmeans(config.some), "random": study.random_from_scratch(config.some)}
    study.report(results)
    return _perplexities(results)


@PAPER.claim(
    "The paper's layer is robust to the number of codes: with one code for a hundred words its perplexity is at most "
    "10 % above that with one for six.",
    reported="robust to the number of vectors (numbers not available to us)",
    holds_when=Ratio("perplexity_few", "perplexity_many", at_most=1.10),
    scales=_MODELS,
    seeds=5,
    note=_SPLIT_NOTE + "Both from k-means, fine-tuned.",
)
def is_robust_to_the_number_of_codes(config: WordModel, run: Run) -> Metrics:
    """Fine-tune from k-means with several numbers of codes."""
    study = _Study(config, run)
    shares = {"few": config.few, "some": config.some, "many": config.many}
    results = {name: study.kmeans(share) for name, share in shares.items()}
    study.report(results)
    return _perplexities(results)


@PAPER.claim(
    "Codes of their own for frequent words, clusters for the rest, lower the perplexity of the paper's layer by at "
    "least 5 % at an equal number of codes.",
    reported="- (our extension)",
    holds_when=AllOf(
        Ratio("perplexity_few_frequency", "perplexity_few", at_most=0.95),
        Ratio("perplexity_some_frequency", "perplexity_some", at_most=0.95),
    ),
    scales=_MODELS,
    seeds=3,
    note=(
        _SPLIT_NOTE + "One code for a hundred words and for sixteen. How many codes are clusters, a quarter, half or "
        "three quarters, is what the bound by projection on the validation text says, before fine-tuning. The "
        "table also has codes that are about equally frequent, which puts words of like frequency together, and one "
        "with token biases; these do not count for the verdict."
    ),
)
def frequent_words_want_their_own_codes(config: WordModel, run: Run) -> Metrics:
    """Fine-tune from k-means, and from codes for frequent words and clusters of the rest."""
    study = _Study(config, run)
    results = {}
    for name, share in (("few", config.few), ("some", config.some)):
        results[name] = study.kmeans(share)
        results[f"{name}_balanced"] = study.balanced(share)
        results[f"{name}_frequency"] = study.frequency_kmeans(share)
    results["few_frequency_unigram"] = study.frequency_kmeans(config.few, has_token_bias=True)
    study.report(results)
    return _perplexities(results)


@PAPER.claim(
    "A mapping learned through a straight-through estimator lowers perplexity by at least 2 % against the k-means "
    "mapping it starts from.",
    reported="learned or pre-assigned mappings (numbers not available to us)",
    holds_when=Ratio("perplexity_learned", "perplexity_some", at_most=0.98),
    scales=_MODELS,
    seeds=5,
    note=(
        _SPLIT_NOTE + "One code for sixteen words. Rows are assigned to their nearest codes eight times in the further "
        "steps. How the paper learns its mapping is not known to us."
    ),
)
def learned_mapping_is_better(config: WordModel, run: Run) -> Metrics:
    """Fine-tune with the k-means mapping, and with one that is learned from it."""
    study = _Study(config, run)
    results = {"some": study.kmeans(config.some), "learned": study.learned(config.some)}
    study.report(results)
    return _perplexities(results)


@PAPER.claim(
    "At equal bytes a codebook with token biases is at least as good as a low-rank layer and as an adaptive softmax.",
    reported="- (no rivals at equal size in the abstract)",
    holds_when=AllOf(
        Ratio("perplexity_some_unigram", "perplexity_low_rank", at_most=1.0),
        Ratio("perplexity_some_unigram", "perplexity_adaptive", at_most=1.0),
    ),
    scales=_MODELS,
    seeds=3,
    note=(
        _SPLIT_NOTE + "One code for sixteen words, table and biases included; the rivals may take as many bytes. The "
        "low-rank layer starts from the singular values of the dense one. The adaptive softmax has the most frequent "
        "words that fit in its head and one tail; it has no dense layer to start from, so that its model is trained "
        "with it from the beginning, for all steps. A codebook with codes of their own for frequent words stands in "
        "the table, and does not count for the verdict."
    ),
)
def is_better_than_rivals_at_equal_bytes(config: WordModel, run: Run) -> Metrics:
    """Fine-tune codebooks and a low-rank layer, and train with an adaptive softmax, at equal bytes."""
    study = _Study(config, run)
    results = {
        "some_unigram": study.kmeans(config.some, has_token_bias=True),
        "some_frequency_unigram": study.frequency_kmeans(config.some, has_token_bias=True),
    }
    budget = results["some_unigram"].bytes
    results |= {"low_rank": study.low_rank(budget), "adaptive": study.adaptive_from_scratch(budget)}
    study.report(results)
    return _perplexities(results)


# Evaluation forms so many logits at a time.
_AT_ONCE = 1 << 26


@dataclass(frozen=True)
class _Corpus:
    train: Tensor
    validation: Tensor
    test: Tensor
    counts: Tensor


@dataclass(frozen=True)
class _Result:
    """A trained layer: its size, the chosen rate, nats a word on the test text, accuracy, and its floor."""

    name: str
    codes: int | None
    bytes: int
    rate: float
    loss: float
    accuracy: float
    floor: float | None


class _FourGram(nn.Module):
    """``tanh`` layers over the embeddings of four words; at the start of a window zeros stand for words."""

    def __init__(self, num_words: int, embedding: int, inner: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_words, embedding)
        self.inner = nn.Linear(4 * embedding, inner)
        self.outer = nn.Linear(inner, width)

    def forward(self, tokens: Tensor) -> Tensor:
        embedded = F.pad(self.embedding(tokens), (0, 0, 3, 0)).unfold(1, 4, 1).flatten(2)
        hidden: Tensor = self.outer(self.inner(embedded).tanh()).tanh()
        return hidden


class _Transformer(nn.Module):
    """The hidden vectors of a causal transformer; its tied output layer is left unused."""

    def __init__(self, config: WordModel, num_words: int) -> None:
        super().__init__()
        self.model = LanguageModel(
            num_words, config.width, config.layers, config.heads, config.context, activation=F.gelu
        )

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model.features(tokens)


class _Study:
    """A trained language model of one seed, and what becomes of it with other output layers."""

    def __init__(self, config: WordModel, run: Run) -> None:
        self.config, self.run = config, run
        self.corpus = _load(config)
        self.num_words = len(self.corpus.counts)
        trained = [self._fit(self._trunk(), self._dense(), "dense", rate, config.steps) for rate in config.rates]
        best = min(trained, key=lambda fitted: fitted.validation_loss)
        self.trunk, self.head = best.trunk, cast(SoftmaxHead, best.head)

    def dense(self) -> _Result:
        return self._tune("dense", lambda: copy.deepcopy(self.head))

    def kmeans(self, share: int, *, has_token_bias: bool = False) -> _Result:
        name = "k-means and token biases" if has_token_bias else "k-means"
        return self._fine_tune(self.compressed(share, has_token_bias=has_token_bias), name)

    def balanced(self, share: int) -> _Result:
        return self._fine_tune(self.compressed(share, "frequency"), "equally frequent codes")

    def frequency_kmeans(self, share: int, *, has_token_bias: bool = False) -> _Result:
        """Clusters for a quarter, half or three quarters of the codes, whichever projects best."""
        heads = [
            self.compressed(
                share,
                "frequency+kmeans",
                has_token_bias=has_token_bias,
                num_shared=max(1, self._codes(share) * quarters // 4),
            )
            for quarters in (1, 2, 3)
        ]
        best = min(heads, key=lambda head: self.projected(head, self.corpus.validation, self.config.validation_windows))
        name = "frequent words alone, k-means" + (" and token biases" if has_token_bias else "")
        return self._fine_tune(best, name)

    def compressed(
        self,
        share: int,
        method: MappingMethod = "kmeans",
        *,
        has_token_bias: bool = False,
        num_shared: int | None = None,
    ) -> VQLogitsHead:
        return VQLogitsHead.from_linear(
            self.head.linear,
            self._codes(share),
            method,
            counts=self.corpus.counts,
            token_bias="unigram" if has_token_bias else None,
            num_shared=num_shared,
            seed=self.run.seed,
        )

    def learned(self, share: int) -> _Result:
        linear, codes = self.head.linear, self._codes(share)
        return self._tune(
            "learned mapping", lambda: StraightThroughVQHead.from_linear(linear, codes, seed=self.run.seed)
        )

    def low_rank(self, budget: int) -> _Result:
        rank = (budget // 4 - self.num_words) // (self.config.width + self.num_words)
        return self._tune("low rank", lambda: LowRankHead.from_linear(self.head.linear, max(1, rank)))

    def random_from_scratch(self, share: int) -> _Result:
        mapping = random_mapping(self.num_words, self._codes(share), self.run.generator(2))
        return self._tune(
            "random mapping",
            lambda: VQLogitsHead(self.config.width, self.num_words, self._codes(share), mapping),
            from_scratch=True,
        )

    def adaptive_from_scratch(self, budget: int) -> _Result:
        cutoff, divisor = _adaptive_shape(budget // 4, self.num_words, self.config.width)
        return self._tune(
            "adaptive softmax",
            lambda: AdaptiveSoftmaxHead(self.config.width, self.corpus.counts, (cutoff,), divisor),
            from_scratch=True,
        )

    @torch.no_grad()
    def projected(self, head: VQLogitsHead, tokens: Tensor, windows: int | None = None) -> float:
        """Nats a word of the trained model with its distribution tied by a head's mapping, over so many windows."""
        total, count = 0.0, 0
        mapping = head.mapping.to(self.run.device)
        for hidden, target in self._batches(self.trunk, tokens, windows):
            log_probs = F.log_softmax(self.head.logits(hidden).float(), -1)
            excess = projection_bound(log_probs, mapping, target, head.token_bias)
            total += (excess + F.nll_loss(log_probs.flatten(0, 1), target.flatten()).item()) * target.numel()
            count += target.numel()
        return total / count

    def report(self, results: Mapping[str, _Result], bounds: Mapping[str, float] | None = None) -> None:
        """A table of all layers and a picture of their perplexities."""
        rows = []
        for name, result in results.items():
            row: dict[str, str | int | float | None] = {
                "layer": result.name,
                "codes": result.codes,
                "bytes": result.bytes,
                "learning rate": result.rate,
                "perplexity": math.exp(result.loss),
                "accuracy": result.accuracy,
                "lowest possible perplexity": None if result.floor is None else math.exp(result.floor),
            }
            if bounds is not None:
                row["perplexity by projection"] = bounds[name]
            rows.append(row)
        self.run.table(f"{self.num_words} words, {self.config.width} features", rows)
        figure = Figure(figsize=(6, 0.5 + 0.45 * len(results)))
        axes = figure.add_subplot()
        labels = [r.name if r.codes is None else f"{r.name}, {r.codes} codes" for r in results.values()]
        values = [math.exp(result.loss) for result in results.values()]
        axes.barh(labels, values)
        if bounds is not None:
            axes.plot([bounds[name] for name in results], labels, "k|", markersize=18, label="by projection")
            axes.legend(frameon=False)
        axes.invert_yaxis()
        axes.set(xlabel="perplexity")
        told = "; ".join(f"{label}: {value:.0f}" for label, value in zip(labels, values, strict=True))
        self.run.figure("perplexity", figure, f"Perplexity on the test text. {told}.")

    def _fine_tune(self, head: VQLogitsHead, name: str) -> _Result:
        return self._tune(name, lambda: copy.deepcopy(head))

    def _codes(self, share: int) -> int:
        return max(2, self.num_words // share)

    def _trunk(self) -> nn.Module:
        torch.manual_seed(self.run.seed)
        config = self.config
        if config.layers:
            return _Transformer(config, self.num_words).to(self.run.device)
        return _FourGram(self.num_words, config.embedding, config.inner, config.width).to(self.run.device)

    def _dense(self) -> SoftmaxHead:
        return SoftmaxHead(self.config.width, self.num_words)

    def _tune(self, name: str, build: Callable[[], nn.Module], *, from_scratch: bool = False) -> _Result:
        """Train on at every rate, from the trained model or from scratch; the validation text chooses."""
        config = self.config
        fitted = []
        for rate in config.rates if from_scratch else config.more_rates:
            trunk = self._trunk() if from_scratch else copy.deepcopy(self.trunk)
            steps = config.steps + config.more_steps if from_scratch else config.more_steps
            fitted.append(self._fit(trunk, build(), name, rate, steps))
        best = min(fitted, key=lambda one: one.validation_loss)
        head = best.head.freeze() if isinstance(best.head, StraightThroughVQHead) else best.head
        is_literal = isinstance(head, VQLogitsHead) and head.token_bias is None
        return _Result(
            name,
            head.num_codes if isinstance(head, VQLogitsHead) else None,
            _bytes(head),
            best.rate,
            self._loss(best.trunk, head, self.corpus.test),
            self._accuracy(best.trunk, head, self.corpus.test),
            tying_floor(self.corpus.test, cast(VQLogitsHead, head).mapping.cpu()) if is_literal else None,
        )

    def _fit(self, trunk: nn.Module, head: nn.Module, name: str, rate: float, steps: int) -> _Fitted:
        """Adam at a constant rate; in the end the best state at one of the looks, the first before any step."""
        config, run = self.config, self.run
        trunk.train()
        head = head.to(run.device).train()
        part = cast(Head, head)
        optimizer = torch.optim.Adam([*trunk.parameters(), *head.parameters()], lr=rate)
        generator = run.generator(1)
        best = _Fitted(copy.deepcopy(trunk), copy.deepcopy(head), rate, self._validation_loss(trunk, head))
        for step in run.progress(range(1, steps + 1), f"{name} at {rate:g}"):
            window = random_windows(self.corpus.train, config.context + 1, config.batch_size, generator).to(run.device)
            with torch.autocast(run.device.type, config.autocast, enabled=config.autocast is not None):
                loss = part.loss(trunk(window[:, :-1]), window[:, 1:])
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward([loss])
            optimizer.step()
            if isinstance(head, StraightThroughVQHead) and step % max(1, steps // 8) == 0:
                head.remap()
            if step * config.looks // steps > (step - 1) * config.looks // steps:
                found = self._validation_loss(trunk, head)
                if found < best.validation_loss:
                    best = _Fitted(copy.deepcopy(trunk), copy.deepcopy(head), rate, found)
        return best

    def _batches(self, trunk: nn.Module, tokens: Tensor, windows: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
        """Hidden vectors and targets of a text, window by window."""
        config = self.config
        shown = consecutive_windows(tokens, config.context + 1, len(tokens) if windows is None else windows)
        with evaluating(trunk):
            for batch in torch.split(shown.to(self.run.device), max(1, _AT_ONCE // (config.context * self.num_words))):
                with torch.autocast(self.run.device.type, config.autocast, enabled=config.autocast is not None):
                    hidden = trunk(batch[:, :-1])
                yield hidden.float(), batch[:, 1:]

    @torch.no_grad()
    def _loss(self, trunk: nn.Module, head: nn.Module, tokens: Tensor, windows: int | None = None) -> float:
        """Nats a word, over so many windows at most."""
        if isinstance(head, StraightThroughVQHead):
            head = head.freeze()
        total, count = 0.0, 0
        with evaluating(head):
            for hidden, target in self._batches(trunk, tokens, windows):
                total += cast(Head, head).loss(hidden, target).item() * target.numel()
                count += target.numel()
        return total / count

    def _validation_loss(self, trunk: nn.Module, head: nn.Module) -> float:
        return self._loss(trunk, head, self.corpus.validation, self.config.validation_windows)

    @torch.no_grad()
    def _accuracy(self, trunk: nn.Module, head: nn.Module, tokens: Tensor) -> float:
        """Share of words that are likeliest; a tie of n counts 1/n."""
        right, count = 0.0, 0
        with evaluating(head):
            for hidden, target in self._batches(trunk, tokens):
                right += _right(head, hidden, target)
                count += target.numel()
        return right / count


@dataclass(frozen=True)
class _Fitted:
    trunk: nn.Module
    head: nn.Module
    rate: float
    validation_loss: float


def _right(head: nn.Module, hidden: Tensor, target: Tensor) -> float:
    if not isinstance(head, VQLogitsHead):
        return (cast(Head, head).logits(hidden).argmax(-1) == target).sum().item()
    best = head.topk(hidden)[1][..., 0]
    if head.token_bias is not None:
        return (best == target).sum().item()
    codes = head.mapping[target]
    return ((head.mapping[best] == codes) / head.code_sizes[codes]).sum().item()


def _bytes(head: nn.Module) -> int:
    if isinstance(head, VQLogitsHead):
        return head_cost(
            head.in_features,
            head.num_classes,
            head.num_codes,
            bias=head.codebook.bias is not None,
            has_token_bias=head.token_bias is not None,
        ).bytes
    return 4 * sum(parameter.numel() for parameter in head.parameters())


def _adaptive_shape(numbers: int, num_words: int, width: int) -> tuple[int, float]:
    """Cutoff and divisor of the adaptive softmax with the widest tail for half of the numbers, and the widest head.

    With a tail of t features and c words in the head it has ``width (c + 1 + t) + t (words - c)`` numbers.
    """
    tail = max(1, min(width // 2, numbers // (2 * num_words)))
    cutoff = (numbers - width * (1 + tail) - tail * num_words) // (width - tail)
    return max(1, min(cutoff, num_words - 1)), width / tail


def _load(config: WordModel) -> _Corpus:
    train = cast(Text, load(config.corpus, config.train_split, config.characters)).text
    held_out = [
        cast(Text, load(config.corpus, split, config.characters)).text
        for split in ("validation", config.test_split)
        if split is not None
    ]
    counts: Counter[str] = Counter()
    for line in train.splitlines():
        counts.update(_words(line))
    counts["<unk>"] += 0
    kept = [word for word, _ in counts.most_common(config.vocabulary)]
    if "<unk>" not in kept:
        kept[-1] = "<unk>"
    index = {word: number for number, word in enumerate(kept)}
    tokens = _encode(train, index)
    validation, *test = (_encode(text, index) for text in held_out)
    if not test:
        half = len(validation) // 2
        validation, test = validation[:half], [validation[half:]]
    return _Corpus(tokens, validation, test[0], torch.bincount(tokens, minlength=len(kept)))


def _words(line: str) -> list[str]:
    return [*line.split(), "<eos>"]


def _encode(text: str, index: Mapping[str, int]) -> Tensor:
    """Line by line, as the words of a large text as Python strings would fill the memory."""
    numbers = array("i")
    unknown = index["<unk>"]
    for line in text.splitlines():
        numbers.extend(index.get(word, unknown) for word in _words(line))
    return torch.frombuffer(numbers, dtype=torch.int32).long()


def _perplexities(results: Mapping[str, _Result]) -> dict[str, float]:
    metrics = {f"perplexity_{name}": math.exp(result.loss) for name, result in results.items()}
    return metrics | {f"accuracy_{name}": result.accuracy for name, result in results.items()}


def _costs(results: Mapping[str, _Result]) -> dict[str, float]:
    """Nats above the dense layer; ratios need positive numbers, so at least a ten-thousandth."""
    dense = results["dense"].loss
    return {f"cost_{name}": max(1e-4, r.loss - dense) for name, r in results.items() if name != "dense"}
