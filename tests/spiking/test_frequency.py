import math

import numpy as np
import pytest
import torch
from scipy.signal import freqz

from postern.spiking import (
    LIF,
    MaxResNet,
    coherent_gain,
    lif_transfer,
    log_amplitude_spectrum,
    relative_log_amplitude,
    spike_spectra,
)


@pytest.mark.parametrize(
    ("beta", "expected"),
    [(0.5, (1, 0.679, 0.447, 0.333)), (0.75, (1, 0.353, 0.200, 0.143)), (0.9, (1, 0.136, 0.074, 0.053))],
)
def test_gains_of_the_filter(beta, expected):
    gain = lif_transfer(beta, torch.tensor([0, 1 / 8, 1 / 4, 1 / 2])).abs()
    torch.testing.assert_close(gain, torch.tensor(expected).float(), atol=5e-4, rtol=0)


def test_the_filter_is_that_of_scipy():
    f = torch.linspace(0.01, 0.5, 9, dtype=torch.float64)
    _, expected = freqz([0.3 * 1.5, -0.3 * 0.5], [1, -0.7], worN=2 * math.pi * f.numpy())
    found = lif_transfer(0.7, f, 3, firing_gain=1.0, kernel=(1.5, -0.5))
    np.testing.assert_allclose(found.numpy(), expected**3)
    _, integrator = freqz([2.0], [1, -1], worN=2 * math.pi * f.numpy())
    np.testing.assert_allclose(lif_transfer(1.0, f, firing_gain=2.0).numpy(), integrator)
    with pytest.raises(ValueError, match=r"0 <= beta <= 1, got 1.5"):
        lif_transfer(1.5, f)
    with pytest.raises(ValueError, match="got 0 and"):
        lif_transfer(0.5, f, 0)


def test_the_gain_of_a_linear_filter_is_its_transfer_function():
    """An infinite impulse response, run step by step."""
    freqs = torch.tensor([0.0, 0.05, 0.2, 0.5])

    def potential(current):
        after, found = torch.zeros_like(current[0]), []
        for step in current:
            after = 0.75 * after + 0.25 * step
            found.append(after)
        return torch.stack(found)

    gain = coherent_gain(potential, freqs, 0.3, 2.0, 200, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(gain, lif_transfer(0.75, freqs).abs(), atol=0.02, rtol=0.05)


def test_what_does_not_follow_the_noise_does_not_count():
    generator = torch.Generator().manual_seed(0)
    freqs = torch.tensor([0.1, 0.3])
    gain = coherent_gain(lambda current: torch.rand_like(current), freqs, 0.0, 1.0, 400, generator=generator)
    assert gain.max() < 0.05
    gain = coherent_gain(lambda current: 3 * current + torch.rand_like(current), freqs, 1.0, 0.5, 400)
    torch.testing.assert_close(gain, torch.full((2,), 3.0), rtol=0.1, atol=0)


def test_bad_frequencies():
    for freqs in ([], [-0.1], [0.6]):
        with pytest.raises(ValueError, match=r"0\.\.1/2"):
            coherent_gain(LIF(), torch.tensor(freqs), 0.5, 0.3, 4)
    with pytest.raises(ValueError, match="positive, got 0"):
        coherent_gain(LIF(), torch.tensor([0.1]), 0.5, 0.0, 4)


def test_the_spectrum_of_an_impulse_is_flat_and_that_of_a_blur_falls():
    impulse = torch.zeros(2, 3, 8, 8)
    impulse[..., 2, 5] = 1
    torch.testing.assert_close(relative_log_amplitude(impulse), torch.zeros(5), atol=1e-5, rtol=0)
    kernel = torch.tensor([0.25, 0.5, 0.25])
    rows = torch.stack([impulse.roll(n, -1) * kernel[n + 1] for n in (-1, 0, 1)]).sum(0)
    blurred = torch.stack([rows.roll(n, -2) * kernel[n + 1] for n in (-1, 0, 1)]).sum(0)
    f = torch.arange(4) / 8  # at 1/2 the blur is 0
    expected = 2 * (0.5 + 0.5 * torch.cos(2 * math.pi * f)).log()
    torch.testing.assert_close(relative_log_amplitude(blurred)[:4], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("side", [7, 8])
def test_the_profile_is_the_diagonal_from_the_middle(side):
    features = torch.rand(2, 2, side, side, generator=torch.Generator().manual_seed(0))
    spectrum = np.log(np.abs(np.fft.fft2(features.double().numpy()))).mean((0, 1))
    expected = np.array([spectrum[k, k] - spectrum[0, 0] for k in range(side // 2 + 1)])
    np.testing.assert_allclose(relative_log_amplitude(features).numpy(), expected, atol=1e-4)
    found = log_amplitude_spectrum(features)
    np.testing.assert_allclose(found.numpy(), np.fft.fftshift(spectrum) - spectrum[0, 0], atol=1e-4)


def test_spectra_of_a_network():
    network = MaxResNet((1, 1), (4, 8), 2, in_channels=1)
    spectra = spike_spectra(network, torch.rand(3, 1, 8, 8))
    assert set(spectra) == {
        "stages.0.0.residual.0",
        "stages.0.0.residual.2",
        "stages.1.0.residual.0",
        "stages.1.0.residual.2",
        "neuron",
    }
    assert {len(spectrum) for spectrum in spectra.values()} == {5, 3}
    assert network.training
    assert not any(module._forward_hooks for module in network.modules())
    with pytest.raises(ValueError, match="no spiking neurons"):
        spike_spectra(torch.nn.Identity(), torch.rand(1, 1, 8, 8))
    with pytest.raises(ValueError, match=r"\[1, 1, 8, 4\]"):
        relative_log_amplitude(torch.rand(1, 1, 8, 4))
    with pytest.raises(ValueError, match=r"\[8, 4\]"):
        log_amplitude_spectrum(torch.rand(8, 4))
