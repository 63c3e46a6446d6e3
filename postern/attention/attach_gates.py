"""SeerAttention in a model of Hugging Face Transformers, fitted in one call.

Paper: "SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs", arXiv 2410.13276.

    model = LlamaForCausalLM(LlamaConfig(...))
    attach_gates(model, density=0.1)
    distil_gates(model, next_batch)
    model.generate(...)

The model's own code and weights stay as they are. Its attention goes by the name of `SEER_ATTENTION` through
Transformers' ``AttentionInterface``, and hooks keep the queries and keys from before their rotation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from postern.attention.attn_gate import AttnGate, Pooling
from postern.attention.hugging_face import padding_mask, register_attention
from postern.attention.seer_attention import BlockSparsity
from postern.attention.self_attention import attend

SEER_ATTENTION = "postern/seer_attention"


def attach_gates(
    model: nn.Module,
    *,
    block: int = 64,
    threshold: float | None = None,
    density: float | None = None,
    top_k: int | None = None,
    dense_last: int = 2,
    keeps_diagonal: bool = True,
    gate_dim: int | None = None,
    query_pooling: Sequence[Pooling] = ("avg",),
    key_pooling: Sequence[Pooling] = ("max", "min", "avg"),
) -> dict[str, BlockSparsity]:
    """Fit a gate into every attention layer of a causal Transformers model with rotations, in place.

    Layers are known by ``q_proj``, ``k_proj`` and a ``head_dim`` (Llama, Mistral, Qwen2, Qwen3 and others). Prompts
    are read with blocks left out, tokens that follow attend to everything. The gates are not trained: see
    `postern.attention.distil_gates`. A later ``load_state_dict`` finds them under ``block_sparsity``;
    ``from_pretrained`` knows nothing of them, so attach the gates first and then load the state.

    Args:
        model: e.g. ``LlamaForCausalLM(config)``.
        block: see `AttnGate`.
        threshold: see `select_blocks`.
        density: see `select_blocks`.
        top_k: see `select_blocks`. Of these three, exactly one is given.
        dense_last: see `select_blocks`.
        keeps_diagonal: see `select_blocks`.
        gate_dim: see `AttnGate`.
        query_pooling: see `AttnGate`.
        key_pooling: see `AttnGate`.

    Returns:
        What chooses the blocks, by the names of the attention layers.

    Raises:
        ValueError: the model has no such layers or no rotations, one has a gate already or a sliding window, or a
            setting is impossible.
        MissingExtra: Transformers is not installed.
    """
    layers = {name: layer for name, layer in model.named_modules() if _is_rotated_attention(layer)}
    rotations = [module for module in model.modules() if hasattr(module, "inv_freq") and hasattr(module, "config")]
    if not layers or not rotations:
        raise ValueError(f"{type(model).__name__} has no self-attention layers with q_proj and k_proj, and rotations")
    made = {}
    for name, layer in layers.items():
        if hasattr(layer, "block_sparsity"):
            raise ValueError(f"the attention layer {name!r} has a gate already")
        window = getattr(layer, "sliding_window", getattr(layer.config, "sliding_window", None))
        if window is not None:
            raise ValueError(f"the attention layer {name!r} sees a window of {window} tokens, which gates do not know")
        dim = layer.head_dim if gate_dim is None else gate_dim
        gate = AttnGate(
            layer.head_dim,
            layer.q_proj.out_features // layer.head_dim,
            layer.k_proj.out_features // layer.head_dim,
            block=block,
            gate_dim=dim,
            query_pooling=query_pooling,
            key_pooling=key_pooling,
            frequencies=_frequencies(rotations[0], dim),
        )
        sparsity = BlockSparsity(
            gate,
            threshold=threshold,
            density=density,
            top_k=top_k,
            dense_last=dense_last,
            keeps_diagonal=keeps_diagonal,
        )
        made[name] = sparsity.to(layer.q_proj.weight)
    register_attention(SEER_ATTENTION, seer_forward, mask=padding_mask)
    for name, layer in layers.items():
        layer.block_sparsity = made[name]
        layer.unrotated = _Unrotated(layer.head_dim)
        for side in ("q", "k"):
            # with a norm of queries and keys, the gate sees what comes out of that
            source = getattr(layer, f"{side}_norm", None) or getattr(layer, f"{side}_proj")
            source.register_forward_hook(getattr(layer.unrotated, f"keep_{side}"))
    model.set_attn_implementation(SEER_ATTENTION)  # type: ignore[operator]
    return made


def seer_forward(
    module: Any,
    query: Float[Tensor, "batch heads queries head_dim"],
    key: Float[Tensor, "batch kv_heads keys head_dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    attention_mask: Bool[Tensor, "batch keys"] | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "batch queries heads value_dim"], None]:
    """Attend in a Transformers model; what `attach_gates` registers.

    Args:
        module: the model's attention layer.
        query: queries.
        key: keys; several query heads in a row may share one.
        value: values.
        attention_mask: true where a token may be attended to.
        scaling: of the logits; by default ``1 / sqrt(head_dim)``.
        dropout: must be 0.
        softcap: must be None.
        s_aux: must be None.

    Raises:
        ValueError: a layer without a gate, or with dropout, capped logits or sinks of its own.
    """
    sparsity = getattr(module, "block_sparsity", None)
    if sparsity is None:
        raise ValueError(f"{type(module).__name__} has no gate; attach_gates fits one")
    if dropout or softcap is not None or s_aux is not None:
        raise ValueError(
            f"{type(module).__name__} drops or caps weights or adds sinks to its softmax, which block-sparse attention "
            f"cannot; got dropout={dropout}, softcap={softcap}, s_aux={'a tensor' if s_aux is not None else None}"
        )
    plain_query, plain_key = module.unrotated.take()
    if query.shape[2] == key.shape[2]:
        heads = sparsity(query, key, value, plain_query, plain_key, attention_mask, scaling)
    else:
        heads = attend(query, key, value, attention_mask, is_causal=True, scale=scaling)
    return heads.transpose(1, 2).contiguous(), None


class _Unrotated(nn.Module):
    """Queries and keys of a layer's current call. Its methods are the hooks, so that a model's copy has its own."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.query: Tensor | None = None
        self.key: Tensor | None = None

    def keep_q(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self.query = self._by_head(output)

    def keep_k(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        self.key = self._by_head(output)

    def take(self) -> tuple[Tensor, Tensor]:
        """Return both, and keep neither."""
        if self.query is None or self.key is None:
            raise RuntimeError("attention was called without its projections, whose outputs the gate needs")
        query, key = self.query, self.key
        self.query = self.key = None
        return query, key

    def _by_head(self, output: Tensor) -> Tensor:
        return output.reshape(*output.shape[:2], -1, self.head_dim).transpose(1, 2)


def _is_rotated_attention(layer: Any) -> bool:
    has_projections = all(isinstance(getattr(layer, name, None), nn.Linear) for name in ("q_proj", "k_proj", "v_proj"))
    return has_projections and isinstance(getattr(layer, "head_dim", None), int) and hasattr(layer, "config")


def _frequencies(rotary: Any, dim: int) -> Tensor:
    """The model's rotations, for vectors of another size."""
    found: Tensor = rotary.inv_freq
    if 2 * len(found) != dim:
        config = type(rotary.config).from_dict(rotary.config.to_dict() | {"head_dim": dim})
        found = type(rotary)(config).inv_freq
    if found.shape != (dim // 2,):
        raise ValueError(f"{type(rotary).__name__} has no rotations of {dim} features; give another gate_dim")
    return torch.clone(found.detach())
