"""Transformers encoders that stop early against the same networks without exits, and how fast their exits are trained.

    python -m benchmarks.early_exit_transformers [--depths 0.25 0.5 0.75 1] [--samples N] [--seconds S] [--threads N]
        [--device cuda]

Weights are random, as they do not matter for time. There is an exit after every layer but the last. Thresholds are
calibrated on the samples themselves, so that the shares that leave at each exit form a geometric series whose mean
depth, as a share of all layers, is the one wanted; at a depth of 1 none leaves early, and what is timed is what exits
cost. The gates are so steep that they agree with the thresholds. BERT's sentences are padded to one length. That every
sample leaves where it should, with the logits of the full evaluation, is checked before anything is timed. Were all
time spent in counted multiply-adds, the shares of both would be equal.

A training step is one of the gates or one of the classifiers, in turns, each on a batch of its own: losses, gradients
and descent, on features that were cached once, or with the frozen network run for every step. How batches are drawn,
and the weights of the gates' targets, which are found once an epoch, are left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice

import torch
from scipy.optimize import brentq
from torch import Tensor, nn

from benchmarks._tables import Row, best_times, device_arguments, place, prepare, record
from postern.adaptive import (
    EarlyExitModel,
    ExitFeatures,
    ExitPolicy,
    JEIDNNTrainer,
    MaxProbExit,
    cache_exit_features,
    calibrate_thresholds,
    count_macs,
    exit_costs,
    geometric_exit_fractions,
    replay_exits,
    select_exits,
)
from postern.papers.jei_dnn import steep_gates

BATCHES = (1, 64)
CLASSES = 10
TIMED_STEPS = 10  # of training in a call; an even number, for turns of both
Inputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Encoder:
    """A network with exits, and samples for it."""

    model: EarlyExitModel
    inputs: Inputs

    def batches(self, size: int) -> list[Inputs]:
        parts = {name: each.split(size) for name, each in self.inputs.items()}
        return [dict(zip(parts, some, strict=True)) for some in zip(*parts.values(), strict=True)]


def vit(samples: int, device: torch.device) -> Encoder:
    """Twelve layers of width 192 (ViT-Ti) on 64 patches and the class token."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=192,
        num_hidden_layers=12,
        num_attention_heads=3,
        intermediate_size=768,
        image_size=128,
        patch_size=16,
        num_labels=CLASSES,
        initializer_range=0.1,  # so that untrained features differ from image to image
    )
    exits = [f"vit.layers.{layer}" for layer in range(11)]
    model = EarlyExitModel(ViTForImageClassification(config), exits, CLASSES, 192, pool="first", norm="vit.layernorm")
    return Encoder(model.to(device).eval(), {"pixel_values": torch.randn(samples, 3, 128, 128, device=device)})


