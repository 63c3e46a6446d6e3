"""Leaky integrate-and-fire neurons over all time steps, and networks of them, forward and backward: time and memory.

    python -m benchmarks.spiking [--steps 4] [--batch 64] [--channels 96] [--side 32] [--images 8] [--seconds S]
        [--threads N] [--device cuda] [--compile]

Neurons against a loop over the steps in operations that autograd knows, and against snntorch and spikingjelly where
they are installed; for the neurons of spikingjelly ``pip install --no-deps spikingjelly loguru`` is enough. All have a
time constant of 2, hard detached resets and the sigmoid surrogate, and that their spikes and gradients are the same is
checked before anything is timed.

A training step is that of Max-Former and MS-QKFormer for images of 32 pixels, at full width: logits, gradients, AdamW.
Memory is that of the tensors that are made, at their height, without the network's own.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks._tables import Row, best_times, device_arguments, place, prepare, record
from postern.compare.memory import TensorMemory
from postern.errors import MissingExtra
from postern.spiking import (
    LIF,
    SnnTorchNeuron,
    integrate_and_fire_reference,
    max_former_cifar,
    ms_qkformer_cifar,
)

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
    try:
        found["spikingjelly"] = spikingjelly_neuron()
    except ImportError:
        print("spikingjelly is not installed, and left out")
    if is_compiled:
        found |= {f"{name}, compiled": torch.compile(neuron, fullgraph=True) for name, neuron in found.items()}
    return found


def spikingjelly_neuron() -> Neuron:
    from spikingjelly.activation_based.neuron import LIFNode
    from spikingjelly.activation_based.surrogate import Sigmoid

    node = LIFNode(tau=2.0, surrogate_function=Sigmoid(alpha=4.0), detach_reset=True, step_mode="m")

    def neuron(current: Tensor) -> Tensor:
        node.reset()  # it keeps its potential from call to call
        spikes: Tensor = node(current)
        return spikes

    return neuron


def check(neurons: Mapping[str, Neuron], device: torch.device) -> None:
    """All spikes and gradients are those of the loop."""
    current = (2 * torch.randn(4, 64, 8, device=device)).requires_grad_()
    gradient = torch.randn(4, 64, 8, device=device)
    expected = neurons["loop"](current)
    (expected_gradient,) = torch.autograd.grad(expected, current, gradient)
    for neuron in neurons.values():
        spikes = neuron(current)
        torch.testing.assert_close(spikes, expected)
        torch.testing.assert_close(torch.autograd.grad(spikes, current, gradient)[0], expected_gradient)


def step(neuron: Neuron, current: Tensor, gradient: Tensor) -> None:
    spikes = neuron(current)
    torch.autograd.grad(spikes, current, gradient)


def forward(neuron: Neuron, current: Tensor) -> None:
    with torch.no_grad():
        neuron(current)


def peak_bytes(call: Callable[[], None]) -> int:
    memory = TensorMemory()
    with memory:
        call()
    return memory.peak


def training(num_steps: int, count: int, seconds: float, device: torch.device) -> list[Row]:
    """A training step of both networks on the same images."""
    images, labels = torch.randn(count, 3, 32, 32, device=device), torch.randint(10, (count,), device=device)
    calls: dict[str, Callable[[], None]] = {}

    def trainer(network: nn.Module) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(network.parameters())

        def call() -> None:
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(network(images), labels))
            optimizer.step()

        return call

    for name, build in (("Max-Former", max_former_cifar), ("MS-QKFormer", ms_qkformer_cifar)):
        calls[name] = trainer(build(num_steps=num_steps).to(device))
    times = best_times({name: f"calls[{name!r}]()" for name in calls}, seconds, {"calls": calls}, 3, device)
    return [
        {
            "network": name,
            "step, ms": 1e3 * times[name],
            "of MS-QKFormer's time": times[name] / times["MS-QKFormer"],
            "images a second": count / times[name],
            "MiB": peak_bytes(call) / 2**20,
        }
        for name, call in calls.items()
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--channels", type=int, default=96)
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--images", type=int, default=8, help="in a training step of the networks")
    parser.add_argument("--seconds", type=float, default=10.0, help="how long to time each pass at least")
    parser.add_argument("--compile", action="store_true", help="compiled by torch.compile as well")
    device_arguments(parser)
    arguments = parser.parse_args(argv)
    device = prepare(arguments)
    neurons = rivals(is_compiled=arguments.compile)
    check(neurons, device)
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
            "MiB": "" if "compiled" in name else peak_bytes(partial(step, neuron, current, gradient)) / 2**20,
        }
        for name, neuron in neurons.items()
    ]
    record(
        "spiking",
        "Leaky integrate-and-fire neurons over all time steps",
        {
            f"[{', '.join(map(str, shape))}], single precision, {place(device)}": rows,
            f"Training steps, {arguments.images} images of 32 pixels, {arguments.steps} time steps, {place(device)}": (
                training(arguments.steps, arguments.images, arguments.seconds, device)
            ),
        },
        device,
    )


if __name__ == "__main__":
    main()
