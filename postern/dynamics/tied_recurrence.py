"""What linear attention, normalised attention and SSD share: one transition a token, and how the three tie it.

    S_i = a_i S_{i-1} + b_i k_i (W u_i)^T,    y_i = c_i S_i^T q_i

Attention with a normaliser ``eta`` has ``a_i = eta_{i-1} / eta_i`` and ``b_i = 1 / eta_i``; SSD has
``a_i = exp(-Delta_i rate)`` and ``b_i = Delta_i``. With the same queries, keys and values they are equal if and only if
these scalars are, for all tokens (`postern.dynamics.couple`). If the keys may take up scalars, ``a`` alone decides.

Paper: "Understanding the differences in Foundation Models: Attention, State Space Models, and Recurrent Neural
Networks", arXiv 2405.15731. The way back, and when it exists, are ours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from postern.dynamics.state_space import LinearTimeVarying, relative_distance

Realisation = Literal["output", "transition"]


@dataclass(frozen=True)
class TiedRecurrence:
    """``S_i = a_i S_{i-1} + b_i k_i (W u_i)^T`` and ``y_i = c_i S_i^T q_i``.

    Attributes:
        transition: ``a``; the first multiplies the state before the first token, zeros as a rule.
        input_scale: ``b``.
        output_scale: ``c``.
        query: ``q``; their size is the state expansion.
        key: ``k``.
        value: ``W``.
    """

    transition: Float[Tensor, "*batch time"]
    input_scale: Float[Tensor, "*batch time"]
    output_scale: Float[Tensor, "*batch time"]
    query: Float[Tensor, "*batch time expansion"]
    key: Float[Tensor, "*batch time expansion"]
    value: Float[Tensor, "out width"]

    def system(self) -> LinearTimeVarying:
        """Return the common form; state ``c * expansion + n`` is feature n of channel c."""
        out = self.value.shape[0]
        *batch, expansion = self.key.shape
        scaled_key, scaled_query = self.key * self.input_scale[..., None], self.query * self.output_scale[..., None]
        A = self.transition.unsqueeze(-1).expand(*batch, out * expansion)
        B = torch.einsum("...n,cw->...cnw", scaled_key, self.value).flatten(-3, -2)
        identity = torch.eye(out, dtype=self.query.dtype, device=self.query.device)
        C = torch.einsum("...n,oc->...ocn", scaled_query, identity).flatten(-2)
        return LinearTimeVarying(A, B, C)

    def folded(self) -> TiedRecurrence:
        """Return the equal recurrence with output scales of 1: ``a_i c_i / c_{i-1}`` and ``b_i c_i``.

        Raises:
            ValueError: an output scale of 0 among those before the last.
        """
        scale = self.output_scale
        if (scale[..., :-1] == 0).any():
            raise ValueError("output scales of 0 cannot be moved into the recurrence")
        before = torch.cat([scale[..., :1], scale[..., :-1]], dim=-1)
        return replace(
            self,
            transition=self.transition * scale / before,
            input_scale=self.input_scale * scale,
            output_scale=torch.ones_like(scale),
        )

    def weights(self) -> Float[Tensor, "*batch time time"]:
        """Return the attention weights: ``c_i a_i ... a_{j+1} b_j (q_i . k_j)`` for ``j <= i``, else 0."""
        return replace(self, value=self.value.new_ones(1, 1)).system().unroll()[..., 0, 0]


@dataclass(frozen=True)
class AttentionForm:
    """``y_i = sum_{j <= i} (q_i . k_j) W u_j / eta_i``: linear attention, and normalised attention.

    Attributes:
        query: queries, or their features.
        key: keys, or their features.
        value: ``W``.
        normaliser: ``eta``, positive. Linear attention's is ``sum_{j <= i} q_i . k_j``.
    """

    query: Float[Tensor, "*batch time expansion"]
    key: Float[Tensor, "*batch time expansion"]
    value: Float[Tensor, "out width"]
    normaliser: Float[Tensor, "*batch time"]

    def recurrence(self, realisation: Realisation = "output") -> TiedRecurrence:
        """Return it as a recurrence.

        Args:
            realisation: "output": states are plain sums and outputs are divided. "transition": states are divided,
                ``a_i = eta_{i-1} / eta_i``, which overflows where normalisers differ much.

        Raises:
            ValueError: an unknown realisation.
        """
        eta = self.normaliser
        if realisation == "output":
            return TiedRecurrence(torch.ones_like(eta), torch.ones_like(eta), 1 / eta, self.query, self.key, self.value)
        if realisation == "transition":
            before = torch.cat([torch.zeros_like(eta[..., :1]), eta[..., :-1]], dim=-1)
            return TiedRecurrence(before / eta, 1 / eta, torch.ones_like(eta), self.query, self.key, self.value)
        raise ValueError(f"realisation is 'output' or 'transition', got {realisation!r}")


@dataclass(frozen=True)
class SSDForm:
    """``S_i = exp(-Delta_i rate) S_{i-1} + Delta_i k_i (W u_i)^T`` and ``y_i = S_i^T q_i``: one head of SSD.

    Attributes:
        query: ``C``.
        key: ``B``.
        value: ``W``.
        step: ``Delta``, at least 0.
        rate: ``-A``, positive.
    """

    query: Float[Tensor, "*batch time expansion"]
    key: Float[Tensor, "*batch time expansion"]
    value: Float[Tensor, "out width"]
    step: Float[Tensor, "*batch time"]
    rate: float | Tensor

    def recurrence(self) -> TiedRecurrence:
        """Return it as a recurrence."""
        ones = torch.ones_like(self.step)
        return TiedRecurrence(torch.exp(-self.rate * self.step), self.step, ones, self.query, self.key, self.value)


def linear_attention_form(
    query: Float[Tensor, "*batch time expansion"],
    key: Float[Tensor, "*batch time expansion"],
    value: Float[Tensor, "out width"],
    eps: float = 0.0,
) -> AttentionForm:
    """Return linear attention with features: ``eta_i = sum_{j <= i} q_i . k_j + eps``.

    Args:
        query: features of the queries, at least 0.
        key: features of the keys, at least 0.
        value: ``W``.
        eps: see `postern.attention.linear_attention`.
    """
    return AttentionForm(query, key, value, (query * key.cumsum(-2)).sum(-1) + eps)


def tie(
    system: LinearTimeVarying,
    *,
    value: Float[Tensor, "out width"] | None = None,
    key: Float[Tensor, "*batch time expansion"] | None = None,
    tolerance: float = 1e-6,
) -> TiedRecurrence:
    """Find the tied recurrence in a common form.

    It exists where all states of a token share one transition, ``C_i = I (x) q_i^T`` and ``B_i = W (x) b_i k_i``,
    without D and offset. The coefficients tell the queries, and of the rest the products ``b_i k_i W`` alone.

    Args:
        system: one sequence, or a batch whose values share one matrix.
        value: ``W``, where it is known; else it is scaled to norm 1.
        key: ``k``, where they are known, with ``value``; else the input scales are 1, and the keys take them up.
        tolerance: largest accepted distance from such coefficients, relative to the largest of each.

    Raises:
        ValueError: there is none; the message tells the distance.
    """
    out, expansion = system.out, system.num_states // max(system.out, 1)
    if any(term is not None and term.abs().max() > 0 for term in (system.D, system.offset)):
        raise ValueError("inputs that reach the output without the state have no place in a tied recurrence")
    if system.num_states != out * expansion:
        raise ValueError(f"{system.num_states} states cannot be shared evenly by {out} channels")
    transition = system.A.mean(-1)
    _require(
        relative_distance(transition.unsqueeze(-1), system.A), tolerance, "the states of a token share no transition"
    )
    C = system.C.reshape(*system.C.shape[:-1], out, expansion)
    query = C.diagonal(dim1=-3, dim2=-2).mean(-1)
    identity = torch.eye(out, dtype=C.dtype, device=C.device)
    _require(
        relative_distance(torch.einsum("...n,oc->...ocn", query, identity), C),
        tolerance,
        "the channels are not read by the same query",
    )
    B = system.B.reshape(*system.A.shape[:-1], out, expansion, system.width).transpose(
        -3, -2
    )  # [..., time, expansion, out, width]
    pairs = B.reshape(-1, out * system.width)
    if value is None:
        if key is not None:
            raise ValueError("keys without the matrix of the values do not tell the input scales")
        leading = torch.linalg.svd(pairs, full_matrices=False)[2][0]
        value = (leading * torch.where(leading.sum() < 0, -1.0, 1.0)).reshape(out, system.width)
    if value.shape != (out, system.width):
        raise ValueError(f"the values' matrix has the shape {[out, system.width]}, got {list(value.shape)}")
    scaled_key = (pairs @ value.flatten() / value.square().sum()).reshape(B.shape[:-2])
    scale = torch.ones_like(transition)
    if key is not None:
        if key.shape != scaled_key.shape:
            raise ValueError(f"the keys have the shape {list(scaled_key.shape)}, got {list(key.shape)}")
        scale = (scaled_key * key).sum(-1) / key.square().sum(-1)
    key = scaled_key if key is None else key
    found = (scale.unsqueeze(-1) * key)[..., None, None] * value
    _require(relative_distance(found, B), tolerance, "keys and values do not come apart (B_i = W (x) b_i k_i)")
    return TiedRecurrence(transition, scale, torch.ones_like(transition), query, key, value)


def to_normalized_attention(
    recurrence: TiedRecurrence, *, keeps_keys: bool = True, tolerance: float = 1e-6
) -> AttentionForm:
    """Return the normalised attention that computes the same.

    Args:
        recurrence: with positive transitions after the first token.
        keeps_keys: whether the keys stay as they are. Then both scalars of each token must be those of one normaliser:
            ``a_i = eta_{i-1} / eta_i`` and ``b_i = 1 / eta_i``. Else the keys take up ``eta_i b_i``, and it always
            exists; the first normaliser is ``1 / b_0``.
        tolerance: largest accepted relative error of the transitions.

    Raises:
        ValueError: it does not exist; the message tells the residual of the coupling equations.
    """
    folded = recurrence.folded()
    a, b = folded.transition[..., 1:], folded.input_scale
    if (a <= 0).any() or (b[..., 0] <= 0).any() or (keeps_keys and (b <= 0).any()):
        raise ValueError(
            "normalisers are positive, which asks for positive transitions and scales; the lowest are "
            f"{a.min().item() if a.numel() else 1:.3g} and {b.min().item():.3g}"
        )
    if keeps_keys:
        eta = 1 / b
        residual = relative_distance(eta[..., :-1] / eta[..., 1:] / a, torch.ones_like(a)) if a.numel() else 0.0
        _require(residual, tolerance, "the transitions are not eta_{i-1} / eta_i for the normalisers eta_i = 1 / b_i")
        return AttentionForm(folded.query, folded.key, folded.value, eta)
    log_eta = torch.cat([-b[..., :1].log(), -a.log()], dim=-1).cumsum(-1)
    eta = log_eta.exp()
    return AttentionForm(folded.query, folded.key * (eta * b).unsqueeze(-1), folded.value, eta)


def to_linear_attention(
    recurrence: TiedRecurrence, *, keeps_keys: bool = True, tolerance: float = 1e-6
) -> AttentionForm:
    """Return the linear attention that computes the same: normalised attention whose weights sum to 1.

    Args:
        recurrence: with positive transitions after the first token.
        keeps_keys: see `to_normalized_attention`.
        tolerance: largest accepted error of the sums and, with keys that stay, of the transitions.

    Raises:
        ValueError: it does not exist; the message tells the residual.
    """
    sums = recurrence.weights().sum(-1)
    _require(relative_distance(sums, torch.ones_like(sums)), tolerance, "the weights of a token do not sum to 1")
    return to_normalized_attention(recurrence, keeps_keys=keeps_keys, tolerance=tolerance)


def to_ssd(
    recurrence: TiedRecurrence, *, keeps_keys: bool = True, rate: float = 1.0, tolerance: float = 1e-6
) -> SSDForm:
    """Return the SSD that computes the same.

    Args:
        recurrence: with transitions between 0 and 1 after the first token.
        keeps_keys: whether the keys stay as they are. Then the steps are the input scales, and one rate must give all
            transitions: ``a_i = exp(-b_i rate)``. Else the steps are ``-log(a_i) / rate``, and the keys take up the
            rest.
        rate: where keys do not stay.
        tolerance: largest accepted error of the transitions.

    Raises:
        ValueError: it does not exist; the message tells the residual of the coupling equations.
    """
    folded = recurrence.folded()
    a, b = folded.transition[..., 1:], folded.input_scale
    if not rate > 0:
        raise ValueError(f"the rate is positive, got {rate}")
    if (a <= 0).any() or (a >= 1).any():
        raise ValueError(
            f"SSD fades with every step: its transitions lie between 0 and 1, got {a.min().item():.3g} to "
            f"{a.max().item():.3g}"
        )
    if keeps_keys:
        if (b <= 0).any():
            raise ValueError(f"SSD's steps, the input scales, are positive; the lowest is {b.min().item():.3g}")
        rate = (-a.log().sum() / b[..., 1:].sum()).item() if a.numel() else rate
        _require(
            (torch.exp(-rate * b[..., 1:]) - a).abs().max().item() if a.numel() else 0.0,
            tolerance,
            f"no rate gives the transitions exp(-rate b_i); the nearest is {rate:.6g}",
        )
        return SSDForm(folded.query, folded.key, folded.value, b, rate)
    first = torch.full_like(b[..., :1], 1 / rate)  # nothing is there yet that could fade
    step = torch.cat([first, -a.log() / rate], dim=-1)
    return SSDForm(folded.query, folded.key * (b / step).unsqueeze(-1), folded.value, step, rate)


def _require(residual: float, tolerance: float, problem: str) -> None:
    if not residual <= tolerance:
        raise ValueError(f"{problem}: the residual is {residual:.3g}, more than {tolerance:g}")
