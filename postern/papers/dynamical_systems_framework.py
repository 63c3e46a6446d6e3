"""Attention, state-space models and recurrent networks as one recurrence."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from itertools import pairwise
from typing import Literal, Protocol, cast

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from postern.attention import LinearAttention, NormalizedAttention, SelfAttention, attend
from postern.attention.normalized import NormaliserKind
from postern.claims import AllOf, AtLeast, AtMost, Difference, Metrics, Paper, Run
from postern.data import multi_query_recall, paired_recall
from postern.dynamics import (
    QLSTM,
    AttentionForm,
    LinearTimeVarying,
    S6Mixer,
    SSDForm,
    SSDMixer,
    couple,
    reversed_sigmoid,
    taylor_exp,
    taylor_exp_error_bound,
    taylor_feature_count,
    to_state_space,
)
from postern.dynamics.tied_recurrence import Realisation
from postern.nets import evaluating

PAPER = Paper(
    slug="dynamical-systems-framework",
    title=(
        "Understanding the differences in Foundation Models: Attention, State Space Models, and Recurrent Neural "
        "Networks"
    ),
    date=date(2024, 5, 24),
    arxiv="2405.15731",
    authors=5,
    family="dynamics",
    summary=(
        "Softmax attention, linear attention, selective state-space models and gated recurrent networks are "
        "written as one linear recurrence whose coefficients vary with time. Side by side it shows that linear "
        "attention approaches softmax only by enlarging its state, that it differs from a state-space model only "
        "in how transition and input scale are tied, and that the normaliser may be any positive function of the "
        "input. For those who compare or convert sequence mixers it is a converter and a test oracle."
    ),
    reported=(
        "Linear attention approaches softmax as the state expansion grows from 32 to 256 on multi-query "
        "associative recall (curves; numbers not available to us).",
        "A learnt normaliser closes part of the gap between linear and softmax attention, and S6 and SSD come near "
        "softmax (numbers not available to us).",
        "Giving the qLSTM the gate of S6 helps it, most on the longer tasks (numbers not available to us).",
    ),
    components=(
        "postern.dynamics.LinearTimeVarying",
        "postern.dynamics.to_state_space",
        "postern.dynamics.TiedRecurrence",
        "postern.dynamics.tie",
        "postern.dynamics.to_linear_attention",
        "postern.dynamics.to_normalized_attention",
        "postern.dynamics.to_ssd",
        "postern.dynamics.couple",
        "postern.dynamics.coupling_residuals",
        "postern.dynamics.linear_vs_ssd_gap",
        "postern.dynamics.taylor_softmax_features",
        "postern.dynamics.taylor_softmax_error_bound",
        "postern.dynamics.diagonal_scan",
        "postern.dynamics.S6Mixer",
        "postern.dynamics.SSDMixer",
        "postern.dynamics.QLSTM",
        "postern.attention.NormalizedAttention",
        "postern.data.multi_query_recall",
        "postern.data.paired_recall",
    ),
    code="IntelligentControlSystems/dsf-mqar",
    details=(
        "The coefficients depend on the tokens: a conversion holds for the sequence that it was made for.",
        "The normaliser of linear attention depends on the query and on all keys before it. It cancels, so that the "
        "form is exact, but it is no function of the token alone, as that of normalised attention is.",
        "With the normaliser in the transition, eta_{i-1} / eta_i overflows where exponentials differ much; divided at "
        "the output it does not. Both realisations are there.",
        "Weights of normalised attention do not sum to one: its outputs grow with the length, and a normaliser whose "
        "weights start large can blow up early.",
        "A truncated exponential is positive everywhere for even orders alone; an odd one may give a denominator of 0.",
        "A convolution before the recurrence keeps earlier tokens, which no diagonal transition does. The form covers "
        "the layers without it; gates, heads and biases are no obstacle.",
        "A masked token has a step of 0 (a forget gate of 1), so that it adds nothing and lets nothing fade.",
        "In multi-query associative recall the label stands at the key that asks, and no key asks twice. Positions are "
        "embedded for attention and qLSTM alone.",
    ),
    differences=(
        "The common form has a term for what biases of values and outputs add.",
        "The way back from the common form, with its conditions and residuals, the solution of the coupling equations "
        "by Lambert's W and the error bounds of truncated softmax are ours.",
        "The scan is plain PyTorch, sequential or associative; the paper's code needs kernels for CUDA.",
        "The normaliser's weights start at a standard deviation of 0.02 and its bias at 0; in the paper's code they "
        "start as any linear layer's.",
        "SSD has no normalisation behind its gate, which Mamba-2 has.",
        "At full scale batches are fresh, cosine decay runs over all steps without an early stop, and linear layers "
        "keep torch's initial weights; the paper's code repeats 100,000 sequences for 64 epochs.",
        "At small scale tokens that hold a key and a value together stand in for multi-query associative recall, as "
        "one layer can learn them in seconds; task and thresholds were chosen with pilot runs in view.",
    ),
    example="""import torch

