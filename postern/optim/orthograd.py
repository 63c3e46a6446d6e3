"""OrthoGrad: take the component along the weights out of every gradient before the optimiser sees it.

Once a training set is fitted, the steepest way to lower its loss is to scale the weights up, which changes no
prediction. Without that component the optimiser has to lower the loss by learning something.

Paper: "Grokking at the Edge of Numerical Stability" (arXiv 2501.04697), section 5.
The paper's equation 12 projects; its code also restores the norm of the gradient afterwards (``rescale=True``, the
default). What differs from the code here: a gradient that is parallel to its weights, as that of every one-element
tensor is, becomes zero instead of rounding errors scaled up to its norm; closures are projected as well; the state
dictionary is the inner optimiser's; and 16-bit gradients are projected in float32.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

_EPS = 1e-30


@torch.no_grad()
def orthogonal_component(
    gradient: Shaped[Tensor, "*shape"], weight: Shaped[Tensor, "*shape"], rescale: bool = True
) -> Shaped[Tensor, "*shape"]:
    """Return the part of a gradient that is orthogonal to the weights, both seen as vectors.

    ``g - <w, g> / <w, w> w``, times ``|g| / |g - <w, g> / <w, w> w|`` with ``rescale``. Minus it is a direction of
    descent, as its product with the gradient is not negative. Weights that are all zero leave the gradient as it is.

    Args:
        gradient: the loss's gradient with respect to the weight.
        weight: the weight.
        rescale: whether to restore the gradient's norm.

    Returns:
        The component, in the gradient's dtype; zero where nothing but rounding errors is left.

    Raises:
        ValueError: shapes that differ.
    """
    if gradient.shape != weight.shape:
        raise ValueError(f"weight has the shape {tuple(weight.shape)}, its gradient {tuple(gradient.shape)}")
    component = gradient.clone()
    _project_([component], [weight.detach()], rescale)
    return component


@torch.no_grad()
def orthogonalize_grad_(parameters: Iterable[Tensor] | Tensor, rescale: bool = True) -> None:
    """Replace, in place, each parameter's gradient by its component orthogonal to the parameter.

    For training loops and trainers that own their optimiser: call it between ``backward`` and ``step``. It does not
    wait for the device. See `orthogonal_component`.

    Args:
        parameters: tensors; those without a gradient are left alone, and one that comes twice is projected once.
        rescale: whether to restore each gradient's norm.

    Raises:
        ValueError: a sparse gradient.
    """
    alike: defaultdict[tuple[torch.device, torch.dtype], tuple[list[Tensor], list[Tensor]]]
    alike = defaultdict(lambda: ([], []))
    for parameter in dict.fromkeys([parameters] if isinstance(parameters, Tensor) else parameters):
        gradient = parameter.grad
        if gradient is None or gradient.numel() == 0:
            continue
        if gradient.layout != torch.strided:
            raise ValueError(f"a gradient must be dense to be projected, got the layout {gradient.layout}")
        gradients, weights = alike[gradient.device, gradient.dtype]
        gradients.append(gradient)
        weights.append(parameter.detach())
    for gradients, weights in alike.values():
        _project_(gradients, weights, rescale)


def _project_(gradients: list[Tensor], weights: list[Tensor], rescale: bool) -> None:
    """Project gradients of one device and dtype in place."""
    if gradients[0].is_complex():
        gradients = [torch.view_as_real(gradient) for gradient in gradients]
        weights = [torch.view_as_real(weight) for weight in weights]
    originals = gradients
    dtype = torch.promote_types(gradients[0].dtype, torch.float32)
    if dtype != gradients[0].dtype:
        gradients = [gradient.to(dtype) for gradient in gradients]
        weights = [weight.to(dtype) for weight in weights]

    norms = torch.stack(torch._foreach_norm(gradients))
    dots = torch.stack([torch.dot(w.reshape(-1), g.reshape(-1)) for w, g in zip(weights, gradients, strict=True)])
    along = dots / (torch.stack(torch._foreach_norm(weights)).square() + _EPS)
    for gradient, weight, minus_along in zip(gradients, weights, along.neg().unbind(), strict=True):
        gradient.addcmul_(weight, minus_along)
    left = torch.stack(torch._foreach_norm(gradients))
    # Below this, what is left of a gradient parallel to its weights is noise, which Adam or the rescaling would blow up
    is_left = left > 16 * torch.finfo(dtype).eps * norms
    factors = torch.where(is_left, norms / (left + _EPS) if rescale else 1.0, 0.0)
    factors = torch.where(norms > 0, factors, 1.0)  # gradients so small that their squares underflow keep their scale
    torch._foreach_mul_(gradients, list(factors.unbind()))
    if gradients is not originals:
        torch._foreach_copy_(originals, gradients)


class OrthoGrad(torch.optim.Optimizer):
    """Wraps an optimiser so that it steps along gradients orthogonal to the weights, tensor by tensor.

        optimizer = OrthoGrad(torch.optim.AdamW(model.parameters(), lr=1e-3))

    ``param_groups``, ``state``, ``defaults`` and the state dictionary are the inner optimiser's own, so that learning
    rate schedulers, gradient scalers and checkpoints work as without the wrapper; a checkpoint of a plain AdamW
    continues under OrthoGrad and the other way round. ``step`` leaves the projected gradients in ``.grad``. The
    projection compiles as one graph; the steps of torch's optimisers, and so this one, break it.

    The norm of the weights still grows, as a step at a right angle adds length. Tensors of one element (a scalar
    gate, a PReLU slope) have no direction at a right angle and stand still; keep them, and whatever else should see
    its whole gradient, in a parameter group with ``"orthogonalize": False``:

        OrthoGrad(torch.optim.SGD([{"params": weights}, {"params": gates, "orthogonalize": False}], lr=0.1))

    Args:
        optimizer: the optimiser to wrap.
        rescale: whether to restore each gradient's norm after the projection, as the paper's code does; the paper's
            equation 12 does not.

    Raises:
        ValueError: something that is no optimiser.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, rescale: bool = True) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise ValueError(f"OrthoGrad wraps a torch.optim.Optimizer, got {type(optimizer).__name__}")
        self.optimizer = optimizer
        self.rescale = rescale
        state, param_groups = optimizer.state, optimizer.param_groups
        super().__init__(param_groups, optimizer.defaults)
        # Optimizer.__init__ starts both afresh, through the properties below
        self.state, self.param_groups = state, param_groups

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The inner optimiser's state."""
        return self.optimizer.state

    @state.setter
    def state(self, state: defaultdict[Tensor, Any]) -> None:
        self.optimizer.state = state

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The inner optimiser's parameter groups."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, param_groups: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = param_groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group to the inner optimiser."""
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return the inner optimiser's state dictionary."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dictionary of this or of the inner optimiser."""
        self.optimizer.load_state_dict(state_dict)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Project the gradients and let the inner optimiser step.

        Args:
            closure: evaluates the loss and its gradients; its gradients are projected each time it is called.

        Returns:
            What the inner optimiser returns: the closure's loss, or None.

        Raises:
            ValueError: a sparse gradient.
        """
        if closure is None:
            self._orthogonalize()
            return self.optimizer.step()

        def projected() -> Any:
            loss = closure()
            self._orthogonalize()
            return loss

        return self.optimizer.step(projected)

    def _orthogonalize(self) -> None:
        chosen = [group["params"] for group in self.param_groups if group.get("orthogonalize", True)]
        orthogonalize_grad_([parameter for parameters in chosen for parameter in parameters], self.rescale)

    def __getstate__(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer, "rescale": self.rescale, "defaults": self.optimizer.defaults}

    def __repr__(self) -> str:
        return f"OrthoGrad(rescale={self.rescale}) around {self.optimizer!r}"
