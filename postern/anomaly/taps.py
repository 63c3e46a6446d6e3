"""Read the outputs of inner layers of any network, pooled to one vector a sample, without changing the network.

Paper: A Simple Unified Framework for Detecting Out-of-Distribution Samples and Adversarial Attacks (arXiv 1807.03888),
which takes the mean over space of every block's output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Self

from jaxtyping import Float
from torch import Tensor, nn

Pool = Callable[[Tensor], Tensor]


def spatial_mean(output: Float[Tensor, "batch channels *space"]) -> Float[Tensor, "batch channels"]:
    """Mean over all dimensions after the second; a matrix stays as it is."""
    return output.flatten(2).mean(dim=2) if output.dim() > 2 else output


class _Tap:
    """A forward hook that keeps its module's pooled output while it listens."""

    def __init__(self, layer: str, pool: Pool) -> None:
        self.layer = layer
        self.pool = pool
        self.is_listening = False
        self.features: Tensor | None = None

    def __call__(self, module: nn.Module, inputs: object, output: object) -> None:
        if not self.is_listening:
            return
        if not isinstance(output, Tensor):
            raise ValueError(f"layer {self.layer!r} must return a tensor to be tapped, got {type(output).__name__}")
        features = self.pool(output)
        if features.dim() != 2:
            raise ValueError(
                f"the pooled output of layer {self.layer!r} must be [batch, features], got {list(features.shape)}"
            )
        self.features = features

    def take(self) -> Tensor:
        features, self.features = self.features, None
        if features is None:
            raise ValueError(f"layer {self.layer!r} did not run in the network's forward pass, so it has no features")
        return features


class FeatureTaps(nn.Module):
    """A network that also returns features of some of its layers, all from one forward pass.

    It puts a forward hook on each layer; the hooks do nothing when the network is used by itself, and go with `remove`
    or at the end of a ``with`` block. A layer that runs several times gives the features of its last run.

    Args:
        model: any network that takes one tensor.
        layers: names of submodules, as in ``model.get_submodule``; their outputs must be tensors.
        pool: makes ``[batch, features]`` of a layer's output. The default suits images with channels first; for
            tokens with the channels last use ``lambda tokens: tokens.mean(dim=1)``.

    Raises:
        ValueError: no layers, a name twice, or a name that the network does not have.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str], pool: Pool = spatial_mean) -> None:
        super().__init__()
        if isinstance(layers, str) or not layers or len(set(layers)) != len(layers):
            raise ValueError(f"layers is a list of different names, at least one, got {layers!r}")
        known = dict(model.named_modules())
        for layer in layers:
            if layer not in known:
                names = ", ".join(name for name in known if name)
                raise ValueError(f"the network has no layer {layer!r}; it has: {names}")
        self.model = model
        self.layers = tuple(layers)
        self._taps = [_Tap(layer, pool) for layer in layers]
        self._hooks = [known[tap.layer].register_forward_hook(tap) for tap in self._taps]

    def forward(self, inputs: Tensor) -> tuple[Tensor, list[Float[Tensor, "batch features"]]]:
        """Return the network's output and the features, in the order of ``layers``."""
        for tap in self._taps:
            tap.is_listening = True
        try:
            output = self.model(inputs)
            return output, [tap.take() for tap in self._taps]
        finally:
            for tap in self._taps:
                tap.is_listening, tap.features = False, None

    def remove(self) -> None:
        """Take the hooks off the network; the taps cannot be used afterwards."""
        for hook in self._hooks:
            hook.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()
