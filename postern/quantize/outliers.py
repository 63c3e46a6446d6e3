"""How large the outliers of a network's activations are.

Per-tensor quantisation of activations spreads its grid over their whole range, so that a few huge entries cost the
resolution of all others.

Paper: "Quantizable Transformers: Removing Outliers by Helping Attention Heads Do Nothing", arXiv 2306.12929: the
largest absolute activation ("maximum infinity norm") and the kurtosis of the layers' outputs, as its code computes
them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


def infinity_norm(x: Float[Tensor, "samples ..."]) -> Float[Tensor, " samples"]:
    """``max |x|`` of each sample."""
    return x.flatten(1).abs().amax(1)


def kurtosis(x: Float[Tensor, "samples ..."]) -> Float[Tensor, " samples"]:
    """``mean((x - mu)^4) / (sigma^4 + 1e-6)`` of each sample's entries: 3 for a normal distribution.

    The 1e-6 is the paper's code's; it keeps constant samples finite.
    """
    centred = x.flatten(1)
    centred = centred - centred.mean(1, keepdim=True)
    squares = centred.square()
    return squares.square().mean(1) / (squares.mean(1).square() + 1e-6)


@dataclass
class _Sums:
    samples: int = 0
    norm: float = 0.0
    kurtosis: float = 0.0


class OutlierStatistics:
    """Watches the outputs of a network's layers.

        with OutlierStatistics(model) as outliers:
            for batch in batches:
                model(batch)
        outliers.max_infinity_norm, outliers.mean_kurtosis

    A sample is a sequence or an image: all its entries, tokens and features, count as one vector.

    Args:
        model: the network.
        layers: which modules to watch: patterns of their names, such as ``"*.output.dense"`` for the feed-forward
            outputs of BERT; by default the members of the longest `torch.nn.ModuleList`, the layers of most
            transformers. A module's first output counts where there are several.

    Raises:
        ValueError: no module fits.
    """

    def __init__(self, model: nn.Module, layers: Sequence[str] | None = None) -> None:
        self._watched = _layers(model) if layers is None else _matching(model, layers)
        self._sums: dict[str, _Sums] = {name: _Sums() for name in self._watched}
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> OutlierStatistics:
        for name, module in self._watched.items():
            self._handles.append(module.register_forward_hook(self._hook(self._sums[name])))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @property
    def per_layer(self) -> dict[str, dict[str, float]]:
        """Mean over the samples of each layer's ``infinity_norm`` and ``kurtosis``.

        Raises:
            ValueError: a layer has seen no sample.
        """
        result = {}
        for name, sums in self._sums.items():
            if not sums.samples:
                raise ValueError(f"the layer {name!r} has seen no samples; run the model inside the with statement")
            result[name] = {"infinity_norm": sums.norm / sums.samples, "kurtosis": sums.kurtosis / sums.samples}
        return result

    @property
    def max_infinity_norm(self) -> float:
        """Infinity norm, averaged over the samples, then the maximum over the layers.

        Raises:
            ValueError: a layer has seen no sample.
        """
        return max(layer["infinity_norm"] for layer in self.per_layer.values())

    @property
    def mean_kurtosis(self) -> float:
        """Kurtosis, averaged over the samples and the layers.

        Raises:
            ValueError: a layer has seen no sample.
        """
        layers = self.per_layer.values()
        return sum(layer["kurtosis"] for layer in layers) / len(layers)

    @staticmethod
    def _hook(sums: _Sums) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            x = _first_tensor(output).detach().float()
            sums.samples += len(x)
            sums.norm += infinity_norm(x).sum().item()
            sums.kurtosis += kurtosis(x).sum().item()

        return hook


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    if not lists or not max(len(layers) for _, layers in lists):
        raise ValueError(f"{type(model).__name__} has no torch.nn.ModuleList of layers; say which layers to watch")
    prefix, longest = max(lists, key=lambda item: len(item[1]))
    return {f"{prefix}.{index}" if prefix else str(index): layer for index, layer in enumerate(longest)}


def _matching(model: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for pattern in patterns:
        modules = {name: module for name, module in model.named_modules() if fnmatchcase(name, pattern)}
        if not modules:
            raise ValueError(f"{type(model).__name__} has no module whose name fits {pattern!r}")
        found |= modules
    if not found:
        raise ValueError("statistics need at least one pattern of layers' names, got none")
    return found


def _first_tensor(output: Any) -> Tensor:
    if isinstance(output, Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output
    return next(value for value in values if isinstance(value, torch.Tensor))
