"""Per-head gates for a model of Hugging Face Transformers, fitted in one call.

Paper: "Quantizable Transformers: Removing Outliers by Helping Attention Heads Do Nothing", arXiv 2306.12929.

The gates are submodules of the model's attention layers, called ``per_head_gate``, and act through hooks; the model's
own code, its other parameters' names and its attention implementation stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from postern.attention.per_head_gate import GateKind, PerHeadGate

_OUTPUT_PROJECTIONS = ("out_proj", "o_proj")


def add_per_head_gates(
    model: nn.Module,
    kind: GateKind = "linear",
    *,
    initial_probability: float = 0.25,
    hidden_dim: int | None = None,
    weight_std: float | None = None,
    is_rescaled: bool = False,
    modules: str = "*",
) -> dict[str, PerHeadGate]:
    """Fit a per-head gate into every self-attention layer of a Transformers model, in place.

    Layers are known by their parts: those with ``q_proj`` and ``out_proj`` or ``o_proj`` (OPT, ViT, Llama and others)
    are gated before their output projection, those with ``query`` and no output projection (BERT and its kin) after
    their heads. Cross-attention is left alone. A later ``load_state_dict`` finds the gates under ``per_head_gate``;
    ``from_pretrained`` knows nothing of them, so fit the gates first and then load the state.

    Args:
        model: e.g. an ``OPTForCausalLM``, ``BertForMaskedLM`` or ``ViTForImageClassification``.
        kind: see `PerHeadGate`; the paper takes "linear" for OPT and "mlp" for BERT.
        initial_probability: see `PerHeadGate`.
        hidden_dim: see `PerHeadGate`.
        weight_std: see `PerHeadGate`; 0.001 to 0.01 for a trained model.
        is_rescaled: see `PerHeadGate`; true for a trained model, so that it starts out unchanged.
        modules: pattern of the names of the layers to gate, e.g. ``"*decoder*"``.

    Returns:
        The gates by the names of their attention layers.

    Raises:
        ValueError: no layer fits the pattern, one has a gate already, or a setting is impossible.
    """
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if fnmatchcase(name, modules) and _is_self_attention(layer) and "Cross" not in type(layer).__name__
    }
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no self-attention layer that fits {modules!r} with a config and either "
            f"q_proj and {' or '.join(_OUTPUT_PROJECTIONS)}, or query"
        )
    gated = [name for name, layer in layers.items() if hasattr(layer, "per_head_gate")]
    if gated:
        raise ValueError(f"the attention layer {gated[0]!r} has a gate already")
    gates = {}
    for name, layer in layers.items():
        query = _query(layer)
        gate = PerHeadGate(
            query.in_features,
            layer.config.num_attention_heads,
            kind,
            initial_probability=initial_probability,
            hidden_dim=hidden_dim,
            weight_std=weight_std,
            is_rescaled=is_rescaled,
        )
        gates[name] = gate.to(query.weight)
    for name, layer in layers.items():
        layer.per_head_gate = gates[name]
        hooks = _GateHooks()
        projection = _output_projection(layer)
        if projection is None:
            layer.register_forward_hook(hooks.gate_output, with_kwargs=True)
        else:
            layer.register_forward_pre_hook(hooks.open, with_kwargs=True)
            projection.register_forward_pre_hook(hooks.gate_input)
    return gates


def _query(layer: nn.Module) -> Any:
    """The projection to queries, if the layer has one."""
    query = getattr(layer, "q_proj", getattr(layer, "query", None))
    return query if isinstance(query, nn.Linear) else None


def _output_projection(layer: nn.Module) -> nn.Module | None:
    for name in _OUTPUT_PROJECTIONS:
        projection = getattr(layer, name, None)
        if isinstance(projection, nn.Module):
            return projection
    return None


def _is_self_attention(layer: nn.Module) -> bool:
    has_heads = hasattr(getattr(layer, "config", None), "num_attention_heads")
    return (
        has_heads and _query(layer) is not None and (hasattr(layer, "query") or _output_projection(layer) is not None)
    )


class _GateHooks:
    """One layer's hooks. They are methods, so that a deep copy of the model gets hooks of its own."""

    def __init__(self) -> None:
        self.factors: Tensor | None = None

    def open(self, layer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Before the layer: compute the gate from its input."""
        self.factors = layer.per_head_gate(_hidden(args, kwargs))

    def gate_input(self, projection: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Before the layer's output projection: multiply the heads by the gate."""
        if self.factors is None:
            raise RuntimeError("the output projection was called outside its attention layer, where it has no gate")
        factors, self.factors = self.factors, None
        return (_gated(args[0], factors), *args[1:])

    def gate_output(self, layer: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        """After a layer without output projection: multiply the heads by the gate."""
        factors = layer.per_head_gate(_hidden(args, kwargs))
        if isinstance(output, tuple):
            return (_gated(output[0], factors), *output[1:])
        return _gated(output, factors)


def _hidden(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def _gated(heads: Tensor, factors: Tensor) -> Tensor:
    """Multiply ``[batch, time, heads * head_dim]`` by ``[batch, heads, time, 1]``."""
    return (heads.reshape(*heads.shape[:2], factors.shape[1], -1) * factors.transpose(1, 2)).flatten(-2)
