"""How far a network's training goes into scaling its weights: the alignment of its gradients with them.

In a network that is homogeneous in its weights, moving along them multiplies all logits by one factor. After the
training set is fitted this lowers the loss without changing a prediction: naive loss minimisation (NLM).

Paper: "Grokking at the Edge of Numerical Stability" (arXiv 2501.04697), definition 4 and section 3.3.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


@torch.no_grad()
def nlm_alignment(model: nn.Module) -> dict[str, float]:
    """Return, for each parameter tensor that has a gradient, the cosine between ``-gradient`` and the tensor.

    1 means that gradient descent only scales the tensor up, 0 that it moves at a right angle to it. Call it after
    ``backward`` and before `OrthoGrad` steps, which takes this component out.

    Args:
        model: a module whose gradients are those of the loss.

    Returns:
        Cosines by parameter name; 0 where the gradient or the tensor is zero.

    Raises:
        ValueError: no parameter has a gradient.
    """
    cosines = {
        name: _cosine(-parameter.grad, parameter)
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    if not cosines:
        raise ValueError("no parameter has a gradient; call backward on the loss first")
    return cosines


@torch.no_grad()
def weight_norm(parameters: Iterable[Tensor]) -> float:
    """Return the Euclidean norm of all parameters together.

    Args:
        parameters: tensors.

    Returns:
        The norm, 0 for no parameters.
    """
    return math.sqrt(sum(float(parameter.double().square().sum()) for parameter in parameters))


def _cosine(first: Tensor, second: Tensor) -> float:
    # in float64, where the tiny gradients of a fitted network have squares
    first, second = first.double().flatten(), second.double().flatten()
    lengths = first.norm() * second.norm()
    return float(first @ second / lengths) if lengths > 0 else 0.0
