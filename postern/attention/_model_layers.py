"""The self-attention layers of a model of Transformers, known by their parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

_OUTPUT_PROJECTIONS = ("out_proj", "o_proj")


@dataclass(frozen=True)
class ModelAttention:
    """One layer.

    Attributes:
        module: the layer; its input is its first argument or ``hidden_states``.
        query: the projection to queries.
        key: the projection to keys, where there is one for all of them.
        value: likewise.
        output: the projection of the heads' outputs; None in layers that return these (BERT and its kin).
        num_heads: number of heads.
        head_dim: features of a head.
    """

    module: Any
    query: nn.Linear
    key: nn.Linear | None
    value: nn.Linear | None
    output: nn.Linear | None
    num_heads: int
    head_dim: int

    @property
    def width(self) -> int:
        """Features of a token of its input."""
        return self.query.in_features


def model_attention_layers(model: nn.Module, names: str = "*") -> dict[str, ModelAttention]:
    """The self-attention layers of a Transformers model by their names; cross-attention is left out.

    Args:
        model: the model.
        names: pattern of the names.
    """
    layers = {}
    for name, module in model.named_modules():
        layer = _as_layer(module) if fnmatchcase(name, names) else None
        if layer is not None and "Cross" not in type(module).__name__:
            layers[name] = layer
    return layers


def hidden_states(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The input of an attention layer, from what it is called with."""
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def split_heads(y: Float[Tensor, "batch time features"], num_heads: int) -> Float[Tensor, "batch heads time head_dim"]:
    """Cut the features of each token into heads."""
    return y.reshape(*y.shape[:-1], num_heads, -1).transpose(1, 2)


def _as_layer(module: Any) -> ModelAttention | None:
    num_heads = getattr(getattr(module, "config", None), "num_attention_heads", None)
    query = _linear(module, "q_proj", "query")
    output = _linear(module, *_OUTPUT_PROJECTIONS)
    if num_heads is None or query is None or (output is None and not hasattr(module, "query")):
        return None
    head_dim = getattr(module, "head_dim", getattr(module, "attention_head_size", query.out_features // num_heads))
    return ModelAttention(
        module,
        query,
        _linear(module, "k_proj", "key"),
        _linear(module, "v_proj", "value"),
        output,
        num_heads,
        head_dim,
    )


def _linear(module: nn.Module, *names: str) -> nn.Linear | None:
    found = (getattr(module, name, None) for name in names)
    return next((layer for layer in found if isinstance(layer, nn.Linear)), None)