from postern.attention import LinearAttention, NormalizedAttention
from postern.dynamics import AttentionForm, S6Mixer, SSDForm, couple, to_ssd, to_state_space

# Three layers as one recurrence, exactly.
torch.manual_seed(0)
x = torch.randn(1, 16, 8, dtype=torch.float64)
for layer in (
    LinearAttention(8, 2, is_causal=True),
    NormalizedAttention(8, 2, key_dim=3, is_causal=True),
    S6Mixer(8, 4, conv_width=None),
):
    system = to_state_space(layer.double(), x)
    error = (system.run(x) - layer(x)).abs().max()
    print(f"{type(layer).__name__}: {system.num_states} states, off by {error:.0e}")

# Normalised attention and SSD are the same function when one first step gives all normalisers.
query, key = torch.randn(2, 16, 4, dtype=torch.float64)
eta, step = couple(0.5, rate=0.8, time=16)
attention = AttentionForm(query, key, torch.eye(8, dtype=torch.float64), eta)
print("SSD with the rate", f"{to_ssd(attention.recurrence()).rate:.3f}")
try:
    to_ssd(AttentionForm(query, key, torch.eye(8, dtype=torch.float64), 1 + eta).recurrence("transition"))
except ValueError as error:
    print(error)
""",
)


# The common form -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layers:
    """Random layers of ``width`` features and a state expansion of ``expansion`` on ``time`` tokens, in float64."""

    time: int = 24
    width: int = 6
    expansion: int = 4
    order: int = 6


def _random_layers(config: Layers) -> dict[str, nn.Module]:
    """Layers with random weights, large enough for transitions that differ from token to token."""
    width, expansion = config.width, config.expansion
    layers: dict[str, nn.Module] = {
        "truncated softmax": SelfAttention(width, 2, is_causal=True),
        "linear": LinearAttention(width, 2, key_dim=expansion, is_causal=True),
        "normalised": NormalizedAttention(width, 2, key_dim=expansion, is_causal=True),
        "S6": S6Mixer(width, expansion, conv_width=None),
        "SSD": SSDMixer(width, 2, expansion, conv_width=None),
        "qLSTM": QLSTM(width, conv_width=None, has_reversed_gate=False),
        "qLSTM, reversed gate": QLSTM(width, conv_width=None),
    }
    for layer in layers.values():
        layer.double()
        for name, parameter in layer.named_parameters():
            if name == "step.bias" or (parameter.dim() == 2 and name != "log_rate"):
                nn.init.normal_(parameter, std=0.5)
    return layers


def _by_definition(layer: nn.Module, x: Tensor, order: int) -> Tensor:
    """What a layer computes, by the sums and loops that define it."""
    if isinstance(layer, SelfAttention | LinearAttention | NormalizedAttention):
        return _attention_by_definition(layer, x, order)
    time = x.shape[1]
    if isinstance(layer, QLSTM):
        z = F.linear(x, layer.input.weight)
        forget, enter, leave = F.linear(z, layer.gates.weight, layer.gates.bias).chunk(3, dim=-1)
        forget = forget.sigmoid() if layer.exponent is None else (-forget).sigmoid() ** layer.exponent.relu()
        state, outputs = torch.zeros_like(z[:, 0]), []
        for t in range(time):
            state = forget[:, t] * state + enter[:, t].sigmoid() * z[:, t]
            outputs.append(leave[:, t].sigmoid() * state)
        return F.linear(torch.stack(outputs, dim=1) * F.gelu(F.linear(x, layer.gate.weight)), layer.output.weight)
    assert isinstance(layer, S6Mixer | SSDMixer)
    assert layer.gate is not None
    inner = F.linear(x, layer.input.weight)
    rate: Tensor
    skip: Tensor
    if isinstance(layer, S6Mixer):
        u = inner
        low_key_query = F.linear(u, layer.project.weight)
        low, key, query = torch.split(low_key_query, [layer.step_rank, layer.state_dim, layer.state_dim], dim=-1)
        step = F.softplus(F.linear(low, layer.step.weight, layer.step.bias))
        rate, skip = layer.log_rate.exp(), layer.skip
    else:
        u, key, query = torch.split(inner, [layer.inner_dim, layer.state_dim, layer.state_dim], dim=-1)
        size = layer.inner_dim // layer.num_heads
        step = F.softplus(F.linear(x, layer.step.weight, layer.step.bias)).repeat_interleave(size, dim=-1)
        rate = layer.log_rate.exp().repeat_interleave(size).unsqueeze(-1)
        skip = layer.skip.repeat_interleave(size)
    state = torch.zeros(len(x), layer.inner_dim, layer.state_dim, dtype=x.dtype)
    outputs = []
    for t in range(time):
        pushed = (step[:, t] * u[:, t]).unsqueeze(-1) * key[:, t].unsqueeze(1)
        state = torch.exp(-step[:, t].unsqueeze(-1) * rate) * state + pushed
        outputs.append((state * query[:, t].unsqueeze(1)).sum(-1) + skip * u[:, t])
    return F.linear(torch.stack(outputs, dim=1) * F.silu(F.linear(x, layer.gate.weight)), layer.output.weight)


def _attention_by_definition(
    layer: SelfAttention | LinearAttention | NormalizedAttention, x: Tensor, order: int
) -> Tensor:
    earlier = torch.ones(x.shape[1], x.shape[1], dtype=x.dtype).tril()
    query, key, value = (
        projection(x).unflatten(-1, (layer.num_heads, -1)).transpose(1, 2)
        for projection in (layer.query, layer.key, layer.value)
    )
    if isinstance(layer, LinearAttention):
        query, key = F.elu(query) + 1, F.elu(key) + 1
    weights = query @ key.mT
    if isinstance(layer, NormalizedAttention):
        assert layer.normalise is not None
        weights = weights * earlier / layer.normalise(x).exp().mT.unsqueeze(-1)
    else:
        if isinstance(layer, SelfAttention):
            weights = taylor_exp(weights / math.sqrt(query.shape[-1]), order)
        eps = layer.eps if isinstance(layer, LinearAttention) else 0.0
        weights = weights * earlier
        weights = weights / (weights.sum(-1, keepdim=True) + eps)
    output: Tensor = layer.output((weights @ value).transpose(1, 2).flatten(2))
    return output


def _difference(found: Tensor, expected: Tensor) -> float:
    """As a share of the largest expected entry."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