def bert(samples: int, device: torch.device) -> Encoder:
    """Eight layers of width 256 (BERT-Small is half as deep and twice as wide) on sentences of 16 to 64 tokens."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=2000,
        hidden_size=256,
        num_hidden_layers=8,
        num_attention_heads=4,
        intermediate_size=1024,
        num_labels=CLASSES,
        initializer_range=0.1,
    )
    exits = [f"bert.encoder.layer.{layer}" for layer in range(7)]
    model = EarlyExitModel(BertForSequenceClassification(config), exits, CLASSES, 256, pool="first")
    lengths = torch.randint(16, 65, (samples, 1), device=device)
    inputs = {
        "input_ids": torch.randint(2000, (samples, 64), device=device),
        "attention_mask": (torch.arange(64, device=device) < lengths).long(),
    }
    return Encoder(model.to(device).eval(), inputs)


ENCODERS: Mapping[str, Callable[[int, torch.device], Encoder]] = {
    "ViT, 12 layers of 192, 65 tokens": vit,
    "BERT, 8 layers of 256, 64 tokens": bert,
}


def fractions_of_depth(layers: int, depth: float) -> tuple[float, ...]:
    """Shares that leave after each layer: a geometric series with the mean depth wanted, or all at the end.

    Args:
        layers: exits, the final head included.
        depth: mean share of the layers, above ``1 / layers``; at 1 all leave at the end.
    """
    if depth == 1:
        return (*[0.0] * (layers - 1), 1.0)

    def excess(log_ratio: float) -> float:
        shares = geometric_exit_fractions(layers, 2**log_ratio)
        return sum(share * (k + 1) / layers for k, share in enumerate(shares)) - depth

    return geometric_exit_fractions(layers, 2 ** brentq(excess, -30, 30))


def check(encoder: Encoder, policies: Mapping[str, ExitPolicy], logits: Sequence[Tensor]) -> Tensor:
    """Return where each sample leaves; the batch size and the kind of policy must make no difference."""
    exits = replay_exits(policies["threshold"], logits)
    for policy in policies.values():
        for size in BATCHES:
            found = [encoder.model.forward_dynamic(**batch, policy=policy) for batch in encoder.batches(size)]
            torch.testing.assert_close(torch.cat([each.exit_index for each in found]), exits)
            expected = select_exits(logits, exits)
            torch.testing.assert_close(torch.cat([each.logits for each in found]), expected, rtol=1e-3, atol=1e-3)
    return exits


def inference(name: str, encoder: Encoder, depths: Sequence[float], seconds: float, device: torch.device) -> list[Row]:
    model, layers = encoder.model, encoder.model.num_exits + 1
    logits = model(**encoder.inputs)
    policies: dict[float, dict[str, ExitPolicy]] = {}
    shares: dict[float, tuple[float, float]] = {}
    full = count_macs(partial(model.backbone, **encoder.inputs))
    for depth in depths:
        thresholds = calibrate_thresholds(logits, fractions_of_depth(layers, depth))
        policies[depth] = {"threshold": MaxProbExit(thresholds), "gates": steep_gates(thresholds, device)}
        exits = check(encoder, policies[depth], logits)
        macs = count_macs(partial(model.forward_dynamic, **encoder.inputs, policy=policies[depth]["threshold"]))
        shares[depth] = ((exits + 1).double().mean().item() / layers, macs / full)
    rows: list[Row] = []
    for size in BATCHES:
        batches = encoder.batches(size)
        calls: dict[str, Callable[[], object]] = {
            "full": lambda some=batches: [model.backbone(**each) for each in some]
        }
        calls |= {
            f"{kind} at {depth}": lambda some=batches, policy=policy: [
                model.forward_dynamic(**each, policy=policy) for each in some
            ]
            for depth in depths
            for kind, policy in policies[depth].items()
        }
        times = best_times({each: f"calls[{each!r}]()" for each in calls}, seconds, {"calls": calls}, 3, device)
        for depth in depths:
            reached, macs_share = shares[depth]
            row: Row = {"network": name, "batch": f"{size}", "mean depth": reached, "multiply-adds / full": macs_share}
            row |= {f"{kind}, time / full": times[f"{kind} at {depth}"] / times["full"] for kind in policies[depth]}
            row["full, ms a sample"] = 1e3 * times["full"] / len(logits[0])
            rows.append(row)
    return rows


def training(name: str, encoder: Encoder, seconds: float, device: torch.device) -> Row:
    model, size = encoder.model, BATCHES[-1]
    samples = len(next(iter(encoder.inputs.values())))
    labels = torch.randint(CLASSES, (samples,), device=device).split(size)
    labelled = list(zip(encoder.batches(size), labels, strict=True))
    trainer = JEIDNNTrainer(model, 0.5, exit_costs(model, **encoder.batches(1)[0]), batch_size=size)
    gates, heads = (torch.optim.SGD(each.parameters(), 0.01, 0.9) for each in (trainer.policy, model.heads))
    weight = torch.ones(model.num_exits, device=device)

    def seen(batch: tuple[Inputs, Tensor]) -> ExitFeatures:
        return cache_exit_features(model, [batch])

    def steps(batches: Iterable[ExitFeatures]) -> None:
        turns = cycle(
            ((gates, partial(trainer.gate_step_loss, positive_weight=weight)), (heads, trainer.head_step_loss))
        )
        for batch, (optimizer, loss) in zip(batches, turns, strict=False):
            optimizer.zero_grad()
            torch.autograd.backward(loss(batch))
            optimizer.step()

    inputs = list(islice(cycle(labelled), TIMED_STEPS))
    cached = [seen(batch) for batch in labelled]
    calls: dict[str, Callable[[], object]] = {
        "cached": lambda: steps(islice(cycle(cached), TIMED_STEPS)),
        "network run": lambda: steps(map(seen, inputs)),
    }
    times = best_times({each: f"calls[{each!r}]()" for each in calls}, seconds, {"calls": calls}, 3, device)
    row: Row = {"network": name}
    row |= {f"{each}, steps/s": TIMED_STEPS / value for each, value in times.items()}
    return row | {"times as fast": times["network run"] / times["cached"]}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depths", type=float, nargs="+", default=[0.25, 0.5, 0.75, 1.0])
    parser.add_argument("--samples", type=int, default=64, help="images, and sentences")
    parser.add_argument("--seconds", type=float, default=10.0, help="how long to time a network and batch size")
    device_arguments(parser)
    arguments = parser.parse_args(argv)
    device = prepare(arguments)
    encoders = {name: build(arguments.samples, device) for name, build in ENCODERS.items()}
    for encoder in encoders.values():
        for head in encoder.model.heads:
            nn.init.normal_(head.weight, std=0.1)  # confidences apart by more than rounding, and below 1
    with torch.inference_mode():
        stopping = [
            row
            for name, encoder in encoders.items()
            for row in inference(name, encoder, arguments.depths, arguments.seconds, device)
        ]
    steps = [training(name, encoder, arguments.seconds, device) for name, encoder in encoders.items()]
    record(
        "early_exit_transformers",
        "Transformers encoders with early exits against the same without",
        {
            f"Shares of the full network's multiply-adds and time, {place(device)}": stopping,
            f"Training steps a second of gates and classifiers, batches of {BATCHES[-1]}, {place(device)}": steps,
        },
        device,
    )


if __name__ == "__main__":
    main()
