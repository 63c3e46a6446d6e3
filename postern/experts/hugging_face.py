"""Related tokens agree on their experts in Mixtral and Switch Transformers of Hugging Face Transformers.

Paper: "Improving Routing in Sparse Mixture of Experts with Graph of Tokens", arXiv 2505.00792.

    model = MixtralForCausalLM(config)
    patch_router(model, "similarity")

The routers keep their weights and names; what a graph learns becomes a submodule of each router, ``token_graph``, and
acts through hooks. A later ``load_state_dict`` finds it; ``from_pretrained`` knows nothing of it, so patch the model
first and then load the state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Unpack

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from postern.attention.hugging_face import normalised_forward, register_attention
from postern.errors import MissingExtra
from postern.experts.graph_router import Graph, GraphOptions, TokenGraph
from postern.experts.routing import RoutingContext
from postern.experts.softmax_router import choose

RECORDED_ATTENTION = "postern/recorded_attention"


def patch_router(
    model: nn.Module, graph: Graph = "similarity", **options: Unpack[GraphOptions]
) -> dict[str, TokenGraph]:
    """Let related tokens agree on their experts in every router of a Mixtral or Switch Transformers model, in place.

    The logits that the model's own balance loss is of become those of the averaged probabilities; their ``logsumexp``,
    of which the z-loss is, stays as it was. Padded tokens are never averaged over.

    With "attention" the model is switched to an attention that keeps its weights in memory until the router has used
    them, before dropout and with the model's own masks and position biases.

    A router sees the tokens of one call only: the model generates with ``use_cache=False``.

    Args:
        model: e.g. ``MixtralForCausalLM(config)``; meant to be trained afterwards.
        graph: see `TokenGraph`.
        options: of `TokenGraph`; ``num_heads`` is the model's own.

    Returns:
        What was fitted, by the names of the routers.

    Raises:
        MissingExtra: Transformers is not installed.
        ValueError: a model without such routers, or one that was patched already; or an impossible option.
    """
    found = list(_routed_layers(model))
    if not found:
        raise ValueError(f"{type(model).__name__} has no router of Mixtral or Switch Transformers")
    names = {id(module): name for name, module in model.named_modules()}
    graphs = {}
    for stack, _, block in found:
        gate: Any = _gate(block)
        name = names[id(gate)]
        if hasattr(gate, "token_graph"):
            raise ValueError(f"the router {name!r} was patched already")
        weight: Tensor = gate.weight if hasattr(gate, "weight") else gate.classifier.weight
        given: GraphOptions = {"num_heads": stack.config.num_attention_heads, **options}
        graphs[name] = TokenGraph(weight.shape[1], graph, top_k=getattr(gate, "top_k", 1), **given).to(weight.device)
    if graph == "attention":
        register_attention(RECORDED_ATTENTION, recorded_forward)
        model.set_attn_implementation(RECORDED_ATTENTION)  # type: ignore[operator]
    for (stack, attention, block), token_graph in zip(found, graphs.values(), strict=True):
        _gate(block).token_graph = token_graph
        _RouterHooks(token_graph, attention).register(stack, block)
    return graphs


def recorded_forward(
    module: nn.Module,
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch key_heads keys head_dim"],
    value: Float[Tensor, "batch key_heads keys value_dim"],
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Float[Tensor, "batch queries heads value_dim"], Float[Tensor, "batch heads queries keys"]]:
    """Attend in a Transformers model, and leave the weights before dropout with the attention layer.

    Args:
        module: the model's attention layer; gets ``recorded_weights``.
        query: queries.
        key: keys.
        value: values.
        attention_mask: as in `postern.attention.hugging_face.normalised_forward`.
        options: likewise.

    Raises:
        ValueError: a model that caps its logits or has attention sinks of its own.
    """

    def normalise(logits: Tensor, dim: int) -> Tensor:
        weights = logits.softmax(dim)
        module.__dict__["recorded_weights"] = weights
        return weights

    return normalised_forward(module, query, key, value, attention_mask, normalise=normalise, **options)


def _routed_layers(model: nn.Module) -> Iterator[tuple[Any, Any, Any]]:
    """Each stack of layers, self-attention, and the block of experts that follows it."""
    try:
        from transformers.models.mixtral.modeling_mixtral import MixtralModel, MixtralSparseMoeBlock
        from transformers.models.switch_transformers.modeling_switch_transformers import (
            SwitchTransformersSparseMLP,
            SwitchTransformersStack,
        )
    except ImportError:
        raise MissingExtra("transformers", "Patching the routers of Transformers' models") from None
    for module in model.modules():
        stack: Any = module
        if isinstance(module, MixtralModel):
            parts = [(layer.self_attn, layer.mlp) for layer in stack.layers]
        elif isinstance(module, SwitchTransformersStack):
            parts = [(block.layer[0].SelfAttention, block.layer[-1].mlp) for block in stack.block]
        else:
            continue
        for attention, block in parts:
            if isinstance(block, MixtralSparseMoeBlock | SwitchTransformersSparseMLP):
                yield stack, attention, block


def _gate(block: Any) -> Any:
    return block.gate if hasattr(block, "gate") else block.router


class _RouterHooks:
    """One router's hooks. They are methods, so that a deep copy of the model gets hooks of its own."""

    def __init__(self, graph: TokenGraph, attention: Any) -> None:
        self.graph = graph
        self.attention = attention
        self.mask: Tensor | None = None
        self.shape = (0, 0)

    def register(self, stack: Any, block: Any) -> None:
        stack.register_forward_pre_hook(self.before_stack, with_kwargs=True)
        block.register_forward_pre_hook(self.before_block)
        gate = _gate(block)
        # before the hook by which Transformers collects the logits of routers
        gate.register_forward_hook(
            self.after_switch if hasattr(gate, "classifier") else self.after_mixtral, prepend=True
        )

    def before_stack(self, stack: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Keep the mask of padding."""
        cache = kwargs.get("cache", kwargs.get("past_key_values"))
        if cache is not None and int(cache.get_seq_length()) > 0:
            raise ValueError(
                f"related tokens must be in one call, but {int(cache.get_seq_length())} are in a cache; call the model "
                "with use_cache=False"
            )
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        if mask is not None and mask.dim() != 2:
            raise ValueError(f"a patched model takes masks of padding, [batch, time]; got {list(mask.shape)}")
        self.mask = None if mask is None else mask.bool()

    def before_block(self, block: nn.Module, args: tuple[Tensor, ...]) -> None:
        """Keep the shape, which Mixtral's router does not see."""
        self.shape = (args[0].shape[0], args[0].shape[1])

    def agreed(self, tokens: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The averaged probabilities, and logits of them; ``[batch, time, num_experts]``."""
        tokens, logits = (x.view(*self.shape, -1) for x in (tokens, logits))
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        context = RoutingContext(self.mask, is_causal=bool(getattr(self.attention, "is_causal", False)))
        weights = self.attention.__dict__.pop("recorded_weights", None)
        probabilities = self.graph(logits, tokens, context, weights)
        tiny = torch.finfo(probabilities.dtype).tiny
        return probabilities, probabilities.clamp_min(tiny).log() + logits.logsumexp(-1, keepdim=True)

    def after_mixtral(self, gate: Any, args: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """After a router of ``(logits, weights, indices)``, of tokens in one row."""
        probabilities, logits = self.agreed(args[0], output[0])
        weights, indices = choose(probabilities.flatten(0, 1), gate.top_k, renormalises=True)
        return logits.flatten(0, 1).to(output[0].dtype), weights.to(output[1].dtype), indices

    def after_switch(self, gate: Any, args: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """After a router of ``(one expert in each row, its weight, logits)``, with a capacity for each sequence."""
        probabilities, logits = self.agreed(args[0], output[2])
        weights, indices = choose(probabilities, 1, renormalises=False)
        chosen = F.one_hot(indices.squeeze(-1), gate.num_experts)
        chosen = chosen * (chosen.cumsum(-2) <= gate.expert_capacity)
        return chosen, weights.to(output[1].dtype), logits.to(output[2].dtype)
