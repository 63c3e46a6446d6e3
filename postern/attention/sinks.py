"""How much of a model's attention sinks into the first token, and what comes with that.

Paper: "Gated Attention for Large Language Models: Non-linearity, Sparsity, and Attention-Sink-Free", arXiv 2505.06708.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from postern.attention._model_layers import ModelAttention, hidden_states, model_attention_layers, split_heads
from postern.attention.self_attention import GatePosition, SelfAttention
from postern.quantize import OutlierStatistics


def first_token_share(
    weights: Float[Tensor, "batch heads queries keys"], first_query: int = 8
) -> Float[Tensor, " batch"]:
    """Mean weight of the first key, over the heads and the queries from ``first_query`` on.

    The first query of a causal layer gives the first key everything, and the next ones much; so they are left out.

    Raises:
        ValueError: no queries are left.
    """
    if not 0 <= first_query < weights.shape[-2]:
        raise ValueError(f"queries from number {first_query} on are none of {weights.shape[-2]}")
    return weights[..., first_query:, 0].float().mean((1, 2))


def first_value_ratio(value: Float[Tensor, "batch heads time head_dim"]) -> Float[Tensor, " batch"]:
    """``|v_0| / mean_{t > 0} |v_t|``, averaged over the heads: near 0 where the first token's values are drained.

    Raises:
        ValueError: no other tokens.
    """
    if value.shape[2] < 2:
        raise ValueError(f"the first token's values are compared with those of others, got {value.shape[2]} token")
    norms = torch.linalg.vector_norm(value.float(), dim=-1)
    others = norms[..., 1:].mean(-1).clamp_min(torch.finfo(torch.float32).tiny)
    ratio: Tensor = norms[..., 0] / others
    return ratio.mean(1)


@dataclass
class _Mean:
    """A running mean."""

    total: float = 0.0
    count: int = 0

    def add(self, values: Tensor) -> None:
        self.total += values.double().sum().item()
        self.count += values.numel()

    def value(self) -> float | None:
        return self.total / self.count if self.count else None


@dataclass
class _Watched:
    """What is summed up of one attention layer."""

    first_token_attention: _Mean = field(default_factory=_Mean)
    value_norm_ratio: _Mean = field(default_factory=_Mean)
    gate_mean: _Mean = field(default_factory=_Mean)
    gated_heads: bool = False
    small_before: dict[float, _Mean] = field(default_factory=dict)
    small_after: dict[float, _Mean] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerSinks:
    """What `SinkProbe` saw of one attention layer.

    Attributes:
        first_token_attention: mean weight of the first token.
        value_norm_ratio: size of the first token's values by that of the others'.
        gate_mean: mean of the gating scores, None without a gate that has some.
        small_before_gate: share of the heads' outputs that are smaller than each bound, before the gate on them.
        small_after_gate: the same as the output projection sees them.
    """

    first_token_attention: float
    value_norm_ratio: float
    gate_mean: float | None
    small_before_gate: Mapping[float, float]
    small_after_gate: Mapping[float, float]


class SinkProbe:
    """Watches a language model's attention, its gates and its hidden states.

        with SinkProbe(model) as probe:
            model(tokens)
        probe.first_token_attention, probe.max_activation, probe.gate_mean

    It sees the attention of postern's `SelfAttention` and its variants, and that of Transformers models, with gates
    that were fitted by `postern.attention.add_gates`. Sequences start at their first token: without padding on the
    left, and without a cache that holds any. The weights, ``[batch, heads, time, time]``, are made for it a second time
    in postern's layers; Transformers models compute them explicitly while they are watched.

    Args:
        model: e.g. a `postern.nets.LanguageModel` or ``LlamaForCausalLM(config)``.
        first_query: queries before this one do not count for `first_token_attention`.
        bounds: below which an output of a head is small.

    Raises:
        ValueError: no attention that can be watched, or no `torch.nn.ModuleList` of layers.
    """

    def __init__(self, model: nn.Module, *, first_query: int = 8, bounds: tuple[float, ...] = (1e-2, 1e-3)) -> None:
        own = {name: module for name, module in model.named_modules() if isinstance(module, SelfAttention)}
        foreign = model_attention_layers(model)
        if not own and not foreign:
            raise ValueError(f"{type(model).__name__} has no attention layers that can be watched")
        for name, layer in foreign.items():
            if layer.value is None:
                raise ValueError(f"the attention layer {name!r} has no projection to its values that could be watched")
        self.first_query = first_query
        self.bounds = bounds
        self._model = model
        self._own = own
        self._foreign = foreign
        self._outliers = OutlierStatistics(model)
        self._watched = {
            name: _Watched(
                small_before={bound: _Mean() for bound in bounds}, small_after={bound: _Mean() for bound in bounds}
            )
            for name in [*own, *foreign]
        }
        self._handles: list[RemovableHandle] = []
        self._implementation: str | None = None

    def __enter__(self) -> SinkProbe:
        implementation = getattr(getattr(self._model, "config", None), "_attn_implementation", None)
        if self._foreign and str(implementation).startswith(("sdpa", "flash", "flex")):  # those return no weights
            self._implementation = implementation
            self._model.set_attn_implementation("eager")  # type: ignore[operator]
        for name, layer in self._own.items():
            self._watch_own(layer, self._watched[name])
        for name, attention in self._foreign.items():
            self._watch_foreign(name, attention, self._watched[name])
        self._outliers.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._outliers.__exit__()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._implementation is not None:
            self._model.set_attn_implementation(self._implementation)  # type: ignore[operator]
            self._implementation = None

    @property
    def per_layer(self) -> dict[str, LayerSinks]:
        """What was seen of each attention layer, by name.

        Raises:
            ValueError: a layer has seen no tokens.
        """
        return {name: _conclude(name, watched) for name, watched in self._watched.items()}

    @property
    def first_token_attention(self) -> float:
        """Mean weight of the first token over heads, queries and layers (the paper's F-Attn).

        Raises:
            ValueError: a layer has seen no tokens.
        """
        return _mean([layer.first_token_attention for layer in self.per_layer.values()])

    @property
    def value_norm_ratio(self) -> float:
        """Size of the first token's values by that of the others', averaged over heads and layers.

        Raises:
            ValueError: a layer has seen no tokens.
        """
        return _mean([layer.value_norm_ratio for layer in self.per_layer.values()])

    @property
    def gate_mean(self) -> float | None:
        """Mean gating score over all gates that have scores; None without any.

        Raises:
            ValueError: a layer has seen no tokens.
        """
        means = [layer.gate_mean for layer in self.per_layer.values() if layer.gate_mean is not None]
        return _mean(means) if means else None

    @property
    def small_before_gate(self) -> dict[float, float]:
        """Share of the heads' outputs below each bound before their gate, averaged over layers.

        Raises:
            ValueError: a layer has seen no tokens.
        """
        layers = self.per_layer.values()
        return {bound: _mean([layer.small_before_gate[bound] for layer in layers]) for bound in self.bounds}

    @property
    def small_after_gate(self) -> dict[float, float]:
        """Share of the heads' outputs below each bound as the output projection sees them, averaged over layers.

        Raises:
            ValueError: a layer has seen no tokens.
        """
        layers = self.per_layer.values()
        return {bound: _mean([layer.small_after_gate[bound] for layer in layers]) for bound in self.bounds}

    @property
    def max_activation(self) -> float:
        """Largest absolute hidden state of a sequence, averaged over sequences and layers (the paper's M-Act).

        Hidden states are the outputs of the members of the longest `torch.nn.ModuleList`.

        Raises:
            ValueError: a layer has seen no tokens.
        """
        return _mean([layer["infinity_norm"] for layer in self._outliers.per_layer.values()])

    @property
    def kurtosis(self) -> float:
        """Kurtosis of a sequence's hidden states, averaged over sequences and layers.

        Raises:
            ValueError: a layer has seen no tokens.
        """
        return self._outliers.mean_kurtosis

    def _watch_own(self, layer: SelfAttention, watched: _Watched) -> None:
        def before(module: SelfAttention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = dict(zip(("x", "mask", "cache"), args, strict=False)) | kwargs
            if len(given.get("cache") or ()):
                raise ValueError("attention is watched over whole sequences, without a cache")
            x, mask = given["x"], given.get("mask")
            with torch.no_grad():
                watched.first_token_attention.add(first_token_share(module.weights(x, mask), self.first_query))
                watched.value_norm_ratio.add(first_value_ratio(module.project(x)[2]))

        # weights and values first: they pass through gates on queries, keys and values, which are watched afterwards
        self._handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
        self._handles.append(layer.output.register_forward_pre_hook(partial(_see_input, self._see_heads(watched))))
        if layer.gate is not None:
            self._watch_gate(layer.gate, layer.gate_position, watched)

    def _watch_foreign(self, name: str, layer: ModelAttention, watched: _Watched) -> None:
        assert layer.value is not None
        see_heads = self._see_heads(watched)

        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            weights = output[1] if isinstance(output, tuple) and len(output) > 1 else None
            keys = hidden_states(args, kwargs).shape[1]
            if weights is None or weights.shape[-1] != keys:
                raise ValueError(
                    f"the attention layer {name!r} gives no weights over the {keys} tokens that it is called with; "
                    "watch a model without a cache, with attn_implementation='eager'"
                )
            watched.first_token_attention.add(first_token_share(weights.detach(), self.first_query))
            if layer.output is None:
                see_heads(output[0])

        def see_value(module: nn.Module, args: Any, output: Tensor) -> None:
            heads = split_heads(output.detach(), output.shape[-1] // layer.head_dim)
            watched.value_norm_ratio.add(first_value_ratio(heads))

        self._handles.append(layer.module.register_forward_hook(after, with_kwargs=True))
        self._handles.append(layer.value.register_forward_hook(see_value))
        if layer.output is not None:
            self._handles.append(layer.output.register_forward_pre_hook(partial(_see_input, see_heads)))
        for position in get_args(GatePosition):
            gate = getattr(layer.module, f"{position}_gate", None)
            if gate is not None:
                self._watch_gate(gate, position, watched)

    def _watch_gate(self, gate: nn.Module, position: GatePosition, watched: _Watched) -> None:
        def see(module: Any, args: tuple[Tensor, Tensor]) -> None:
            if hasattr(module, "scores"):
                with torch.no_grad():
                    watched.gate_mean.add(module.scores(args[1]))
            if position == "heads":
                watched.gated_heads = True
                _count_small(watched.small_before, args[0])

        self._handles.append(gate.register_forward_pre_hook(see))

    def _see_heads(self, watched: _Watched) -> Callable[[Tensor], None]:
        def see(heads: Tensor) -> None:
            _count_small(watched.small_after, heads)
            if not watched.gated_heads:
                _count_small(watched.small_before, heads)

        return see


def _see_input(see: Callable[[Tensor], None], module: nn.Module, args: tuple[Tensor, ...]) -> None:
    see(args[0])


def _count_small(means: Mapping[float, _Mean], heads: Tensor) -> None:
    for bound, mean in means.items():
        mean.add(heads.detach().abs() < bound)


def _conclude(name: str, watched: _Watched) -> LayerSinks:
    share, ratio = watched.first_token_attention.value(), watched.value_norm_ratio.value()
    if share is None or ratio is None:
        raise ValueError(f"the attention layer {name!r} has seen no tokens; run the model inside the with statement")
    return LayerSinks(
        share,
        ratio,
        watched.gate_mean.value(),
        {bound: mean.value() or 0.0 for bound, mean in watched.small_before.items()},
        {bound: mean.value() or 0.0 for bound, mean in watched.small_after.items()},
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
