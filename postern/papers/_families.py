"""The families that papers belong to, each the name of a package of postern."""

from collections.abc import Mapping
from types import MappingProxyType

FAMILIES: Mapping[str, str] = MappingProxyType(
    {
        "softmax": "Normalisers and their kernels",
        "heads": "Output layers and their losses",
        "attention": "Attention, linear attention, decoding",
        "experts": "Routers, mixture layers, Gaussian mixtures of experts",
        "adaptive": "Early exit and dynamic pruning",
        "dynamics": "State-space view and in-context learners",
        "quantize": "Calibration, bit allocation, codebooks",
        "robust": "Bounds, fine-tuning, faults and clipped activations",
        "anomaly": "Out-of-distribution and zero-shot gates",
        "boxes": "Non-maximum suppression",
        "optim": "Optimisers and online learners",
        "privacy": "Differentially private training",
        "rl": "Policy optimisation, offloading, adaptive defence",
        "spiking": "Spiking networks",
        "backdoor": "Triggers, attacks, defences",
        "alignment": "Safety of language models, on model organisms",
    }
)
