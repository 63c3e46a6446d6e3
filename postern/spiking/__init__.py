"""Spiking networks: neurons with surrogate gradients, their frequencies and energy, Max-Former and Max-ResNet."""

from postern.spiking.attention import QKTokenAttention, SpikingProduct, SpikingSelfAttention, spiking_attention
from postern.spiking.embeddings import (
    Embed,
    EmbedMax,
    EmbedMaxFirst,
    EmbedMaxPlus,
    EmbedOneMax,
    EmbedOrig,
    EmbedOrigImageNet,
    EmbedOrigStrided,
    MaxEmbed,
)
from postern.spiking.energy import LayerOperations, count_sops, dense_energy_mj, energy_mj
from postern.spiking.frequency import (
    coherent_gain,
    lif_transfer,
    log_amplitude_spectrum,
    relative_log_amplitude,
    spike_spectra,
)
from postern.spiking.max_former import (
    STRIDED,
    MaxFormer,
    Mixer,
    SpikingBlock,
    max_former_cifar,
    max_former_events,
    max_former_imagenet,
    ms_qkformer_cifar,
)
from postern.spiking.max_resnet import MaxResNet, MembraneBlock
from postern.spiking.mixers import DWCMixer, PoolMixer
from postern.spiking.mlp import SpikingMLP
from postern.spiking.neurons import IF, LIF, Dynamics, integrate_and_fire, integrate_and_fire_reference
from postern.spiking.replacing import SnnTorchNeuron, replace_neurons
from postern.spiking.surrogate import heaviside, surrogate_derivative
from postern.spiking.time_steps import ConvNorm, at_each_step

__all__ = [
    "IF",
    "LIF",
    "STRIDED",
    "ConvNorm",
    "DWCMixer",
    "Dynamics",
    "Embed",
    "EmbedMax",
    "EmbedMaxFirst",
    "EmbedMaxPlus",
    "EmbedOneMax",
    "EmbedOrig",
    "EmbedOrigImageNet",
    "EmbedOrigStrided",
    "LayerOperations",
    "MaxEmbed",
    "MaxFormer",
    "MaxResNet",
    "MembraneBlock",
    "Mixer",
    "PoolMixer",
    "QKTokenAttention",
    "SnnTorchNeuron",
    "SpikingBlock",
    "SpikingMLP",
    "SpikingProduct",
    "SpikingSelfAttention",
    "at_each_step",
    "coherent_gain",
    "count_sops",
    "dense_energy_mj",
    "energy_mj",
    "heaviside",
    "integrate_and_fire",
    "integrate_and_fire_reference",
    "lif_transfer",
    "log_amplitude_spectrum",
    "max_former_cifar",
    "max_former_events",
    "max_former_imagenet",
    "ms_qkformer_cifar",
    "relative_log_amplitude",
    "replace_neurons",
    "spike_spectra",
    "spiking_attention",
    "surrogate_derivative",
]
