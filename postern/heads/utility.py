"""A trained softmax network read as an ordinal utility: what it prefers, not how probable it says things are.

The utility ``u_w(x, y)`` of an output ``y`` is its logit (classes) or the sum of its tokens' log-probabilities
(sequences). Only its order for one and the same ``x`` has a meaning: any strictly increasing map leaves rankings,
margins' signs and argmax as they are, while probabilities, samples and expectations change. Utilities of different
``x`` are not comparable, as logits are defined up to a constant for each ``x``.

Paper: "Utility-Probability Duality of Neural Networks" (arXiv 2305.14859). The reading is the paper's; only its
abstract and opening pages were available, so that what is here of its theorem is a reconstruction: one step of maximum
likelihood is the expected pairwise step "the chosen output over a rival that the model itself draws",

    grad log P_w(y|x) = grad u(x, y) - sum_y' P_w(y'|x) grad u(x, y') = E_{y' ~ P_w} [grad (u(x, y) - u(x, y'))],

an identity of the softmax, which needs no more of the paper than that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from scipy.stats import kendalltau
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from postern.nets.evaluation import evaluating

Parameters = Mapping[str, Tensor]


def sequence_lengths(sequences: Int[Tensor, "*batch time"], end: int | None = None) -> Int[Tensor, "*batch"]:
    """Count the tokens up to the first ``end``, which counts as well; all of them where there is none.

    Args:
        sequences: tokens, at least one each.
        end: the token that ends a sequence; None where none does.

    Raises:
        ValueError: no tokens, or tokens that are not integers.
    """
    check_tokens("sequences", sequences)
    if sequences.dim() == 0 or sequences.shape[-1] == 0:
        raise ValueError(f"sequences need at least one token, got the shape {list(sequences.shape)}")
    time = sequences.shape[-1]
    if end is None:
        return torch.full(sequences.shape[:-1], time, device=sequences.device)
    before = (sequences == end).cumsum(-1) == 0
    return (before.sum(-1) + 1).clamp_max(time)


def class_utility(
    logits: Float[Tensor, "*batch classes"], y: Int[Tensor, "*batch"], *, is_normalised: bool = True
) -> Float[Tensor, "*batch"]:
    """Return ``u(x, y)``: the log-probability of the class ``y``, or its logit.

    The two differ by a constant for each ``x``, which no comparison sees.

    Args:
        logits: one a class.
        y: class indices.
        is_normalised: whether to return ``log softmax(logits)_y`` rather than ``logits_y``.

    Raises:
        ValueError: not one class index for each row of logits.
    """
    check_tokens("y", y)
    if logits.dim() == 0 or logits.shape[:-1] != y.shape:
        raise ValueError(f"logits {list(logits.shape)} need y of shape {list(logits.shape[:-1])}, got {list(y.shape)}")
    utilities = F.log_softmax(logits, -1) if is_normalised else logits
    return utilities.gather(-1, y.long().unsqueeze(-1)).squeeze(-1)


def sequence_utility(
    logits: Float[Tensor, "*batch time vocabulary"],
    y: Int[Tensor, "*batch time"],
    *,
    end: int | None = None,
    is_normalised: bool = True,
) -> Float[Tensor, "*batch"]:
    """Return ``u(x, y) = sum_t log softmax(logits_t)_{y_t}``, or the same sum of plain logits.

    Here the two do not rank alike: the constant that normalising takes away depends on the tokens before ``t``.

    Args:
        logits: of each token of ``y``, given ``x`` and those before it.
        y: tokens; those after the first ``end`` do not count.
        end: the token that ends a sequence; None where none does.
        is_normalised: whether to add log-probabilities rather than logits.

    Raises:
        ValueError: not one row of logits for each token.
    """
    tokens = class_utility(logits, y, is_normalised=is_normalised)
    counted = torch.arange(y.shape[-1], device=y.device) < sequence_lengths(y, end).unsqueeze(-1)
    return torch.where(counted, tokens, 0.0).sum(-1)


class UtilityView(nn.Module):
    """The utility function that a trained network is.

    Args:
        model: a classifier, ``(x [batch, ...]) -> logits [batch, classes]``, or a causal language model, ``(tokens
            [batch, time]) -> logits [batch, time, vocabulary]``. An output with an attribute ``logits``, as the
            models of Transformers have it, does as well. Its mode is left alone: put it in evaluation mode.
        end: the token that ends a sequence; tokens after it do not count.
        is_normalised: whether utilities are log-probabilities rather than logits; see `sequence_utility`.
    """

    def __init__(self, model: nn.Module, *, end: int | None = None, is_normalised: bool = True) -> None:
        super().__init__()
        self.model = model
        self.end = end
        self.is_normalised = is_normalised

    def utility(
        self, x: Shaped[Tensor, batch * input], y: Int[Tensor, " batch"] | Int[Tensor, "batch time"]
    ) -> Float[Tensor, " batch"]:
        """Return ``u(x, y)``.

        Args:
            x: inputs of a classifier, or prompts ``[batch, prompt]`` of a language model.
            y: classes ``[batch]``, or continuations ``[batch, time]``.

        Raises:
            ValueError: not one ``y`` for each ``x``, an empty prompt or continuation, or logits of another shape than
                `UtilityView` expects.
        """
        check_tokens("y", y)
        if y.dim() not in (1, 2) or y.shape[0] != x.shape[0]:
            raise ValueError(f"{x.shape[0]} inputs need y [batch] or [batch, time], got {list(y.shape)}")
        if y.dim() == 1:
            return class_utility(self._logits(x, 2), y, is_normalised=self.is_normalised)
        if x.dim() != 2 or 0 in (x.shape[1], y.shape[1]):
            raise ValueError(
                f"sequences need prompts and continuations of at least one token, got {list(x.shape)} and "
                f"{list(y.shape)}"
            )
        logits = self._logits(torch.cat([x, y[:, :-1]], dim=1), 3)[:, x.shape[1] - 1 :]
        return sequence_utility(logits, y, end=self.end, is_normalised=self.is_normalised)

    def utilities(
        self,
        x: Shaped[Tensor, batch * input],
        candidates: Int[Tensor, "batch candidates"] | Int[Tensor, "batch candidates time"],
    ) -> Float[Tensor, "batch candidates"]:
        """Return ``u(x, y)`` of several outputs of each input; arguments as in `rank`.

        Raises:
            ValueError: see `rank`.
        """
        check_tokens("candidates", candidates)
        if candidates.dim() not in (2, 3) or candidates.shape[0] != x.shape[0] or candidates.shape[1] == 0:
            raise ValueError(
                f"{x.shape[0]} inputs need candidates [batch, candidates] or [batch, candidates, time], at least one "
                f"each; got {list(candidates.shape)}"
            )
        batch, number = candidates.shape[:2]
        if candidates.dim() == 2:
            logits = self._logits(x, 2)[:, None].expand(-1, number, -1)
            return class_utility(logits, candidates, is_normalised=self.is_normalised)
        repeated = x.repeat_interleave(number, dim=0)
        return self.utility(repeated, candidates.flatten(0, 1)).view(batch, number)

    def pairwise_margin(self, x: Tensor, y: Tensor, rival: Tensor) -> Float[Tensor, " batch"]:
        """Return ``u(x, y) - u(x, y')``: positive where ``y`` is preferred to the rival; arguments as in `utility`.

        Raises:
            ValueError: see `utility`.
        """
        return self.utility(x, y) - self.utility(x, rival)

    def rank(
        self,
        x: Shaped[Tensor, batch * input],
        candidates: Int[Tensor, "batch candidates"] | Int[Tensor, "batch candidates time"],
    ) -> Int[Tensor, "batch candidates"]:
        """Return the positions of the candidates from the most to the least preferred; ties stay in their order.

        Args:
            x: inputs, or prompts ``[batch, prompt]``.
            candidates: for each input, classes ``[batch, candidates]`` or continuations
                ``[batch, candidates, time]``.

        Raises:
            ValueError: no candidates, or not a row of them for each input.
        """
        return self.utilities(x, candidates).argsort(dim=-1, descending=True, stable=True)

    def forward(self, x: Tensor, y: Tensor) -> Float[Tensor, " batch"]:
        """Return ``u(x, y)``; see `utility`."""
        return self.utility(x, y)

    def _logits(self, x: Tensor, dims: int) -> Tensor:
        output: Any = self.model(x)
        logits: Tensor = getattr(output, "logits", output)
        if logits.dim() != dims or logits.shape[0] != x.shape[0] or (dims == 3 and logits.shape[1] != x.shape[1]):
            expected = "[batch, classes]" if dims == 2 else "[batch, time, vocabulary]"
            raise ValueError(f"the model must give logits {expected} for {list(x.shape)}, got {list(logits.shape)}")
        return logits


def preference_gradient(
    utilities: Callable[[Parameters, Tensor], Tensor],
    parameters: Parameters,
    x: Shaped[Tensor, batch * input],
    y: Int[Tensor, " batch"],
) -> dict[str, Tensor]:
    """Return ``mean_x sum_y' P_w(y'|x) grad (u(x, y) - u(x, y'))``, rival by rival (reconstruction).

    It is the gradient of the mean log-likelihood: minus that of the cross-entropy. This is the oracle for tests and
    takes one backward pass a class; the backward pass of the cross-entropy gives the same for the price of one.

    Args:
        utilities: ``(parameters, x) -> logits [batch, classes]``; for a module,
            ``lambda parameters, x: torch.func.functional_call(module, parameters, x)``.
        parameters: by name.
        x: inputs.
        y: the chosen classes.

    Returns:
        A gradient for each parameter, to ascend.

    Raises:
        ValueError: not one class index for each row of utilities.
    """
    leaves = {name: parameter.detach().requires_grad_() for name, parameter in parameters.items()}
    values = utilities(leaves, x)
    chosen = class_utility(values, y, is_normalised=False)
    probabilities = values.detach().softmax(-1)
    total = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    for rival in range(values.shape[-1]):
        preference = (probabilities[:, rival] * (chosen - values[:, rival])).mean()
        _add_gradient(total, leaves, preference)
    return total


def sampled_preference_gradient(
    utility: Callable[[Parameters, Tensor, Tensor], Tensor],
    parameters: Parameters,
    x: Shaped[Tensor, batch * input],
    y: Int[Tensor, "batch time"],
    rivals: Int[Tensor, "samples batch time"],
) -> dict[str, Tensor]:
    """Return ``mean_s mean_x grad (u(x, y) - u(x, y'_s))`` for rivals drawn from the model (reconstruction).

    The Monte-Carlo form of `preference_gradient`, for outputs that are too many to enumerate. Its expectation over
    rivals drawn from ``P_w`` is the gradient of the mean log-likelihood.

    Args:
        utility: ``(parameters, x, y) -> u(x, y) [batch]``; for a `UtilityView` ``view``,
            ``lambda parameters, x, y: torch.func.functional_call(view, parameters, (x, y))``.
        parameters: by name.
        x: prompts.
        y: the chosen outputs.
        rivals: samples of the model, such as `postern.heads.sample` draws them.

    Returns:
        A gradient for each parameter, to ascend.

    Raises:
        ValueError: no rivals, or rivals that are not outputs of the same inputs.
    """
    if rivals.dim() != y.dim() + 1 or rivals.shape[1] != y.shape[0] or not len(rivals):
        raise ValueError(f"outputs {list(y.shape)} need rivals [samples, batch, time], got {list(rivals.shape)}")
    leaves = {name: parameter.detach().requires_grad_() for name, parameter in parameters.items()}
    total = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    _add_gradient(total, leaves, utility(leaves, x, y).mean())
    for rival in rivals:
        _add_gradient(total, leaves, -utility(leaves, x, rival).mean() / len(rivals))
    return total


def _add_gradient(total: dict[str, Tensor], leaves: Mapping[str, Tensor], value: Tensor) -> None:
    gradients = torch.autograd.grad(value, list(leaves.values()), retain_graph=True, allow_unused=True)
    for name, gradient in zip(leaves, gradients, strict=True):
        if gradient is not None:
            total[name] += gradient


def margin_monotonicity(
    model: nn.Module, x: Shaped[Tensor, batch * input], y: Int[Tensor, " batch"], learning_rate: float
) -> float:
    """Share of the margins ``u(x, y) - u(x, y')`` that one SGD step on the mean cross-entropy raises.

    Logits that are free parameters for each x gain on every rival in every step: ``u_y`` rises by ``lr (1 - p_y)``,
    ``u_y'`` falls by ``lr p_y'``. In a network inputs share parameters, and the step for one may lower the margin of
    another.

    Args:
        model: a classifier, ``(x) -> logits [batch, classes]``; it is left as it is, and looked at in evaluation mode.
            In float32 the change of a margin may drown in rounding where steps are small: use float64.
        x: inputs.
        y: their classes.
        learning_rate: of the step.

    Returns:
        Between 0 and 1, over all pairs of an input and a class that is not its own.

    Raises:
        ValueError: a learning rate that is not positive, or not one class index for each row of logits.
    """
    if not learning_rate > 0:
        raise ValueError(f"a step needs a positive learning rate, got {learning_rate}")
    parameters = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
    state = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    with evaluating(model):
        before = functional_call(model, {**parameters, **state}, (x,))
        loss = -class_utility(before, y).mean()
        gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        stepped = {
            name: parameter if gradient is None else parameter - learning_rate * gradient
            for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True)
        }
        with torch.no_grad():
            after = functional_call(model, {**stepped, **state}, (x,))
    own = y.long()[:, None]
    rises = (after.gather(1, own) - after) > (before.gather(1, own) - before)
    is_rival = torch.ones_like(rises).scatter(1, own, False)
    return float(rises[is_rival].double().mean())


def ordinal_agreement(
    utilities: Float[Tensor, "batch candidates"], quality: Shaped[Tensor, "batch candidates"]
) -> float:
    """Mean over the inputs of Kendall's tau-b between the utilities of an input's candidates and their quality.

    It compares orders only: 1 where both rank alike, -1 where they rank the other way round. It does not change under
    increasing maps of either.

    Args:
        utilities: of each candidate, compared within a row only.
        quality: of each candidate, higher is better.

    Raises:
        ValueError: other shapes, fewer than two candidates, NaN, or no row with two different utilities and two
            different qualities (other rows have no tau and are left out).
    """
    if utilities.shape != quality.shape or utilities.dim() != 2 or utilities.shape[1] < 2:
        raise ValueError(
            "utilities and quality are [batch, candidates] with at least two candidates, "
            f"got {list(utilities.shape)} and {list(quality.shape)}"
        )
    rows = list(zip(utilities.detach().cpu().double().numpy(), quality.detach().cpu().double().numpy(), strict=True))
    if any(np.isnan(row).any() for pair in rows for row in pair):
        raise ValueError("utilities and quality must be numbers, got NaN")
    taus = [kendalltau(u, q).statistic for u, q in rows if len(np.unique(u)) > 1 and len(np.unique(q)) > 1]
    if not taus:
        raise ValueError("no row has two different utilities and two different qualities, so there is no order")
    return float(np.mean(taus))


def check_tokens(name: str, tokens: Tensor) -> None:
    """Check that classes or tokens are indices.

    Raises:
        ValueError: they are not of an integer type.
    """
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise ValueError(f"{name} must be indices of an integer type, got {tokens.dtype}")
