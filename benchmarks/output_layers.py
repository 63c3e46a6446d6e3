"""Output layers trained by gradient descent, for a thousand to a million classes.

    python -m benchmarks.output_layers [--classes 1000 10000 100000 793471 1000000] [--seconds S] [--threads N]

A step is the forward and the backward pass, also to the hidden vectors, and the update. The factored layer is timed
over as many steps as lie between two looks at its singular values, and the restoring of a sixth of them is added: more
than training on text needs. That it makes the steps of a dense layer is checked before anything is timed. Adaptive,
two-level and sampled softmax are other models than log-softmax, cheaper ones; they are the rivals of one who cannot
afford it.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from torch import nn

from benchmarks._tables import Row, best_times, record
from postern.heads import FactoredLinear, FactoredSphericalHead, ZLoss
from postern.papers._output_layers import (
    AdaptiveSoftmax,
    FullSoftmax,
    HierarchicalSoftmax,
    OutputLayer,
    SampledSoftmax,
    restoring,
    zipf_classes,
)

RATE = 0.1


class Batches:
    """Hidden vectors, and classes by Zipf's law, a batch a step."""

    def __init__(self, classes: int, width: int, size: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.next = 0
        self.batches = [
            (
                torch.randn(size, width, generator=generator).relu().requires_grad_(),
                zipf_classes(size, classes, generator),
            )
            for _ in range(50)
        ]

    def train(self, layer: OutputLayer, steps: int = 1) -> None:
        for _ in range(steps):
            hidden, target = self.batches[self.next % len(self.batches)]
            self.next += 1
            hidden.grad = None
            layer.loss(hidden, target).backward()
            layer.step()


def check_exactness(width: int, batch: int) -> None:
    criterion, dense = ZLoss(0.3, 8.0), nn.Linear(width, 2000)
    layer = FactoredLinear(width, 2000, learning_rate=1.0)
    layer.set_weight(dense.weight, dense.bias)
    optimizer = torch.optim.SGD(dense.parameters(), 1.0)
    batches = Batches(2000, width, batch)
    for hidden, target in batches.batches:
        optimizer.zero_grad()
        criterion(dense(hidden), target).backward()
        optimizer.step()
    batches.train(FactoredSphericalHead(layer, criterion), len(batches.batches))
    torch.testing.assert_close(layer.weight(), dense.weight.detach(), rtol=1e-3, atol=1e-4)


def milliseconds(classes: int, width: int, batch: int, seconds: float) -> dict[str, float]:
    """Of a step of each layer; one layer at a time is in memory."""
    factored = FactoredLinear(width, classes, learning_rate=RATE)
    several = factored.stabilize_every
    times = {}
    for name, build in {
        "factored": lambda: FactoredSphericalHead(factored, ZLoss(0.3, 20.0)),
        "log-softmax": partial(FullSoftmax, width, classes, RATE),
        "adaptive softmax": partial(AdaptiveSoftmax, width, classes, RATE),
        "two-level softmax": partial(HierarchicalSoftmax, width, classes, RATE),
        "sampled softmax": partial(SampledSoftmax, width, classes, RATE, 1024),
    }.items():
        names = {"layer": build(), "batches": Batches(classes, width, batch)}
        steps = several if name == "factored" else 1
        timed = best_times({name: f"batches.train(layer, {steps})"}, seconds, names, rounds=3)
        times[name] = 1e3 * timed[name] / steps
    restored = best_times({"": "restore()"}, seconds / 4, {"restore": restoring(factored)}, rounds=2)
    times["factored"] += 1e3 * restored[""] / several
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, nargs="+", default=[1000, 10_000, 100_000, 793_471, 1_000_000])
    parser.add_argument("--width", type=int, default=128, help="features of a hidden vector")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=4.0, help="how long to time each layer at least")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    check_exactness(arguments.width, arguments.batch)
    shape = f"hidden vectors of {arguments.width}, a batch of {arguments.batch}, {arguments.threads} thread(s)"
    absolute: list[Row] = []
    relative: list[Row] = []
    for classes in arguments.classes:
        times = milliseconds(classes, arguments.width, arguments.batch, arguments.seconds)
        first: Row = {"classes": f"{classes:,}"}
        absolute.append(first | times)
        relative.append(
            first | {name: value / times["factored"] for name, value in times.items() if name != "factored"}
        )
    record(
        "output_layers",
        "Training an output layer: the factored Z-loss against log-softmax and cheaper models",
        {f"Milliseconds a step, {shape}": absolute, "Times as long as the factored layer's": relative},
    )


if __name__ == "__main__":
    main()
