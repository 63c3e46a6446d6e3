"""Layers as linear recurrences: for given tokens, the coefficients with which the common form computes what they do.

Paper: "Understanding the differences in Foundation Models: Attention, State Space Models, and Recurrent Neural
Networks", arXiv 2405.15731.
"""

from __future__ import annotations

from dataclasses import replace
from functools import singledispatch
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from postern.attention.linear import LinearAttention
from postern.attention.normalized import NormalizedAttention
from postern.attention.protocol import check_input
from postern.attention.rotary import rotary_angles, rotate
from postern.attention.self_attention import SelfAttention, repeat_heads
from postern.dynamics.coupling import CouplingResiduals, coupling_residuals
from postern.dynamics.qlstm import QLSTM
from postern.dynamics.s6 import S6Mixer
from postern.dynamics.ssd import SSDMixer
from postern.dynamics.state_space import LinearTimeVarying
from postern.dynamics.taylor_softmax import taylor_softmax_features
from postern.dynamics.tied_recurrence import AttentionForm, Realisation, SSDForm, linear_attention_form


def to_state_space(
    layer: nn.Module,
    x: Float[Tensor, "batch time width"],
    *,
    order: int | None = None,
    realisation: Realisation = "output",
) -> LinearTimeVarying:
    """Return the common form of a causal layer for tokens: ``to_state_space(layer, x).run(x) == layer(x)``.

    Projections, biases, heads and gates are part of it. For others than softmax it is exact up to rounding. Its state
    has ``expansion * value_dim`` numbers a head: small layers and few tokens.

    Args:
        layer: `SelfAttention` with plain softmax, `LinearAttention`, `NormalizedAttention`, `S6Mixer`, `SSDMixer` or
            `QLSTM`, the last three without a convolution. Subclasses that compute something else do not count.
        x: tokens; the coefficients depend on them.
        order: where softmax's exponential is cut off, for `SelfAttention` alone; see
            `postern.dynamics.taylor_softmax_error_bound`.
        realisation: where attention's normaliser stands, see `postern.dynamics.AttentionForm`.

    Raises:
        ValueError: tokens of another width, a layer that has no such form, or an order for a layer that is not softmax
            or none for one that is.
        TypeError: an unknown kind of layer.
    """
    check_input(x, getattr(layer, "width", x.shape[-1]))
    if not getattr(layer, "is_causal", True):
        raise ValueError(f"a recurrence sees earlier tokens only, and this {type(layer).__name__} is not causal")
    is_softmax = isinstance(layer, SelfAttention)
    if (order is not None) != is_softmax:
        raise ValueError(f"an order is for softmax attention, and needed there; got {order} for {type(layer).__name__}")
    return _convert(layer, x, order, realisation)


def linear_vs_ssd_gap(
    attention: NormalizedAttention | LinearAttention, mixer: SSDMixer, x: Float[Tensor, "batch time width"]
) -> list[CouplingResiduals]:
    """Return, by head, how far attention's normalisers and SSD's steps for tokens are from making them the same.

    Args:
        attention: causal.
        mixer: of as many heads.
        x: tokens.

    Raises:
        ValueError: another number of heads, or attention that is not causal.
    """
    if attention.num_heads != mixer.num_heads or not attention.is_causal:
        raise ValueError(
            f"heads are compared one by one, in the causal order; got {attention.num_heads} and {mixer.num_heads} "
            f"heads and is_causal={attention.is_causal}"
        )
    if isinstance(attention, NormalizedAttention):
        normaliser = attention.project(x)[3]
    else:
        query, key = _features(attention, x)
        normaliser = (query * repeat_heads(key, query.shape[1]).cumsum(2)).sum(-1) + attention.eps
    step = mixer.steps(x).transpose(1, 2)
    return [
        coupling_residuals(normaliser[:, head], step[:, head], rate)
        for head, rate in enumerate(mixer.log_rate.exp().tolist())
    ]


def _features(layer: LinearAttention, x: Tensor) -> tuple[Tensor, Tensor]:
    """Features of queries and keys by head, not rotated."""
    query, key, _ = layer.project(x)
    return layer.query_features(query), layer.key_features(key)


@singledispatch
def _convert(layer: Any, x: Tensor, order: int | None, realisation: Realisation) -> LinearTimeVarying:
    raise TypeError(f"no common form is known of {type(layer).__name__}")


@_convert.register
def _(layer: SelfAttention, x: Tensor, order: int | None, realisation: Realisation) -> LinearTimeVarying:
    if layer.normalise not in (None, torch.softmax) or layer.gate is not None or (layer.training and layer.dropout):
        raise ValueError("softmax attention has a common form without another normaliser, a gate, and dropout")
    query, key, _ = layer.project(x)
    scale = query.shape[-1] ** -0.25
    query, key = (taylor_softmax_features(y * scale, order or 0) for y in (query, repeat_heads(key, query.shape[1])))
    forms = [
        linear_attention_form(query[:, head], key[:, head], weight)
        for head, weight in enumerate(_by_head(layer.value.weight, layer.num_heads, layer.num_kv_heads))
    ]
    return _joined(layer, forms, realisation)