@PAPER.claim(
    "Truncated softmax, linear and normalised attention, S6, SSD and qLSTM are one linear recurrence exactly; "
    "normalised attention and SSD are the same function where the coupling equations hold, and not elsewhere.",
    reported="derived in the paper",
    holds_when=AllOf(
        AtMost("largest_difference", 1e-10),
        AtMost("unrolled_difference", 1e-10),
        AtMost("reversed_sigmoid_difference", 1e-14),
        AtLeast("uncoupled_difference", 1e-2),
        AtMost("coupled_difference", 1e-10),
        AtLeast("shifted_difference", 1e-2),
    ),
    scales={"smoke": Layers(), "small": Layers()},
    seeds=5,
    note=(
        "Differences are shares of the largest entry, in float64. The control shifts the transitions by one token, "
        "which must be noticed in every layer that has some. All equalities hold to rounding; the control is "
        "inconclusive: in one of five seeds a layer's transitions hardly vary, and its outputs change by 0.7 % where "
        "one was asked."
    ),
)
@torch.no_grad()
def common_form_is_exact(config: Layers, run: Run) -> Metrics:
    """Compare the common form with definitions; then SSD with normalised attention, uncoupled and coupled."""
    generator = run.generator()
    x = torch.randn(2, config.time, config.width, generator=generator, dtype=torch.float64)
    rows: list[dict[str, str | int | float]] = []
    recurrences, unrolled, shifted = [], [], []
    for name, layer in run.progress(_random_layers(config).items(), "layers"):
        expected = _by_definition(layer, x, config.order)
        order = config.order if isinstance(layer, SelfAttention) else None
        realisations: Sequence[Realisation] = ("output", "transition") if hasattr(layer, "value") else ("output",)
        for realisation in realisations:
            system = to_state_space(layer, x, order=order, realisation=realisation)
            product = torch.einsum("bijow,bjw->bio", system.unroll(), x)
            recurrences.append(_difference(system.run(x), expected))
            unrolled.append(_difference(product if system.offset is None else product + system.offset, expected))
            late = replace(system, A=system.A.roll(1, dims=1))
            has_transition = not torch.equal(system.A, torch.ones_like(system.A))
            if has_transition:
                shifted.append(_difference(late.run(x), expected))
            rows.append(
                {
                    "layer": name,
                    "normaliser in": realisation if hasattr(layer, "value") else "-",
                    "states": system.num_states,
                    "recurrence off by": recurrences[-1],
                    "unrolled off by": unrolled[-1],
                    "shifted off by": shifted[-1] if has_transition else "-",
                }
            )
    run.table("layers", rows)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    query, key = drawn(config.time, config.expansion), drawn(config.time, config.expansion)
    value = drawn(config.width, config.width)
    u = drawn(config.time, config.width)
    eta, step = drawn(config.time).exp(), F.softplus(drawn(config.time))
    attention = AttentionForm(query, key, value, eta)
    by_matrix = ((query @ key.mT).tril() / eta[:, None])[..., None, None] * value
    uncoupled = _system(SSDForm(query, key, value, step, 1.0)), _system(attention)
    first, rate = step[0].item(), 0.5 + torch.rand((), generator=generator).item()
    eta, step = couple(first, rate, config.time)
    coupled = _system(SSDForm(query, key, value, step, rate)), _system(AttentionForm(query, key, value, eta))
    logits, exponent = 5 * drawn(1000), 3 * torch.rand(1000, generator=generator, dtype=torch.float64)
    return {
        "largest_difference": max(recurrences),
        "unrolled_difference": max(*unrolled, _difference(_system(attention).unroll(), by_matrix)),
        "reversed_sigmoid_difference": (
            (reversed_sigmoid(logits, exponent) - torch.sigmoid(-logits) ** exponent).abs().max().item()
        ),
        "uncoupled_difference": _difference(*(system.run(u) for system in uncoupled)),
        "coupled_difference": _difference(*(system.run(u) for system in coupled)),
        "shifted_difference": min(shifted),
    }


