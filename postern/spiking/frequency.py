"""Which frequencies spiking neurons pass on: in time, from a neuron's equation and its spikes; in space, by layer.

Below the threshold a leaky neuron is a first-order low-pass filter over time steps,

    H(z) = V(z) / I(z) = (1 - beta) / (1 - beta z^-1)

If firing is linearised, ``S = k V``, and ``W`` is the kernel of a synapse, a layer is ``k W(z) H(z)``, and layers
multiply. That is a statement about time; what images lose in space is another one, measured from feature maps.

Paper: "Spiking Neural Networks Need High-Frequency Information", arXiv 2505.18608. The gain of spikes and the profile
along the diagonal of the spectrum (after arXiv 2202.06709) are our measures of what it shows in figures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Complex, Float
from torch import Tensor, nn

from postern.nets import evaluating
from postern.spiking.neurons import IF, LIF


def lif_transfer(
    beta: float,
    f: Float[Tensor, "*shape"],
    layers: int = 1,
    *,
    firing_gain: float = 1.0,
    kernel: Sequence[float] = (1.0,),
) -> Complex[Tensor, "*shape"]:
    """``(k W(z) (1 - beta) / (1 - beta z^-1))^layers`` at ``z = exp(2 pi i f)``.

    Args:
        beta: what a neuron keeps of its potential in a step; 1 for integrate-and-fire, ``1 / (1 - z^-1)``, whose gain
            at 0 is infinite.
        f: frequency in cycles per step, 1/2 at most.
        layers: how many in a row.
        firing_gain: ``k``, spikes per step and unit of potential.
        kernel: ``W``, the synapse's weights at a delay of 0, 1, ... steps.

    Raises:
        ValueError: beta outside [0, 1], fewer than one layer, or an empty kernel.
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"a neuron keeps a share of its potential, 0 <= beta <= 1, got {beta}")
    if layers < 1 or not kernel:
        raise ValueError(f"a cascade has at least one layer and a kernel one weight, got {layers} and {list(kernel)}")
    delay = torch.exp(-2j * math.pi * f)
    synapse = torch.stack([weight * delay**n for n, weight in enumerate(kernel)]).sum(0)
    gain = 1 - beta if beta < 1 else 1.0
    one_layer: Tensor = firing_gain * synapse * gain / (1 - beta * delay)
    return one_layer**layers


def coherent_gain(
    neuron: Callable[[Tensor], Tensor],
    freqs: Float[Tensor, " freqs"],
    bias: float,
    amplitude: float,
    trials: int,
    *,
    num_steps: int = 512,
    generator: torch.Generator | None = None,
) -> Float[Tensor, " freqs"]:
    """``|E[Y X*]| / E[|X|^2]``: how much of white noise in a neuron's current is found in its spikes, by frequency.

    ``X`` is the Fourier transform of the noise, ``Y`` that of the response less its mean. Only what follows the noise
    counts, not the spikes' own noise.

    Args:
        neuron: maps a current [time, trials] to a response of the same shape, such as `LIF`.
        freqs: in cycles per step, in [0, 1/2].
        bias: mean of the current.
        amplitude: standard deviation of the noise, which is normal.
        trials: neurons with noise of their own.
        num_steps: time steps.
        generator: of the noise.

    Raises:
        ValueError: a frequency outside [0, 1/2], an amplitude that is not positive, or no trials or steps.
    """
    if not len(freqs) or not 0 <= float(freqs.min()) <= float(freqs.max()) <= 0.5:
        raise ValueError(f"frequencies lie in 0..1/2 cycles per step, got {freqs.tolist()}")
    if not amplitude > 0 or min(trials, num_steps) < 1:
        raise ValueError(
            f"amplitude, trials and steps are positive, got {amplitude}, trials={trials}, num_steps={num_steps}"
        )
    noise = amplitude * torch.randn(num_steps, trials, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        response = neuron(bias + noise)
    phases = torch.exp(-2j * math.pi * freqs.double()[:, None] * torch.arange(num_steps))
    stimulus = phases @ noise.to(phases.dtype)
    found = phases @ (response - response.mean()).to(phases.dtype)
    gain = (found * stimulus.conj()).mean(1).abs() / stimulus.abs().square().mean(1)
    return gain.to(freqs.dtype)


def log_amplitude_spectrum(
    features: Float[Tensor, "batch channels height width"],
) -> Float[Tensor, "height width"]:
    """Mean over the maps of ``log |F|`` of the 2-D Fourier transform, less its value at frequency 0, in nats.

    Frequency 0 is in the middle, ``[height // 2, width // 2]``.

    Args:
        features: maps.

    Raises:
        ValueError: not a batch of maps.
    """
    if features.dim() != 4 or not features.numel():
        raise ValueError(f"features have the shape [batch, channels, height, width], got {list(features.shape)}")
    amplitude = torch.fft.fftshift(torch.fft.fft2(features.float()).abs(), dim=(-2, -1))
    logarithm = (amplitude + 1e-6).log().mean((0, 1))
    relative: Tensor = logarithm - logarithm[features.shape[2] // 2, features.shape[3] // 2]
    return relative


def relative_log_amplitude(features: Float[Tensor, "batch channels side side"]) -> Float[Tensor, " freqs"]:
    """`log_amplitude_spectrum` along its diagonal, from frequency 0 to 1/2: below 0 where high ones are weak.

    Args:
        features: square maps.

    Returns:
        ``side // 2 + 1`` numbers, at ``k / side`` cycles per pixel in both directions.

    Raises:
        ValueError: not a batch of square maps.
    """
    if features.dim() != 4 or features.shape[2] != features.shape[3]:
        raise ValueError(f"features have the shape [batch, channels, side, side], got {list(features.shape)}")
    spectrum = log_amplitude_spectrum(features)
    # Even sides have -1/2 alone, which is 1/2 as well; towards negative frequencies the diagonal is the same.
    return spectrum.diagonal()[: features.shape[2] // 2 + 1].flip(0)


def spike_spectra(network: nn.Module, x: Tensor) -> dict[str, Float[Tensor, " freqs"]]:
    """`relative_log_amplitude` of the spikes of every neuron of a network that has square maps, by its name.

    Args:
        network: with `LIF` or `IF` neurons; it is evaluated.
        x: what it is called with.

    Raises:
        ValueError: no neuron with square maps of more than one position.
    """
    found: dict[str, Tensor] = {}

    def listen(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], spikes: Tensor) -> None:
            if spikes.dim() == 5 and spikes.shape[-1] == spikes.shape[-2] > 1:
                found[name] = relative_log_amplitude(spikes.flatten(0, 1))

        return hook

    handles = [
        module.register_forward_hook(listen(name))
        for name, module in network.named_modules()
        if isinstance(module, LIF | IF)
    ]
    try:
        with evaluating(network), torch.no_grad():
            network(x)
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise ValueError("the network has no spiking neurons with square maps of more than one position")
    return found
