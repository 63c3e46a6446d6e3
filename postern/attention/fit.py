"""Attention layers of postern in the place of those of a Transformers model, with its cache and its generation.

model = LlamaForCausalLM(LlamaConfig(...))
fit_attention(model, lambda index: LinearAttention(width, 8, is_causal=True, rotary_base=10_000))
model.generate(...)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor, nn

from postern.attention.hugging_face import padding_mask, register_attention
from postern.attention.protocol import Attention, Cache
from postern.errors import MissingExtra

FITTED = "postern/fitted"


class FittedAttention(nn.Module):
    """A layer of postern where a Transformers model expects one of its own.

    The model's rotations are not applied: the layer brings its own positions, or the model adds them to its embeddings.

    Attributes:
        attention: the layer.
        layer_idx: its place in the model, and in the model's cache.
    """

    def __init__(self, attention: nn.Module, layer_idx: int) -> None:
        super().__init__()
        self.attention: Any = attention
        self.layer_idx = layer_idx

    def forward(
        self,
        hidden_states: Float[Tensor, "batch time width"],
        *_: Any,
        attention_mask: Bool[Tensor, "batch keys"] | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        **__: Any,
    ) -> tuple[Float[Tensor, "batch time width"], None]:
        """Attend, under the conventions of Transformers."""
        cache = past_key_values if cache is None else cache
        own = None if cache is None else own_cache(cache, self.layer_idx, self.attention)
        return self.attention(hidden_states, attention_mask, own), None


def fit_attention(model: nn.Module, make: Callable[[int], nn.Module]) -> dict[str, FittedAttention]:
    """Put attention layers of postern in the place of a causal Transformers model's own, in place.

    Its layers are those called ``self_attn`` (OPT, Llama, Mistral, Qwen and others). The new ones are not trained; the
    rest of the model stays as it is. ``generate`` works, with beams too. A later ``load_state_dict`` finds the layers
    under ``self_attn.attention``; ``from_pretrained`` knows nothing of them, so fit them first and then load the state.

    Args:
        model: e.g. ``LlamaForCausalLM(config)``.
        make: makes the attention of layer 0, 1, ...: causal, of the model's width, following
            `postern.attention.Attention`. The model's own rotations are not applied to it.

    Returns:
        The fitted layers by their names in the model.

    Raises:
        ValueError: the model has no such layers, or a new one has another width or is not causal.
        MissingExtra: Transformers is not installed.
    """
    names = [name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] == "self_attn"]
    if not names:
        raise ValueError(f"{type(model).__name__} has no attention layers called self_attn to be replaced")
    width = model.config.hidden_size  # type: ignore[union-attr]
    fitted = {}
    for index, name in enumerate(names):
        layer = make(index)
        if not isinstance(layer, Attention) or layer.width != width or not layer.is_causal:
            raise ValueError(
                f"layer {index} must be causal attention of width {width}, got {type(layer).__name__} with "
                f"width={getattr(layer, 'width', None)}, is_causal={getattr(layer, 'is_causal', None)}"
            )
        old = next(model.get_submodule(name).parameters())
        fitted[name] = FittedAttention(layer.to(old), getattr(model.get_submodule(name), "layer_idx", index))
    _register()
    for name, module in fitted.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
    model.set_attn_implementation(FITTED)  # type: ignore[operator]
    return fitted


def _register() -> None:
    def refuse(module: nn.Module, *_: Any, **__: Any) -> Any:
        raise ValueError(f"{type(module).__name__} is not an attention layer of postern; fit_attention makes such")

    register_attention(FITTED, refuse, mask=padding_mask)


def own_cache(cache: Any, layer_idx: int, attention: Attention) -> Cache:
    """The layer's own cache, kept in the place of its keys and values in a cache of Transformers."""
    try:
        from transformers.cache_utils import DynamicLayer
    except ImportError:
        raise MissingExtra("transformers", "Attention in a model of Transformers") from None
    while len(cache.layers) <= layer_idx:
        cache.layers.append(DynamicLayer())
    layer = cache.layers[layer_idx]
    if not hasattr(layer, "own"):
        if layer.get_seq_length():
            raise ValueError("the cache holds keys and values that were made by another attention layer")
        layer = cache.layers[layer_idx] = _cache_layer(attention)
    own: Cache = layer.own
    return own


def _cache_layer(attention: Attention) -> Any:
    """A layer of a Transformers cache that holds the cache of an attention layer."""
    from transformers.cache_utils import CacheLayerMixin

    class OwnCacheLayer(CacheLayerMixin):  # type: ignore[misc]
        is_sliding = False

        def __init__(self) -> None:
            super().__init__()
            self.own = attention.new_cache()

        def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None: ...

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            raise ValueError("an attention layer of postern keeps its own cache, which other layers cannot add to")

        def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
            return len(self.own) + query_length, 0

        def get_seq_length(self) -> int:
            return len(self.own)

        def get_max_length(self) -> int:
            return -1

        def reset(self) -> None:
            self.own = attention.new_cache()

        def reorder_cache(self, beam_idx: Tensor) -> None:
            self.own.reorder(beam_idx)

    return OwnCacheLayer()
