"""Attention of postern under a name that the models of Hugging Face Transformers know.

Layers with parameters of their own are put into a model by `postern.attention.fit_attention` instead.

After `register_clipped_softmax` any model whose attention goes through Transformers' ``AttentionInterface`` (OPT, BERT,
ViT, Llama and most others) uses the clipped softmax by name:

    config = OPTConfig(attn_implementation="postern/clipped_softmax", clipped_softmax={"alpha": 2.0})
    model = OPTForCausalLM(config)

After `register_split_decoding` it decodes over split keys by name, "postern/split_decoding".
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from postern.attention.linear import FeatureMap, LinearState, elu_features, linear_attention
from postern.attention.self_attention import Normaliser, attention_logits, repeat_heads
from postern.attention.split_decoding import decode_attention
from postern.attention.unified_softmax import UnifiedMax
from postern.errors import MissingExtra
from postern.softmax.clipped import clipped_softmax, clipping_gamma

CLIPPED_SOFTMAX = "postern/clipped_softmax"
LINEAR_ATTENTION = "postern/linear_attention"
SPLIT_DECODING = "postern/split_decoding"

ModelAttention = Callable[..., tuple[Tensor, Tensor | None]]


def register_clipped_softmax(
    name: str = CLIPPED_SOFTMAX, *, alpha: float | None = None, gamma: float | None = None, zeta: float = 1.0
) -> None:
    """Register the clipped softmax with Transformers; models then use it by name.

    A model's own settings come from its configuration's ``clipped_softmax``, a mapping with ``alpha`` or ``gamma``, and
    optionally ``zeta`` and ``length``; a configuration without one uses the settings given here. ``alpha`` refers to
    ``length``, by default the configuration's ``max_position_embeddings``, else the number of keys. ``gamma=0`` with
    ``zeta=1`` is softmax. See `postern.softmax.clipped_softmax`.

    Registering a name again replaces its settings.

    Args:
        name: for ``attn_implementation``.
        alpha: for configurations that say nothing.
        gamma: for configurations that say nothing; -0.03, the paper's main setting, if neither is given.
        zeta: for configurations that say nothing.

    Raises:
        MissingExtra: Transformers is not installed.
        ValueError: impossible settings.
    """
    clipping_gamma(gamma, zeta, alpha, 1)
    defaults = {"alpha": alpha, "gamma": gamma, "zeta": zeta}
    register_attention(name, functools.partial(clipped_softmax_forward, defaults=defaults))


def register_linear_attention(
    name: str = LINEAR_ATTENTION, *, query_features: FeatureMap = elu_features, key_features: FeatureMap | None = None
) -> None:
    """Register linear attention with Transformers; models then use it by name.

    Features are taken of the queries and keys that the model gives, after its rotations. The model's scaling of the
    logits is not applied, and its cache keeps all keys, so that only the forward pass over many tokens is linear;
    `postern.attention.LinearAttention` has a cache that does not grow.

    Args:
        name: for ``attn_implementation``.
        query_features: positive features of the queries.
        key_features: of the keys; by default those of the queries.

    Raises:
        MissingExtra: Transformers is not installed.
    """
    key_features = query_features if key_features is None else key_features
    forward = functools.partial(linear_forward, query_features=query_features, key_features=key_features)
    register_attention(name, forward, mask=padding_mask)


def linear_forward(
    module: nn.Module,
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch key_heads keys head_dim"],
    value: Float[Tensor, "batch key_heads keys value_dim"],
    attention_mask: Tensor | None,
    *,
    query_features: FeatureMap,
    key_features: FeatureMap,
    is_causal: bool | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Float[Tensor, "batch queries heads value_dim"], None]:
    """Attend in a Transformers model; what `register_linear_attention` registers.

    Args:
        module: the model's attention layer.
        query: queries, the last of which stands at the last key.
        key: keys.
        value: values.
        attention_mask: from `padding_mask`.
        query_features: positive features of the queries.
        key_features: of the keys.
        is_causal: by default what the layer says.
        dropout: must be 0: there are no weights to be zeroed.

    Raises:
        ValueError: dropout of attention weights.
    """
    if dropout:
        raise ValueError(
            f"linear attention has no weights to be dropped; set the model's attention dropout to 0, not {dropout}"
        )
    query, key = query_features(query), key_features(key)
    if not (getattr(module, "is_causal", False) if is_causal is None else is_causal):
        return linear_attention(query, key, value, attention_mask).transpose(1, 2).contiguous(), None
    state, before = LinearState(), key.shape[2] - query.shape[2]
    old, new = slice(0, before), slice(before, None)
    masks = (None, None) if attention_mask is None else (attention_mask[:, old], attention_mask[:, new])
    if before:
        absent = query.new_zeros(*query.shape[:2], before, query.shape[3])
        linear_attention(absent, key[:, :, old], value[:, :, old], masks[0], is_causal=True, state=state)
    output = linear_attention(query, key[:, :, new], value[:, :, new], masks[1], is_causal=True, state=state)
    return output.transpose(1, 2).contiguous(), None


def register_split_decoding(
    name: str = SPLIT_DECODING, *, unified: UnifiedMax | None = None, num_splits: int | None = None
) -> None:
    """Register decoding over split keys with Transformers; models then use it by name.

    Steps of a single token run `postern.attention.decode_attention`, longer inputs Transformers' own "sdpa". A model's
    own constant comes from its configuration's ``split_decoding``, a mapping with ``phi`` and optionally ``a``, ``b``,
    ``enabled`` (``dataclasses.asdict`` of a `postern.attention.UnifiedMax`) and ``num_splits``; a configuration without
    one uses the settings given here.

    Registering a name again replaces its settings.

    Args:
        name: for ``attn_implementation``.
        unified: for configurations that say nothing; None for the synchronised form.
        num_splits: see `postern.attention.decode_attention`.

    Raises:
        MissingExtra: Transformers is not installed.
        ValueError: an empty name, or fewer than one chunk.
    """
    if num_splits is not None and num_splits < 1:
        raise ValueError(f"num_splits is at least 1, got {num_splits}")
    try:
        from transformers.masking_utils import sdpa_mask
    except ImportError:
        raise MissingExtra("transformers", "Registering attention with Transformers") from None
    forward = functools.partial(split_decoding_forward, unified=unified, num_splits=num_splits)
    register_attention(name, forward, mask=sdpa_mask)


def register_attention(name: str, forward: ModelAttention, mask: Callable[..., Tensor | None] | None = None) -> None:
    """Register an attention function with Transformers, together with the masks that it gets.

    Args:
        name: for ``attn_implementation``. Transformers takes names such as "owner/name" for kernels to be downloaded,
            even where they are registered; names registered here are exempt from that.
        forward: ``forward(module, query, key, value, attention_mask, scaling=..., dropout=..., **options)``, giving
            the output ``[batch, queries, heads, value_dim]`` and the weights or None.
        mask: makes its mask, as registered with Transformers' ``AttentionMaskInterface``. By default the mask is None,
            or additive ``[batch, 1, queries, keys]``, as for Transformers' own "eager" attention.

    Raises:
        MissingExtra: Transformers is not installed.
        ValueError: an empty name.
    """
    if not name:
        raise ValueError("an attention function is registered under a name, got an empty one")
    try:
        from transformers import AttentionInterface, AttentionMaskInterface, modeling_utils
        from transformers.masking_utils import eager_mask
    except ImportError:
        raise MissingExtra("transformers", "Registering attention with Transformers") from None
    is_kernel = getattr(modeling_utils, "is_kernel", None)
    if is_kernel is not None and is_kernel(name):
        # the one place where Transformers asks, before it looks among the registered functions
        modeling_utils.is_kernel = functools.wraps(is_kernel)(
            lambda candidate: candidate != name and is_kernel(candidate)
        )
    AttentionInterface.register(name, forward)
    AttentionMaskInterface.register(name, eager_mask if mask is None else mask)


def padding_mask(
    attention_mask: Tensor | None = None, q_length: int = 0, kv_length: int = 0, q_offset: int = 0, **_: Any
) -> Bool[Tensor, "batch keys"] | None:
    """Make the mask of attention that knows the causal order itself; for `register_attention`.

    Returns:
        True where a token may be attended to, or None where nothing is padded.

    Raises:
        ValueError: a cache that is longer than the tokens in it.
    """
    if int(q_offset) + q_length != kv_length:
        raise ValueError(
            f"this attention needs a cache that grows with its tokens, such as DynamicCache; got one of {kv_length} "
            f"for {int(q_offset) + q_length} tokens"
        )
    if attention_mask is None or bool(attention_mask.all()):
        return None
    return attention_mask[:, -kv_length:].bool()


def clipped_softmax_forward(
    module: nn.Module,
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch key_heads keys head_dim"],
    value: Float[Tensor, "batch key_heads keys value_dim"],
    attention_mask: Tensor | None,
    *,
    defaults: Mapping[str, Any],
    **options: Any,
) -> tuple[Float[Tensor, "batch queries heads value_dim"], Float[Tensor, "batch heads queries keys"]]:
    """Attend in a Transformers model; what `register_clipped_softmax` registers.

    Args:
        module: the model's attention layer; its ``config`` may have ``clipped_softmax``.
        query: queries.
        key: keys.
        value: values.
        attention_mask: see `normalised_forward`.
        defaults: settings for configurations that have none.
        options: see `normalised_forward`.

    Raises:
        ValueError: impossible settings, or an option that `normalised_forward` does not know.
    """
    config = getattr(module, "config", None)
    settings = getattr(config, "clipped_softmax", None)
    if settings is None:
        settings = defaults
    elif not isinstance(settings, Mapping) or not settings.keys() <= {"alpha", "gamma", "zeta", "length"}:
        raise ValueError(
            "a configuration's clipped_softmax is a mapping with alpha or gamma, and optionally zeta and length; "
            f"got {settings!r}"
        )
    zeta = settings.get("zeta", 1.0)
    length = settings.get("length") or getattr(config, "max_position_embeddings", None) or key.shape[-2]
    gamma = clipping_gamma(settings.get("gamma"), zeta, settings.get("alpha"), length)
    normalise = functools.partial(clipped_softmax, gamma=gamma, zeta=zeta)
    return normalised_forward(module, query, key, value, attention_mask, normalise=normalise, **options)


def split_decoding_forward(
    module: nn.Module,
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch key_heads keys head_dim"],
    value: Float[Tensor, "batch key_heads keys value_dim"],
    attention_mask: Tensor | None,
    *,
    unified: UnifiedMax | None,
    num_splits: int | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **options: Any,
) -> tuple[Float[Tensor, "batch queries heads value_dim"], None]:
    """Attend in a Transformers model; what `register_split_decoding` registers.

    Args:
        module: the model's attention layer; its ``config`` may have ``split_decoding``.
        query: queries.
        key: keys.
        value: values.
        attention_mask: true where a key may be attended to, or None.
        unified: for configurations that have none.
        num_splits: likewise.
        scaling: of the logits; by default ``1 / sqrt(head_dim)``.
        dropout: share of the weights that are zeroed in training; where there is any, "sdpa" runs.
        softcap: must be None.
        s_aux: must be None.
        position_bias: must be None.
        options: of Transformers' "sdpa".

    Raises:
        ValueError: impossible settings, or a model that caps its logits, adds to them, or has attention sinks.
    """
    _refuse_changed_softmax(module, softcap, s_aux)
    if position_bias is not None:
        raise ValueError(f"{type(module).__name__} adds a bias to its logits, which split decoding does not")
    if query.shape[2] != 1 or dropout:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        output: Tensor = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )[0]
        return output, None
    settings = getattr(getattr(module, "config", None), "split_decoding", None)
    if settings is not None:
        if not isinstance(settings, Mapping) or not settings.keys() <= {"phi", "a", "b", "enabled", "num_splits"}:
            raise ValueError(
                "a configuration's split_decoding is a mapping with phi, and optionally a, b, enabled and num_splits; "
                f"got {settings!r}"
            )
        given = {name: settings[name] for name in ("phi", "a", "b", "enabled") if name in settings}
        unified = UnifiedMax(**given) if "phi" in given else unified
        num_splits = settings.get("num_splits", num_splits)
    heads = decode_attention(query, key, value, attention_mask, scale=scaling, unified=unified, num_splits=num_splits)
    return heads.transpose(1, 2).contiguous(), None


def normalised_forward(
    module: nn.Module,
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch key_heads keys head_dim"],
    value: Float[Tensor, "batch key_heads keys value_dim"],
    attention_mask: Tensor | None,
    *,
    normalise: Normaliser,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "batch queries heads value_dim"], Float[Tensor, "batch heads queries keys"]]:
    """Attend with a function of the softmax family, under the conventions of Transformers.

    Args:
        module: the model's attention layer.
        query: queries.
        key: keys; several query heads in a row may share one.
        value: values.
        attention_mask: added to the logits; or boolean, true where a key may be attended to.
        normalise: a function of the softmax family.
        scaling: of the logits; by default ``1 / sqrt(head_dim)``.
        dropout: share of the weights that are zeroed in training.
        position_bias: added to the logits.
        softcap: must be None.
        s_aux: must be None.

    Raises:
        ValueError: a model that caps its logits or has attention sinks of its own.
    """
    _refuse_changed_softmax(module, softcap, s_aux)
    key, value = repeat_heads(key, query.shape[1]), repeat_heads(value, query.shape[1])
    logits = attention_logits(query, key, scaling)
    if position_bias is not None:
        logits = logits + position_bias
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            logits = logits.masked_fill(~attention_mask, torch.finfo(logits.dtype).min)
        else:
            logits = logits + attention_mask
    weights = F.dropout(normalise(logits, -1), dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


def _refuse_changed_softmax(module: nn.Module, softcap: float | None, s_aux: Tensor | None) -> None:
    if softcap is not None or s_aux is not None:
        raise ValueError(
            f"{type(module).__name__} caps its logits or adds sinks to its softmax, which other attention cannot; "
            f"got softcap={softcap}, s_aux={'a tensor' if s_aux is not None else None}"
        )