def _system(form: AttentionForm | SSDForm) -> LinearTimeVarying:
    return form.recurrence().system()


# Softmax as a state that grows ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Truncation:
    """Attention on ``time`` tokens with keys of ``dim`` features, its logits scaled to each of ``magnitudes``.

    ``orders`` are looked at for the largest magnitude; a state is enough at an output error of ``tolerance``.
    """

    time: int = 64
    dim: int = 4
    magnitudes: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0)
    orders: tuple[int, ...] = (0, 2, 4, 6, 8, 10)
    tolerance: float = 0.01
    most: int = 40


@PAPER.claim(
    "Cutting the exponential of softmax off leaves an error that falls with the order and stays below Taylor's bound, "
    "and the state that one per cent takes grows with the largest logit.",
    reported="softmax needs an infinite state (derived)",
    holds_when=AllOf(
        AtMost("largest_growth", 1.0),
        AtMost("largest_excess", 0.0),
        AtLeast("smallest_state_growth", 1.01),
    ),
    scales={"smoke": Truncation(time=16), "small": Truncation()},
    seeds=5,
    note=(
        "Growth of the error is from one even order to the next, of the state from one magnitude to its double. The "
        "error's excess over the bound is counted after rounding, eight units in the last place of the exponential."
    ),
)
@torch.no_grad()
def truncated_softmax_needs_a_larger_state(config: Truncation, run: Run) -> Metrics:
    """Truncate causal softmax attention at several orders, for logits of several magnitudes."""
    generator = run.generator()
    query, key, value = torch.randn(3, config.time, config.dim, generator=generator, dtype=torch.float64)
    earlier = torch.ones(config.time, config.time, dtype=torch.bool).tril()
    logits = (query @ key.T).masked_fill(~earlier, 0.0)
    logits = logits / logits.abs().max()

    def output(weights: Tensor) -> Tensor:
        weights = weights * earlier
        mixed: Tensor = weights @ value / weights.sum(-1, keepdim=True)
        return mixed

    errors: dict[tuple[float, int], float] = {}
    excess = -math.inf
    for magnitude in run.progress(config.magnitudes, "magnitudes"):
        scaled = magnitude * logits
        exact = output(scaled.exp())
        for order in range(0, config.most + 1, 2):
            truncated = taylor_exp(scaled, order)
            rounding = 8 * torch.finfo(torch.float64).eps * scaled.abs().exp()
            beyond = (truncated - scaled.exp()).abs() - rounding - taylor_exp_error_bound(scaled, order)
            excess = max(excess, beyond.max().item())
            errors[magnitude, order] = ((output(truncated) - exact).norm() / exact.norm()).item()
    states = []
    for magnitude in config.magnitudes:
        enough = [order for order in range(0, config.most + 1, 2) if errors[magnitude, order] <= config.tolerance]
        if not enough:
            raise ArithmeticError(f"order {config.most} is too low for an error of {config.tolerance}")
        states.append(taylor_feature_count(config.dim, enough[0]))
    run.table(
        "errors of the output",
        [
            {"largest logit": magnitude, "features for 1 %": count}
            | {f"order {order}": errors[magnitude, order] for order in config.orders}
            for magnitude, count in zip(config.magnitudes, states, strict=True)
        ],
    )
    largest = [errors[config.magnitudes[-1], order] for order in config.orders]
    return {
        "largest_growth": max(after / before for before, after in pairwise(largest)),
        "largest_excess": max(excess, -1.0),
        "smallest_state_growth": min(after / before for before, after in pairwise(states)),
        **{f"error_order_{order}": error for order, error in zip(config.orders, largest, strict=True)},
        **{
            f"features_logit_{magnitude:g}": float(count)
            for magnitude, count in zip(config.magnitudes, states, strict=True)
        },
    }


