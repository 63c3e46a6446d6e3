"""Leaky integrate-and-fire neurons over all time steps, forward and backward: time and memory.

    python -m benchmarks.spiking [--steps 4] [--batch 16] [--channels 96] [--side 32] [--seconds S] [--threads N]
        [--device cuda] [--compile]

Against a loop over the steps in operations that autograd knows, and against snntorch where it is installed. All have a
time constant of 2, hard detached resets and the sigmoid surrogate. Memory is that of the tensors that are made, at
their height.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from benchmarks._tables import Row, best_times, device_arguments, place, prepare, record
from postern.compare.memory import TensorMemory
from postern.errors import MissingExtra
from postern.spiking import LIF, SnnTorchNeuron, integrate_and_fire_reference

Neuron = Callable[[Tensor], Tensor]


def rivals(*, is_compiled: bool) -> Mapping[str, Neuron]:
    lif = LIF()
    found: dict[str, Neuron] = {
        "postern": lif,
        "loop": lambda current: integrate_and_fire_reference(current, lif.dynamics)[0],
    }
    try:
        found["snntorch"] = SnnTorchNeuron(lif)
    except MissingExtra:
        print("snntorch is not installed, and left out")
    if is_compiled:
        found |= {f"{name}, compiled": torch.compile(neuron, fullgraph=True) for name, neuron in found.items()}
    return found


def step(neuron: Neuron, current: Tensor, gradient: Tensor) -> None:
    spikes = neuron(current)
    torch.autograd.grad(spikes, current, gradient)


def forward(neuron: Neuron, current: Tensor) -> None:
    with torch.no_grad():
        neuron(current)


def peak_bytes(neuron: Neuron, current: Tensor, gradient: Tensor) -> int:
    memory = TensorMemory()
    with memory:
        step(neuron, current, gradient)
    return memory.peak


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--channels", type=int, default=96)
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=10.0, help="how long to time each pass at least")
    parser.add_argument("--compile", action="store_true", help="compiled by torch.compile as well")
    device_arguments(parser)
    arguments = parser.parse_args(argv)
    device = prepare(arguments)
    neurons = rivals(is_compiled=arguments.compile)
    shape = (arguments.steps, arguments.batch, arguments.channels, arguments.side, arguments.side)
    current = torch.randn(shape, device=device, requires_grad=True)
    gradient = torch.randn(shape, device=device)
    names: dict[str, object] = {
        "step": step,
        "forward": forward,
        "neurons": neurons,
        "current": current,
        "gradient": gradient,
    }
    both, inference = (
        best_times(
            {name: call.format(name=name) for name in neurons}, arguments.seconds, names, rounds=3, device=device
        )
        for call in ("step(neurons[{name!r}], current, gradient)", "forward(neurons[{name!r}], current)")
    )
    rows: list[Row] = [
        {
            "neurons": name,
            "forward, ms": 1e3 * inference[name],
            "forward and backward, ms": 1e3 * both[name],
            "times as long as postern": both[name] / both["postern"],
            "images a second": arguments.batch / both[name],
            # A compiled graph allocates where the count of tensors does not see it.
            "MiB": "" if "compiled" in name else peak_bytes(neuron, current, gradient) / 2**20,
        }
        for name, neuron in neurons.items()
    ]
    record(
        "spiking",
        "Leaky integrate-and-fire neurons over all time steps",
        {f"[{', '.join(map(str, shape))}], single precision, {place(device)}": rows},
        device,
    )


if __name__ == "__main__":
    main()
