"""TransNormerLLM as a model of Hugging Face Transformers: linear time to train, a state of constant size to generate.

Paper: "Scaling TransNormer to 175 Billion Parameters", arXiv 2307.14995. Each layer is

    X <- X + GLA(SimpleRMSNorm(X))
    X <- X + SGLU(SimpleRMSNorm(X))

with gated linear attention (`postern.attention.GatedLinearAttention`) and a gated unit without activation
(`postern.attention.SGLU`); a last norm precedes the output layer.

    config = TransNormerConfig(vocab_size=256, hidden_size=128, num_hidden_layers=4, num_attention_heads=4)
    model = TransNormerForCausalLM(config)
    model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=20)

Importing this module needs Transformers and registers the model with its Auto classes.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from postern.attention.fit import own_cache
from postern.attention.gated_linear import GatedLinearAttention
from postern.attention.lrpe import LRPE
from postern.attention.self_attention import check_heads
from postern.attention.sglu import SGLU
from postern.attention.simple_rms_norm import SimpleRMSNorm
from postern.errors import MissingExtra

try:
    from huggingface_hub.dataclasses import strict
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
    from transformers import initialization as init
    from transformers.cache_utils import Cache, DynamicCache
    from transformers.generation import GenerationMixin
    from transformers.modeling_layers import GradientCheckpointingLayer
    from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
    from transformers.utils import can_return_tuple
except ImportError as error:
    raise MissingExtra("transformers", "TransNormer as a model of Transformers") from error

# what outputs call it: Transformers has renamed it
_CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


@strict
class TransNormerConfig(PreTrainedConfig):  # type: ignore[misc]
    """Sizes and choices of a TransNormer.

    Attributes:
        vocab_size: number of tokens.
        hidden_size: features of a token; a multiple of ``num_attention_heads``.
        num_hidden_layers: number of layers.
        num_attention_heads: heads a layer.
        intermediate_size: hidden features of the gated units; by default twice ``hidden_size``.
        decay: slopes of the decay, see `postern.attention.decay_slopes`; None for none.
        lrpe: the layers whose queries and keys are turned by their positions: the "first", as the paper recommends,
            "all", which is slower and a little better, or "none".
        norm_eps: of the norms.
        initializer_range: standard deviation of the initial weights.
        tie_word_embeddings: whether the output layer shares the weights of the embedding.
        use_cache: whether the model returns its states.

    Raises:
        ValueError: a size below 1, a width that is no multiple of the heads, or an unknown choice.
    """

    model_type = "postern_transnormer"
    keys_to_ignore_at_inference = ("cache", "past_key_values")

    vocab_size: int = 64_000
    hidden_size: int = 1024
    num_hidden_layers: int = 24
    num_attention_heads: int = 8
    intermediate_size: int | None = None
    decay: Literal["alibi", "paper"] | None = "alibi"
    lrpe: Literal["first", "all", "none"] = "first"
    norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2

    def __post_init__(self, **kwargs: Any) -> None:
        if self.intermediate_size is None:
            self.intermediate_size = 2 * self.hidden_size
        super().__post_init__(**kwargs)
        sizes = (self.vocab_size, self.hidden_size, self.num_hidden_layers, self.intermediate_size)
        if min(size or 0 for size in sizes) < 1:
            raise ValueError(
                "vocab_size, hidden_size, num_hidden_layers and intermediate_size are positive, got "
                + ", ".join(map(str, sizes))
            )
        check_heads(self.hidden_size, self.num_attention_heads)
        if self.lrpe not in ("first", "all", "none") or self.decay not in ("alibi", "paper", None):
            raise ValueError(
                "lrpe is 'first', 'all' or 'none', decay is 'alibi', 'paper' or None, got "
                f"{self.lrpe!r} and {self.decay!r}"
            )


class TransNormerLayer(GradientCheckpointingLayer):  # type: ignore[misc]
    """One layer: gated linear attention and a gated unit, each after a norm and added to its input."""

    def __init__(self, config: TransNormerConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.norm = SimpleRMSNorm(config.norm_eps)
        self.attention = GatedLinearAttention(
            config.hidden_size,
            config.num_attention_heads,
            layer=layer,
            num_layers=config.num_hidden_layers,
            decay=config.decay,
            has_lrpe=config.lrpe == "all" or (config.lrpe == "first" and layer == 0),
            norm=SimpleRMSNorm(config.norm_eps),
        )
        self.feedforward = SGLU(config.hidden_size, config.intermediate_size)

    def forward(
        self,
        hidden_states: Float[Tensor, "batch time width"],
        attention_mask: Bool[Tensor, "batch keys"] | None = None,
        cache: Any = None,
    ) -> Float[Tensor, "batch time width"]:
        """Return the tokens after both blocks; the cache is one of Transformers, changed in place."""
        own = None if cache is None else own_cache(cache, self.layer, self.attention)
        hidden_states = hidden_states + self.attention(self.norm(hidden_states), attention_mask, own)
        output: Tensor = hidden_states + self.feedforward(self.norm(hidden_states))
        return output


class TransNormerPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    """What the models below share."""

    config: TransNormerConfig
    config_class = TransNormerConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("TransNormerLayer",)
    _is_stateful = True  # the state cannot go back to an earlier token
    _can_record_outputs: dict[str, Any] = {"hidden_states": TransNormerLayer}  # noqa: RUF012 - as Transformers has it

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # Transformers' init leaves alone what was loaded
        if isinstance(module, nn.Linear | nn.Embedding):
            init.normal_(module.weight, std=self.config.initializer_range)
        elif isinstance(module, LRPE):
            fresh = LRPE(*module.angle.shape, base=module.base)
            init.copy_(module.angle, fresh.angle)
        elif isinstance(module, GatedLinearAttention):
            module.reset_slopes()


class TransNormerModel(TransNormerPreTrainedModel):
    """The model without its output layer."""

    def __init__(self, config: TransNormerConfig) -> None:
        super().__init__(config)
        self.embedding: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(TransNormerLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = SimpleRMSNorm(config.norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding."""
        return self.embedding

    def set_input_embeddings(self, embedding: nn.Module) -> None:
        """Put another embedding in its place."""
        self.embedding = embedding

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Int[Tensor, "batch time"] | None = None,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Float[Tensor, "batch time width"] | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        past_key_values: Cache | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        """Return the last hidden states, under the conventions of Transformers.

        Args:
            input_ids: tokens.
            attention_mask: true or 1 where a token is no padding, ``[batch, tokens so far]``.
            cache: of the tokens before, changed in place; ``past_key_values`` is its older name.
            inputs_embeds: embedded tokens, in the place of ``input_ids``.
            use_cache: whether to make a cache where none is given; by default as the configuration says.
            output_hidden_states: whether to return those of all layers.
            past_key_values: see ``cache``.

        Raises:
            ValueError: both or neither of tokens and embedded tokens, or a mask of another shape.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("needs either input_ids or inputs_embeds, got both or neither")
        cache = past_key_values if cache is None else cache
        use_cache = self.config.use_cache and not self.training if use_cache is None else use_cache
        if use_cache and cache is None:
            cache = DynamicCache()
        mask = None if attention_mask is None else attention_mask.bool()
        hidden = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        output_hidden_states = (
            self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        )
        every = [hidden]
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=mask, cache=cache)
            every.append(hidden)
        every[-1] = hidden = self.norm(hidden)
        hidden_states = tuple(every) if output_hidden_states else None
        return BaseModelOutputWithPast(
            last_hidden_state=hidden, hidden_states=hidden_states, **{_CACHE: cache if use_cache else None}
        )


class TransNormerForCausalLM(TransNormerPreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A language model; ``generate`` keeps one matrix a head and layer, whatever the number of tokens."""

    _tied_weights_keys: dict[str, str] = {"lm_head.weight": "model.embedding.weight"}  # noqa: RUF012

    def __init__(self, config: TransNormerConfig) -> None:
        super().__init__(config)
        self.model = TransNormerModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Int[Tensor, "batch time"] | None = None,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Float[Tensor, "batch time width"] | None = None,
        labels: Int[Tensor, "batch time"] | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        past_key_values: Cache | None = None,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """Return the logits, and with labels the mean cross-entropy of each token given those before it.

        Args:
            input_ids: see `TransNormerModel.forward`.
            attention_mask: see `TransNormerModel.forward`.
            cache: see `TransNormerModel.forward`.
            inputs_embeds: see `TransNormerModel.forward`.
            labels: the tokens themselves, -100 where one does not count.
            use_cache: see `TransNormerModel.forward`.
            output_hidden_states: see `TransNormerModel.forward`.
            logits_to_keep: of how many of the last tokens, or of which ones, to compute logits; 0 for all.
            past_key_values: see `TransNormerModel.forward`.
            options: of the loss.

        Raises:
            ValueError: see `TransNormerModel.forward`.
        """
        outputs = self.model(
            input_ids, attention_mask, cache, inputs_embeds, use_cache, output_hidden_states, past_key_values
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **options)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, **{_CACHE: getattr(outputs, _CACHE)}
        )


AutoConfig.register(TransNormerConfig.model_type, TransNormerConfig)
AutoModel.register(TransNormerConfig, TransNormerModel)
AutoModelForCausalLM.register(TransNormerConfig, TransNormerForCausalLM)