# Recall --------------------------------------------------------------------------------------------------------------

Arm = Literal["softmax", "linear", "exp", "softplus", "sigmoid", "constant", "s6", "ssd", "qlstm", "qlstm_reversed"]


class _SoftmaxMixer(nn.Module):
    """One head of causal softmax attention whose keys may be smaller than its values."""

    def __init__(self, width: int, key_dim: int) -> None:
        super().__init__()
        self.query = nn.Linear(width, key_dim)
        self.key = nn.Linear(width, key_dim)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (projection(x).unsqueeze(1) for projection in (self.query, self.key, self.value))
        output: Tensor = self.output(attend(query, key, value, is_causal=True).squeeze(1))
        return output


def _mixer(arm: Arm, width: int, expansion: int) -> nn.Module:
    """One causal layer of one head."""
    if arm == "softmax":
        return _SoftmaxMixer(width, expansion)
    if arm == "linear":
        return LinearAttention(width, 1, key_dim=expansion, is_causal=True)
    if arm == "s6":
        return S6Mixer(width, expansion)
    if arm == "ssd":
        return SSDMixer(width, 1, expansion)
    if arm in ("qlstm", "qlstm_reversed"):
        return QLSTM(width, has_reversed_gate=arm == "qlstm_reversed")
    return NormalizedAttention(width, 1, key_dim=expansion, normaliser=cast(NormaliserKind, arm), is_causal=True)


Batch = tuple[tuple[Tensor, ...], Tensor]


class _Recall(Protocol):
    """A task: what a network is made of, and sequences."""

    def network(self, arm: Arm, expansion: int) -> nn.Module:
        """An untrained network around a mixer."""

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        """Inputs of the network, and targets with -100 where nothing is asked."""


@dataclass(frozen=True)
class Paired:
    """Recall of ``pairs`` tokens that hold a key and a value, by one layer without positions."""

    pairs: int = 16
    num_keys: int = 64
    num_values: int = 64
    width: int = 64

    def network(self, arm: Arm, expansion: int) -> nn.Module:
        """An untrained network around a mixer."""
        return _PairedNetwork(self, _mixer(arm, self.width, expansion))

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        """Keys and values, and targets with -100 where nothing is asked."""
        drawn = paired_recall(
            count, self.pairs, num_keys=self.num_keys, num_values=self.num_values, generator=generator
        )
        return (drawn.keys, drawn.values), drawn.target


class _PairedNetwork(nn.Module):
    """Sum of the embeddings, ``x + mixer(x)``, layer normalisation, linear."""

    def __init__(self, task: Paired, mixer: nn.Module) -> None:
        super().__init__()
        self.key = nn.Embedding(task.num_keys, task.width)
        self.value = nn.Embedding(1 + task.num_values, task.width, padding_idx=0)
        self.mixer = mixer
        self.norm = nn.LayerNorm(task.width)
        self.head = nn.Linear(task.width, task.num_values)

    def forward(self, keys: Tensor, values: Tensor, asked: Tensor) -> Tensor:
        x = self.key(keys) + self.value(values)
        logits: Tensor = self.head(self.norm((x + self.mixer(x))[asked]))
        return logits


@dataclass(frozen=True)
class MultiQuery:
    """Multi-query associative recall, by layers without feed-forward blocks, as in the paper's code."""

    length: int = 64
    pairs: int = 4
    num_tokens: int = 8192
    width: int = 64
    layers: int = 2
    dropout: float = 0.1

    def network(self, arm: Arm, expansion: int) -> nn.Module:
        """An untrained network of mixers."""
        has_positions = arm not in ("s6", "ssd")
        return _MultiQueryNetwork(self, [_mixer(arm, self.width, expansion) for _ in range(self.layers)], has_positions)

    def draw(self, count: int, generator: torch.Generator) -> Batch:
        """Tokens, and targets with -100 where nothing is asked."""
        drawn = multi_query_recall(count, self.length, self.pairs, num_tokens=self.num_tokens, generator=generator)
        return (drawn.inputs,), drawn.target


