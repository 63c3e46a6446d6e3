"""Stochastic experts, a training step in one pass and in two, and inference, against a gated layer and a dense one.

    python -m benchmarks.stochastic_experts [--experts 2 4 16] [--inference-experts 2 8 64] [--batch B] [--time T]
        [--width D] [--hidden H] [--seconds S] [--threads N] [--device cuda]

Forward and backward pass of a model of two layers, attention and a feed-forward block each, in float32. "dense" and
"Switch" pass once. "two calls" and "concatenated" are THOR's step with its consistency, which passes twice: one pass
after the other, or both as one batch. Numbers are sentences a second, each counted once. That concatenated passes are
what two calls give for the same experts is checked before anything is timed.

Inference is that of one block. "drawn" sends each sentence, or each token, to the expert it has drawn; "all masked"
lets every expert work on every token and keeps the drawn one's output, as the official code does; "all averaged"
takes the mean of all outputs, the level "ensemble". "dense" is one block of an expert's size. That the masked way gives
what the drawn experts give, and the averaged one the mean of what each expert gives alone, is checked before they are
timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks._tables import Row, best_times, device_arguments, place, prepare, record
from postern.experts import (
    ConsistencyLoss,
    FeedForwardExperts,
    MixtureOfExperts,
    SoftmaxRouter,
    StochasticRouter,
    evaluate_densely,
    expert_draws,
    thor_step,
    two_passes,
)
from postern.nets import ExpertLanguageModel

TOKENS, LAYERS, HEADS = 1000, 2, 4


def model(arm: str, experts: int, width: int, hidden: int, time: int, device: torch.device) -> ExpertLanguageModel:
    def mixture(layer: int) -> MixtureOfExperts | None:
        if arm == "dense":
            return None
        router = SoftmaxRouter(width, experts, 1) if arm == "Switch" else StochasticRouter(width, experts)
        return MixtureOfExperts(router, FeedForwardExperts(experts, width, hidden, activation=F.relu))

    return ExpertLanguageModel(TOKENS, mixture, width, LAYERS, HEADS, time, feedforward_dim=hidden).to(device)


def check(width: int, hidden: int, device: torch.device) -> None:
    network = model("THOR", 3, width, hidden, 16, device)
    tokens = torch.randint(TOKENS, (4, 16), device=device)
    first, second = (torch.full((4,), expert, device=device) for expert in (2, 0))
    with expert_draws(network, expert=torch.cat([first, second])):
        found = two_passes(network, (tokens,))
    for one, expert in zip(found, (2, 0), strict=True):
        with expert_draws(network, expert=expert):
            torch.testing.assert_close(one, network(tokens), rtol=1e-4, atol=1e-5)


def measure(experts: int, batch: int, time: int, width: int, hidden: int, seconds: float, device: torch.device) -> Row:
    tokens = torch.randint(TOKENS, (batch, time + 1), device=device)
    inputs, target = tokens[:, :-1], tokens[:, 1:]
    networks = {arm: model(arm, experts, width, hidden, time, device) for arm in ("dense", "Switch", "THOR")}
    consistency = ConsistencyLoss(5.0)

    def single(arm: str) -> None:
        torch.autograd.backward([networks[arm].loss(tokens)])

    def double(is_concatenated: bool) -> None:
        loss = thor_step(networks["THOR"], (inputs,), target, consistency, is_concatenated=is_concatenated)
        torch.autograd.backward([loss])

    calls: dict[str, Callable[[], object]] = {
        "dense": lambda: single("dense"),
        "switch": lambda: single("Switch"),
        "one_pass": lambda: single("THOR"),
        "two_calls": lambda: double(False),
        "concatenated": lambda: double(True),
    }
    times = best_times({name: f"{name}()" for name in calls}, seconds, calls, rounds=3, device=device)
    return {"experts": experts} | {f"{name.replace('_', ' ')}, sentences/s": batch / t for name, t in times.items()}


@torch.no_grad()
def measure_inference(
    experts: int, batch: int, time: int, width: int, hidden: int, seconds: float, device: torch.device
) -> Row:
    tokens = torch.randn(batch, time, width, device=device)
    bank = FeedForwardExperts(experts, width, hidden, activation=F.relu)
    layers = {
        level: MixtureOfExperts(StochasticRouter(width, experts, level=level), bank).to(device).eval()
        for level in ("sentence", "token", "ensemble")
    }
    dense = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width)).to(device).eval()

    drawn = torch.randint(experts, (batch,), device=device)
    with expert_draws(layers["sentence"], expert=drawn):
        expected = layers["sentence"](tokens)[0]
        torch.testing.assert_close(evaluate_densely(layers["sentence"], tokens), expected, rtol=1e-4, atol=1e-5)
    total = torch.zeros_like(tokens)
    for expert in range(experts):
        with expert_draws(layers["sentence"], expert=expert):
            total += layers["sentence"](tokens)[0]
    torch.testing.assert_close(layers["ensemble"](tokens)[0], total / experts, rtol=1e-4, atol=1e-5)

    calls: dict[str, Callable[[], object]] = {
        "dense": lambda: dense(tokens),
        "drawn_by_sentence": lambda: layers["sentence"](tokens),
        "drawn_by_token": lambda: layers["token"](tokens),
        "all_masked": lambda: evaluate_densely(layers["sentence"], tokens),
        "all_averaged": lambda: layers["ensemble"](tokens),
    }
    times = best_times({name: f"{name}()" for name in calls}, seconds, calls, rounds=3, device=device)
    return {"experts": experts} | {f"{name.replace('_', ' ')}, sentences/s": batch / t for name, t in times.items()}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, nargs="+", default=[2, 4, 16])
    parser.add_argument("--inference-experts", type=int, nargs="+", default=[2, 8, 64])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--time", type=int, default=32)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=4.0, help="how long to time each case at least")
    device_arguments(parser)
    arguments = parser.parse_args(argv)
    device = prepare(arguments)
    check(arguments.width, arguments.hidden, device)
    sizes = (arguments.batch, arguments.time, arguments.width, arguments.hidden)
    training = [measure(experts, *sizes, arguments.seconds, device) for experts in arguments.experts]
    inference = [
        measure_inference(experts, *sizes, arguments.seconds, device) for experts in arguments.inference_experts
    ]
    shape = "{} sentences of {} tokens, {} features, {} hidden".format(*sizes)
    record(
        "stochastic_experts",
        "Stochastic experts, one and two passes a step and inference, against gated and dense blocks",
        {
            f"Training steps, {shape}, {place(device)}": training,
            f"Inference of one block, {shape}, {place(device)}": inference,
        },
        device,
    )


if __name__ == "__main__":
    main()
