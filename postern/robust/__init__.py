"""Attacks on networks, and what makes networks withstand them and their faults."""

from postern.robust.attacks import ascend, bim, carlini_wagner_l2, deepfool, fgsm

__all__ = [
    "ascend",
    "bim",
    "carlini_wagner_l2",
    "deepfool",
    "fgsm",
]
