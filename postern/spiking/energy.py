"""Synaptic operations and the energy that papers derive from them.

    SOPs(layer) = firing rate * T * FLOPs(layer)
    E = 4.6 pJ * FLOPs of layers whose input is real + 0.9 pJ * sum of SOPs

FLOPs are multiplications with addition, 4.6 pJ each in 45 nm. Where the input is spikes only additions are left, of 0.9
pJ, and none for a spike that is not there. Batch normalisation counts as folded into the convolution, and nothing else
counts: no memory, no neurons. On processors and GPUs, which multiply by zeros too, nothing of this is saved.

Paper: "Spiking Neural Networks Need High-Frequency Information", arXiv 2505.18608. Its formula takes for granted that
the first convolution alone has real input; here every layer is looked at.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from postern.nets import evaluating
from postern.spiking.attention import SpikingProduct

MAC_PJ = 4.6
AC_PJ = 0.9


@dataclass(frozen=True)
class LayerOperations:
    """What a layer does for one image.

    Attributes:
        flops: multiplications with addition over all time steps, if nothing is left out.
        firing_rate: share of them whose input is a spike; None if the input is not spikes.
    """

    flops: float
    firing_rate: float | None

    @property
    def sops(self) -> float:
        """Additions, one a spike and synapse."""
        return 0.0 if self.firing_rate is None else self.firing_rate * self.flops

    @property
    def macs(self) -> float:
        """Multiplications with addition that are needed."""
        return self.flops if self.firing_rate is None else 0.0


def count_sops(model: nn.Module, batch: Tensor) -> dict[str, LayerOperations]:
    """Operations for an image of every convolution, linear layer and product of spikes, by its name.

    Args:
        model: a network; it is evaluated.
        batch: images [batch, channels, height, width], or [time, batch, channels, height, width].

    Raises:
        ValueError: neither images nor images in time, or none.
    """
    if batch.dim() not in (4, 5) or not batch.numel():
        raise ValueError(f"a batch has the shape [(time,) batch, channels, height, width], got {list(batch.shape)}")
    images = batch.shape[-4]
    found: dict[str, LayerOperations] = {}

    def listen(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            done = _operations(module, inputs, output)
            done = replace(done, flops=done.flops / images)
            found[name] = _sum(found[name], done) if name in found else done

        return hook

    handles = [
        module.register_forward_hook(listen(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear | SpikingProduct)
    ]
    try:
        with evaluating(model), torch.no_grad():
            model(batch)
    finally:
        for handle in handles:
            handle.remove()
    return found


def energy_mj(operations: Mapping[str, LayerOperations], mac_pj: float = MAC_PJ, ac_pj: float = AC_PJ) -> float:
    """Millijoules for an image: ``mac_pj`` for every MAC, ``ac_pj`` for every SOP.

    Args:
        operations: see `count_sops`.
        mac_pj: picojoules of a multiplication with addition.
        ac_pj: picojoules of an addition.
    """
    layers = operations.values()
    return 1e-9 * (mac_pj * sum(layer.macs for layer in layers) + ac_pj * sum(layer.sops for layer in layers))


def dense_energy_mj(operations: Mapping[str, LayerOperations], mac_pj: float = MAC_PJ) -> float:
    """Millijoules for an image if every operation is a MAC; with one time step that of the same network without spikes.

    Args:
        operations: see `count_sops`.
        mac_pj: picojoules of a multiplication with addition.
    """
    return 1e-9 * mac_pj * sum(layer.flops for layer in operations.values())


def _operations(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> LayerOperations:
    """Of the whole batch."""
    if isinstance(module, SpikingProduct):
        query, key, value = inputs
        flops = 2.0 * query.numel() * query.shape[-1]
        if not all(_is_spikes(x) for x in inputs):
            return LayerOperations(flops, None)
        # An addition where key and value spike together; then one for each feature and spike of the query.
        together = (key.double().sum(-1) * value.double().sum(-1)).sum().item()
        return LayerOperations(flops, (together + query.double().sum().item() * query.shape[-1]) / flops)
    weight = module.weight
    assert isinstance(weight, Tensor)
    flops = float(output.numel() * math.prod(weight.shape[1:]))
    return LayerOperations(flops, inputs[0].double().mean().item() if _is_spikes(inputs[0]) else None)


def _is_spikes(x: Tensor) -> bool:
    return bool(((x == 0) | (x == 1)).all())


def _sum(first: LayerOperations, second: LayerOperations) -> LayerOperations:
    """Of a layer that is called twice; real input the second time makes it real."""
    flops = first.flops + second.flops
    if first.firing_rate is None or second.firing_rate is None:
        return LayerOperations(flops, None)
    return LayerOperations(flops, (first.sops + second.sops) / flops)