@_convert.register
def _(layer: LinearAttention, x: Tensor, order: int | None, realisation: Realisation) -> LinearTimeVarying:
    if type(layer) is not LinearAttention:
        raise TypeError(f"no common form is known of {type(layer).__name__}")
    query, key = _features(layer, x)
    key = repeat_heads(key, query.shape[1])
    forms = [
        linear_attention_form(query[:, head], key[:, head], weight, layer.eps)
        for head, weight in enumerate(_by_head(layer.value.weight, layer.num_heads, layer.num_kv_heads))
    ]
    if layer.rotary_base is not None:  # in the numerator alone
        angles = rotary_angles(x.shape[1], query.shape[-1], base=layer.rotary_base, device=x.device)
        forms = [replace(form, query=rotate(form.query, angles), key=rotate(form.key, angles)) for form in forms]
    return _joined(layer, forms, realisation)


@_convert.register
def _(layer: NormalizedAttention, x: Tensor, order: int | None, realisation: Realisation) -> LinearTimeVarying:
    query, key, _, normaliser = layer.project(x)
    forms = [
        AttentionForm(query[:, head], key[:, head], weight, normaliser[:, head])
        for head, weight in enumerate(_by_head(layer.value.weight, layer.num_heads, layer.num_heads))
    ]
    return _joined(layer, forms, realisation)


@_convert.register
def _(layer: S6Mixer, x: Tensor, order: int | None, realisation: Realisation) -> LinearTimeVarying:
    _check_inner(layer)
    step, rate, key, query = layer.coefficients(layer.input(x))
    batch, time, channels = step.shape
    identity = torch.eye(channels, dtype=x.dtype, device=x.device)
    system = LinearTimeVarying(
        torch.exp(-step.unsqueeze(-1) * rate).flatten(2),
        torch.einsum("btc,btn,cw->btcnw", step, key, identity).flatten(2, 3),
        torch.einsum("btn,oc->btocn", query, identity).flatten(3),
        torch.diag(layer.skip).expand(batch, time, channels, channels),
    )
    return _between(system, layer, x)


@_convert.register
def _(layer: SSDMixer, x: Tensor, order: int | None, realisation: Realisation) -> LinearTimeVarying:
    _check_inner(layer)
    _, key, query = layer.input(x).split([layer.inner_dim, layer.state_dim, layer.state_dim], dim=-1)
    step = layer.steps(x)
    batch, time, heads = step.shape
    identity = torch.eye(layer.inner_dim, dtype=x.dtype, device=x.device)
    systems = []
    for head, (weight, rate) in enumerate(zip(identity.chunk(heads), layer.log_rate.exp(), strict=True)):
        form = SSDForm(query, key, weight, step[..., head], rate)
        systems.append(form.recurrence().system().project(output=weight.mT))
    through = torch.diag(layer.skip.repeat_interleave(layer.inner_dim // heads))
    joined = replace(LinearTimeVarying.parallel(systems), D=through.expand(batch, time, *through.shape))
    return _between(joined, layer, x)


@_convert.register
def _(layer: QLSTM, x: Tensor, order: int | None, realisation: Realisation) -> LinearTimeVarying:
    _check_inner(layer)
    forget, enter, leave = layer.gates_of(layer.input(x))
    opened = leave * F.gelu(layer.gate(x))
    return LinearTimeVarying(
        forget, enter.unsqueeze(-1) * layer.input.weight, layer.output.weight * opened.unsqueeze(-2)
    )


def _check_inner(layer: S6Mixer | SSDMixer | QLSTM) -> None:
    if layer.conv is not None:
        raise ValueError(
            f"a convolution keeps earlier tokens, which no diagonal transition does; make {type(layer).__name__} with "
            "conv_width=None"
        )


def _by_head(weight: Tensor, heads: int, kv_heads: int) -> list[Tensor]:
    """The rows of each query head's values, of which several in a row may share one head."""
    return [rows for rows in weight.chunk(kv_heads) for _ in range(heads // kv_heads)]


def _joined(
    layer: SelfAttention | LinearAttention | NormalizedAttention, forms: list[AttentionForm], realisation: Realisation
) -> LinearTimeVarying:
    """The sum of the heads behind the output projection, with what the biases add."""
    systems = []
    value_bias = layer.value.bias
    for head, form in enumerate(forms):
        system = form.recurrence(realisation).system()
        if value_bias is not None:
            bias = _by_head(value_bias, len(forms), len(value_bias) // system.out)[head]
            ones = torch.ones_like(form.normaliser).unsqueeze(-1)
            response = replace(form, value=bias.unsqueeze(-1)).recurrence(realisation).system().run(ones)
            system = system.with_offset(response)
        systems.append(system.project(output=layer.output.weight.chunk(len(forms), dim=1)[head]))
    joined = LinearTimeVarying.parallel(systems)
    return joined if layer.output.bias is None else joined.with_offset(layer.output.bias)


def _between(system: LinearTimeVarying, layer: S6Mixer | SSDMixer, x: Tensor) -> LinearTimeVarying:
    """A recurrence of inner tokens between the projections of its layer, behind its gate."""
    if layer.input.bias is not None:
        bias = layer.input.bias[: layer.inner_dim].expand(*x.shape[:2], layer.inner_dim)
        system = system.with_offset(system.run(bias))
    output = layer.output.weight
    if layer.gate is not None:
        output = output * F.silu(layer.gate(x)).unsqueeze(-2)
    joined = system.project(input=layer.input.weight[: layer.inner_dim], output=output)
    return joined if layer.output.bias is None else joined.with_offset(layer.output.bias)