class _MultiQueryNetwork(nn.Module):
    """Embeddings, layers ``x + mixer(norm(x))``, normalisation, and an output that shares the embedding's weights."""

    def __init__(self, task: MultiQuery, mixers: Sequence[nn.Module], has_positions: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(task.num_tokens, task.width)
        self.position = nn.Embedding(task.length, task.width) if has_positions else None
        self.dropout = nn.Dropout(task.dropout)
        self.norms = nn.ModuleList(nn.LayerNorm(task.width) for _ in mixers)
        self.mixers = nn.ModuleList(mixers)
        self.norm = nn.LayerNorm(task.width)
        for embedding in (self.embedding, self.position):
            if embedding is not None:
                nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tensor, asked: Tensor) -> Tensor:
        x = self.embedding(tokens)
        if self.position is not None:
            x = x + self.position.weight[: tokens.shape[1]]
        x = self.dropout(x)
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            x = x + mixer(norm(x))
        return F.linear(self.norm(x[asked]), self.embedding.weight)


@dataclass(frozen=True)
class Training:
    """AdamW with cosine decay on fresh batches; the best of several learning rates, by ``validation`` sequences.

    ``test`` sequences, drawn apart, judge the chosen one.
    """

    steps: int
    batch_size: int = 128
    rates: tuple[float, ...] = (3e-3, 1e-2)
    weight_decay: float = 0.01
    validation: int = 1024
    test: int = 2048


def _accuracy(network: nn.Module, batch: Batch, device: torch.device, at_once: int = 256) -> float:
    """Share of what is asked that is answered right."""
    inputs, target = batch
    right, count = 0, 0
    with torch.no_grad(), evaluating(network):
        for *parts, wanted in zip(*(torch.split(tensor, at_once) for tensor in (*inputs, target)), strict=True):
            asked = wanted >= 0
            answers = network(*(part.to(device) for part in parts), asked.to(device)).argmax(-1).cpu()
            right += int((answers == wanted[asked]).sum())
            count += int(asked.sum())
    return right / count


def _learn(
    task: _Recall,
    arm: Arm,
    expansion: int,
    training: Training,
    run: Run,
    examine: Callable[[nn.Module], None] = lambda network: None,
) -> float:
    """Train with every learning rate from the same start on the same sequences; the accuracy of the best on others.

    ``examine`` sees the best network.
    """
    validation = task.draw(training.validation, run.generator(1))
    best: tuple[float, nn.Module] | None = None
    for rate in training.rates:
        torch.manual_seed(run.seed)
        network = task.network(arm, expansion).to(run.device)
        optimizer = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=training.weight_decay)
        generator = run.generator(2)
        for step in run.progress(range(training.steps), f"{arm}, {expansion}, rate {rate:g}"):
            for group in optimizer.param_groups:
                group["lr"] = rate * (1 + math.cos(math.pi * step / training.steps)) / 2
            inputs, target = task.draw(training.batch_size, generator)
            asked = target >= 0
            logits = network(*(tensor.to(run.device) for tensor in inputs), asked.to(run.device))
            loss = F.cross_entropy(logits, target[asked].to(run.device))
            optimizer.zero_grad()
            torch.autograd.backward([loss])
            optimizer.step()
        accuracy = _accuracy(network, validation, run.device)
        if best is None or accuracy > best[0]:
            best = accuracy, network
    assert best is not None
    examine(best[1])
    return _accuracy(best[1], task.draw(training.test, run.generator(3)), run.device)


@dataclass(frozen=True)
class Expansions:
    """Linear attention with each state expansion, and softmax attention with the smallest."""

    task: Paired | MultiQuery
    training: Training
    expansions: tuple[int, ...] = (4, 8, 16, 32, 64)


_PAPER_TRAINING = Training(
    steps=12_500, batch_size=512, rates=(1e-4, 10 ** (-10 / 3), 10 ** (-8 / 3), 1e-2), weight_decay=0.1, test=3000
)
_PAIRED_NOTE = (
    "A task of one layer, whose tokens hold a key and a value, stands in for the paper's: there two layers must first "
    "join values to keys, which takes longer than this scale has. Task and thresholds were chosen with pilot runs in "
    "view."
)


