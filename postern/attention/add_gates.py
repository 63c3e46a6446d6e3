"""Gates for a model of Hugging Face Transformers, fitted in one call.

Papers: "Gated Attention for Large Language Models: Non-linearity, Sparsity, and Attention-Sink-Free", arXiv 2505.06708,
and "Quantizable Transformers: Removing Outliers by Helping Attention Heads Do Nothing", arXiv 2306.12929.

The gates are submodules of the model's attention layers, called ``heads_gate``, ``value_gate`` and so on after what
they gate, and act through hooks; the model's own code, its other parameters' names and its attention implementation
stay as they are. A later ``load_state_dict`` finds the gates; ``from_pretrained`` knows nothing of them, so fit the
gates first and then load the state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from postern.attention._model_layers import ModelAttention, hidden_states, model_attention_layers, split_heads
from postern.attention.gated import AttentionGate, GateActivation, GateGranularity
from postern.attention.per_head_gate import GateKind, PerHeadGate
from postern.attention.self_attention import GatePosition, check_position

Gate = TypeVar("Gate", bound=nn.Module)


def add_attention_gates(
    model: nn.Module,
    position: GatePosition = "heads",
    *,
    granularity: GateGranularity = "element",
    activation: GateActivation | None = None,
    is_shared: bool = False,
    is_additive: bool = False,
    is_input_dependent: bool = True,
    bias: bool = False,
    initial_std: float | None = None,
    modules: str = "*",
) -> dict[str, AttentionGate]:
    """Fit an `AttentionGate` into every self-attention layer of a Transformers model, in place.

    The gates are for models that are then trained from scratch: the paper finds no use in adding them to trained ones.

    Args:
        model: e.g. ``LlamaForCausalLM(config)``; see `add_gates`.
        position: what is gated, see `GatedAttention`.
        granularity: see `AttentionGate`.
        activation: see `AttentionGate`.
        is_shared: see `AttentionGate`.
        is_additive: see `AttentionGate`.
        is_input_dependent: see `AttentionGate`.
        bias: see `AttentionGate`.
        initial_std: standard deviation of the gates' initial weights; by default that of the model's own.
        modules: pattern of the names of the layers to gate.

    Returns:
        The gates by the names of their attention layers.

    Raises:
        ValueError: see `add_gates` and `AttentionGate`.
    """
    config = getattr(model, "config", None)
    std = initial_std
    if std is None:
        std = getattr(config, "initializer_range", getattr(config, "init_std", 0.02))

    def make(width: int, num_heads: int, head_dim: int) -> AttentionGate:
        return AttentionGate(
            width,
            num_heads,
            head_dim,
            granularity=granularity,
            activation=activation,
            is_shared=is_shared,
            is_additive=is_additive,
            is_input_dependent=is_input_dependent,
            bias=bias,
            initial_std=std,
        )

    return add_gates(model, make, position, modules=modules)


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
    """Fit a `PerHeadGate` into every self-attention layer of a Transformers model, in place.

    Args:
        model: e.g. an ``OPTForCausalLM``, ``BertForMaskedLM`` or ``ViTForImageClassification``; see `add_gates`.
        kind: see `PerHeadGate`; the paper takes "linear" for OPT and "mlp" for BERT.
        initial_probability: see `PerHeadGate`.
        hidden_dim: see `PerHeadGate`.
        weight_std: see `PerHeadGate`; 0.001 to 0.01 for a trained model.
        is_rescaled: see `PerHeadGate`; true for a trained model, so that it starts out unchanged.
        modules: pattern of the names of the layers to gate, e.g. ``"*decoder*"``.

    Returns:
        The gates by the names of their attention layers.

    Raises:
        ValueError: see `add_gates` and `PerHeadGate`.
    """

    def make(width: int, num_heads: int, head_dim: int) -> PerHeadGate:
        return PerHeadGate(
            width,
            num_heads,
            kind,
            initial_probability=initial_probability,
            hidden_dim=hidden_dim,
            weight_std=weight_std,
            is_rescaled=is_rescaled,
        )

    return add_gates(model, make, modules=modules)


def add_gates(
    model: nn.Module,
    make: Callable[[int, int, int], Gate],
    position: GatePosition = "heads",
    *,
    modules: str = "*",
) -> dict[str, Gate]:
    """Fit a gate into every self-attention layer of a Transformers model, in place.

    Layers are known by their parts: those with ``q_proj`` and ``out_proj`` or ``o_proj`` (OPT, ViT, Llama, Qwen3 and
    others), and those with ``query`` and no output projection (BERT and its kin), which have no "output" to gate.
    Cross-attention is left alone. Gates at several positions may be fitted one after the other.

    Args:
        model: a Transformers model; ones that are built from a configuration will do.
        make: ``make(width, num_heads, head_dim)``, where the layer's input has ``width`` features and what is gated has
            ``num_heads`` heads of ``head_dim`` features; gives a module ``(y, x) -> y`` as in `SelfAttention`.
        position: what is gated, see `SelfAttention`.
        modules: pattern of the names of the layers to gate, e.g. ``"*decoder*"``.

    Returns:
        The gates by the names of their attention layers.

    Raises:
        ValueError: an unknown position, no layer fits the pattern, one has a gate there already or nothing that can be
            gated there, or a setting of the gates is impossible.
    """
    check_position(position)
    layers = model_attention_layers(model, modules)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no self-attention layer that fits {modules!r} with a config and either "
            "q_proj and out_proj or o_proj, or query"
        )
    attribute = f"{position}_gate"
    gates = {}
    for name, layer in layers.items():
        if hasattr(layer.module, attribute):
            raise ValueError(f"the attention layer {name!r} has a gate already, on its {position}")
        gate = make(layer.width, *_gated_shape(name, layer, position))
        gates[name] = gate.to(layer.query.weight)
    for name, layer in layers.items():
        setattr(layer.module, attribute, gates[name])
        num_heads, _ = _gated_shape(name, layer, position)
        _GateHooks(gates[name], num_heads).register(layer, position)
    return gates


def _gated_shape(name: str, layer: ModelAttention, position: GatePosition) -> tuple[int, int]:
    """Heads and their features of what is gated."""
    if position == "heads":
        features = layer.query.out_features if layer.output is None else layer.output.in_features
        return layer.num_heads, features // layer.num_heads
    projection = getattr(layer, position)
    if projection is None:
        raise ValueError(f"the attention layer {name!r} has no projection to its {position} that could be gated")
    features = projection.out_features
    if position == "output":
        return 1, features
    if features % layer.head_dim or (position == "query" and features != layer.num_heads * layer.head_dim):
        raise ValueError(
            f"the attention layer {name!r} projects to {features} features for its {position}, which are not "
            f"heads of {layer.head_dim}"
        )
    return features // layer.head_dim, layer.head_dim


class _GateHooks:
    """One gate's hooks. They are methods, so that a deep copy of the model gets hooks of its own."""

    def __init__(self, gate: nn.Module, num_heads: int) -> None:
        self.gate = gate
        self.num_heads = num_heads
        self.hidden: Tensor | None = None

    def register(self, layer: ModelAttention, position: GatePosition) -> None:
        if position in ("value", "key", "query"):
            getattr(layer, position).register_forward_hook(self.after_projection)
        elif position == "output" or layer.output is None:
            layer.module.register_forward_hook(self.after_layer, with_kwargs=True)
        else:
            layer.module.register_forward_pre_hook(self.before_layer, with_kwargs=True)
            layer.output.register_forward_pre_hook(self.before_output)

    def after_projection(self, projection: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """After queries, keys or values are made of the layer's input."""
        return self.gated(output, args[0])

    def before_layer(self, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Keep the layer's input until the heads are there."""
        self.hidden = hidden_states(args, kwargs)

    def before_output(self, projection: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Before the layer's output projection, which sees the heads."""
        if self.hidden is None:
            raise RuntimeError("the output projection was called outside its attention layer, where it has no gate")
        hidden, self.hidden = self.hidden, None
        return (self.gated(args[0], hidden), *args[1:])

    def after_layer(self, layer: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> Any:
        """After the layer, which returns its output, or the heads where it has no output projection."""
        hidden = hidden_states(args, kwargs)
        if isinstance(output, tuple):
            return (self.gated(output[0], hidden), *output[1:])
        return self.gated(output, hidden)

    def gated(self, y: Tensor, hidden: Tensor) -> Tensor:
        """Gate ``[batch, time, heads * head_dim]``."""
        gated: Tensor = self.gate(split_heads(y, self.num_heads), hidden).transpose(1, 2).flatten(-2)
        return gated
