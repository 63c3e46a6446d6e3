"""Optimisers and wrappers of optimisers, and what they reveal of a training run."""

from postern.optim.alignment import nlm_alignment, weight_norm
from postern.optim.orthograd import OrthoGrad, orthogonal_component, orthogonalize_grad_

__all__ = [
    "OrthoGrad",
    "nlm_alignment",
    "orthogonal_component",
    "orthogonalize_grad_",
    "weight_norm",
]