@PAPER.claim(
    "On recall, linear attention gains at least 3 points of accuracy with every doubling of its state, 40 points from "
    "4 to 64 features in all, and is still no better with 64 than softmax with 4.",
    reported="MQAR with 16 and 64 pairs: linear attention approaches softmax from n = 32 to 256 (curves)",
    holds_when=AllOf(
        AtLeast("smallest_gain", 0.03),
        Difference("linear_largest", "linear_smallest", at_least=0.4),
        Difference("softmax_smallest", "linear_largest", at_least=0.0),
    ),
    scales={
        "smoke": Expansions(Paired(), Training(10, 32, (1e-2,), validation=64, test=64), (4, 8)),
        "small": Expansions(Paired(), Training(600)),
        "full": Expansions(
            MultiQuery(256, 16, width=512), replace(_PAPER_TRAINING, batch_size=128, steps=50_000), (32, 64, 128, 256)
        ),
    },
    seeds=3,
    note=(
        f"{_PAIRED_NOTE} Linear attention recalls 31.9, 69.2, 93.7, 99.4 and 99.97 % with 4 to 64 features: every "
        "doubling helps, but beyond 16 features there are no three points left to gain. Softmax recalls all with 4."
    ),
)
def linear_attention_needs_a_larger_state(config: Expansions, run: Run) -> Metrics:
    """Train linear attention with one state expansion after another, and softmax attention with the smallest."""
    accuracies = [_learn(config.task, "linear", size, config.training, run) for size in config.expansions]
    softmax = _learn(config.task, "softmax", config.expansions[0], config.training, run)
    run.table(
        "accuracy",
        [
            {"attention": "linear", "features": size, "accuracy": accuracy}
            for size, accuracy in zip(config.expansions, accuracies, strict=True)
        ]
        + [{"attention": "softmax", "features": config.expansions[0], "accuracy": softmax}],
    )
    figure = Figure(figsize=(5, 3))
    axes = figure.subplots()
    axes.plot(config.expansions, accuracies, marker="o", label="linear attention")
    axes.axhline(softmax, color="black", linestyle="--", label=f"softmax, {config.expansions[0]} features")
    axes.set(xlabel="features of a key", ylabel="accuracy", xscale="log", ylim=(0, 1.05))
    axes.set_xticks(config.expansions, [str(size) for size in config.expansions])
    axes.minorticks_off()
    axes.legend(fontsize="small")
    told = ", ".join(f"{a:.3f} with {n}" for n, a in zip(config.expansions, accuracies, strict=True))
    run.figure(
        "state-expansion",
        figure,
        f"Accuracy by features of a key. Linear attention: {told}; softmax: {softmax:.3f} with {config.expansions[0]}.",
    )
    gains = [after - before for before, after in pairwise(accuracies)]
    return {
        "smallest_gain": min(gains),
        "linear_smallest": accuracies[0],
        "linear_largest": accuracies[-1],
        "softmax_smallest": softmax,
        **{f"linear_{size}": accuracy for size, accuracy in zip(config.expansions, accuracies, strict=True)},
    }


@dataclass(frozen=True)
class Arms:
    """Mixers with each of the state expansions; tested on ``longer`` times as many pairs as trained with."""

    task: Paired | MultiQuery
    training: Training
    expansions: tuple[int, ...]
    longer: int = 1


def _compare(config: Arms, arms: Sequence[Arm], run: Run) -> Metrics:
    """The accuracy of every arm, the mean over the state expansions."""
    rows = []
    metrics = {}
    for arm in arms:
        found = []
        for size in config.expansions:
            lengthened: list[float] = []

            def examine(network: nn.Module, lengthened: list[float] = lengthened) -> None:
                if isinstance(config.task, Paired) and config.longer > 1:
                    task = replace(config.task, pairs=config.longer * config.task.pairs)
                    batch = task.draw(config.training.test, run.generator(4))
                    lengthened.append(_accuracy(network, batch, run.device))

            accuracy = _learn(config.task, arm, size, config.training, run, examine)
            row = {"mixer": arm, "features": size, "accuracy": accuracy}
            if lengthened:
                row["accuracy when longer"] = lengthened[0]
            rows.append(row)
            found.append(lengthened[0] if lengthened else accuracy)
        metrics[f"accuracy_{arm}"] = sum(found) / len(found)
    run.table("accuracy", rows)
    return metrics


def _arms(expansions: tuple[int, ...], *, longer: int = 1) -> Mapping[str, Arms]:
    """The scales of the claims on normalisers."""
    scales = {
        "smoke": Arms(Paired(pairs=8), Training(10, 32, (1e-2,), validation=64, test=64), (4,), longer),
        "small": Arms(Paired(), Training(600), expansions, longer),
    }
    if longer == 1:
        full = replace(_PAPER_TRAINING, batch_size=64, steps=100_000)
        scales["full"] = Arms(MultiQuery(512, 64, width=512), full, (128,))
    return scales


@PAPER.claim(
    "On recall, normalised attention is at least 2 points better than linear attention with the same state.",
    reported="MQAR with 64 pairs, n = 128: normalised attention closes part of the gap to softmax (curves)",
    holds_when=Difference("accuracy_exp", "accuracy_linear", at_least=0.02),
    scales=_arms((8,)),
    seeds=3,
    note=f"{_PAIRED_NOTE} The gain is not the normaliser's: see the claim on it.",
)
def normalised_attention_beats_linear(config: Arms, run: Run) -> Metrics:
    """Train linear attention and normalised attention."""
    return _compare(config, ("linear", "exp"), run)


@PAPER.claim(
    "On recall, the normaliser helps: normalised attention is at least 2 points better than the same without one.",
    reported="not compared; the gain over linear attention is ascribed to the normaliser",
    holds_when=Difference("accuracy_exp", "accuracy_constant", at_least=0.02),
    scales=_arms((4, 8)),
    seeds=3,
    note=(
        "Normalised attention differs from linear attention in its normaliser and in the signs of queries and keys; "
        "the baseline has the signs and a denominator of 1. Accuracies are means over 4 and 8 features. "
        f"{_PAIRED_NOTE} With a normaliser 82.3 % are recalled, without one 81.9: what normalised attention gains over "
        "linear attention, 26 points with 8 features, is a gain of the signs."
    ),
)
def the_normaliser_helps(config: Arms, run: Run) -> Metrics:
    """Train normalised attention with and without its normaliser."""
    return _compare(config, ("exp", "constant"), run)


@PAPER.claim(
    "Recalling from twice as many pairs as in training, normalised attention is at least 2 points better than the same "
    "without a normaliser.",
    reported="not reported",
    holds_when=Difference("accuracy_exp", "accuracy_constant", at_least=0.02),
    scales=_arms((4, 8), longer=2),
    seeds=3,
    note=f"Accuracies are means over 4 and 8 features. {_PAIRED_NOTE}",
)
def the_normaliser_helps_on_longer_sequences(config: Arms, run: Run) -> Metrics:
    """Train normalised attention with and without its normaliser; test on twice the length."""
    return _compare(config, ("exp", "constant"), run)


@PAPER.claim(
    "On recall, the exponential is the best normaliser: neither softplus nor a sigmoid is better.",
    reported="MQAR with 64 pairs: the exponential first of the three (numbers not available to us)",
    holds_when=AllOf(
        Difference("accuracy_exp", "accuracy_softplus", at_least=0.0),
        Difference("accuracy_exp", "accuracy_sigmoid", at_least=0.0),
    ),
    scales=_arms((4, 8)),
    seeds=3,
    note=f"Accuracies are means over 4 and 8 features. {_PAIRED_NOTE}",
)
def the_exponential_is_the_best_normaliser(config: Arms, run: Run) -> Metrics:
    """Train normalised attention with each normaliser."""
    return _compare(config, ("exp", "softplus", "sigmoid"), run)


@PAPER.claim(
    "On recall, S6 and SSD are at most 5 points worse than softmax attention with keys of the same size.",
    reported="MQAR with 64 pairs, n = 128: S6 and SSD near softmax (curves)",
    holds_when=AllOf(
        Difference("accuracy_s6", "accuracy_softmax", at_least=-0.05),
        Difference("accuracy_ssd", "accuracy_softmax", at_least=-0.05),
    ),
    scales=_arms((16,)),
    seeds=3,
    note=f"S6 and SSD are Mamba's blocks, with convolution and gate, as in the paper's code. {_PAIRED_NOTE}",
)
def state_space_models_come_near_softmax(config: Arms, run: Run) -> Metrics:
    """Train softmax attention, S6 and SSD."""
    return _compare(config, ("softmax", "s6", "ssd"), run)


# The gate of a recurrent network -------------------------------------------------------------------------------------


@PAPER.claim(
    "On recall, a qLSTM with S6's forget gate is at least 2 points better than one with a sigmoid.",
    reported="MQAR with 4, 8 and 16 pairs: better, most on the longer tasks (curves)",
    holds_when=Difference("accuracy_qlstm_reversed", "accuracy_qlstm", at_least=0.02),
    scales={
        "smoke": Arms(MultiQuery(16, 2, 32, width=16), Training(5, 16, (1e-2,), validation=64, test=64), (1,)),
        "small": Arms(Paired(8, 16, 16), Training(600), (1,)),
        "full": Arms(MultiQuery(256, 16, width=512), replace(_PAPER_TRAINING, batch_size=64, steps=100_000), (1,)),
    },
    seeds=3,
    note=(
        "The paper's shortest task, 4 pairs in 64 tokens, is beyond this scale: after 500 to 1,000 steps pilot runs "
        "had got no further than to guess among the four values, even with 15 keys. Eight pairs of 16 keys and 16 "
        "values, a token a pair, stand in."
    ),
)
def the_gate_of_s6_helps_the_qlstm(config: Arms, run: Run) -> Metrics:
    """Train qLSTMs with either forget gate."""
    return _compare(config, ("qlstm", "qlstm_reversed"), run)
