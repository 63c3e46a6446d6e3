"""A differentiable top-k, and the loss that trains for a fixed number of answers.

Shift the scores of a query by the one ``t`` for which their sigmoids sum to k; the sigmoids are then a soft indicator
of the k highest scores, and their logarithms at the positives a loss.

Paper: "Dual-Encoders for Extreme Multi-Label Classification" (arXiv 2310.10636), section 4.2; the operator is Thomas
Ahle's. Its code bisects 32 times between ``-max s - 10/alpha`` and ``-min s + 10/alpha``, which miss the root where
scores are close together and ``L sigmoid(-10)`` exceeds k (22 000 labels a unit of k); here the bracket always holds
it, and safeguarded Newton steps find it in three to twelve passes.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float, Real
from torch import Tensor, nn
from torch.nn import functional as F

from postern.heads._positives import (
    Reduction,
    Targets,
    at_least_float32,
    check_reduction,
    mean_over_positives,
    positives_in,
    reduce,
)

Budget = int | float | Tensor


def soft_topk(
    scores: Float[Tensor, "*batch labels"], k: Budget, alpha: float = 2.0, n_iter: int = 32
) -> Float[Tensor, "*batch labels"]:
    r"""Return ``z_l = sigmoid(alpha (s_l + t))`` with the ``t`` for which ``sum_l z_l = k``.

    The gradient is exact: with ``v = alpha z (1 - z)``, implicitly ``dt/ds = -v / sum v``, so that the product of a
    vector g with the Jacobian is ``g v - v sum(g v) / sum(v)``. Adding a constant to the scores changes nothing.
    Computed and returned in float32 at least, also under autocast.

    Args:
        scores: one score a label; -inf leaves a label out (``z = 0``).
        k: how many labels are wanted: a positive number, or one a row (``[*batch]``), 0 included. Where it is the
            number of labels or more, ``z`` is 1 for all.
        alpha: steepness; as it grows, z becomes the indicator of the k highest scores.
        n_iter: most passes over the scores to find t. It stops as soon as t is right,
            usually after three to twelve.

    Raises:
        ValueError: scores without labels, an alpha or n_iter that is not positive, a k that is negative, not finite,
            or of another shape than the rows.
    """
    scores = at_least_float32(scores)
    return torch.sigmoid(alpha * (scores + soft_topk_shift(scores, k, alpha, n_iter)[..., None]))


def log_soft_topk(
    scores: Float[Tensor, "*batch labels"], k: Budget, alpha: float = 2.0, n_iter: int = 32
) -> Float[Tensor, "*batch labels"]:
    """Return the logarithm of `soft_topk`, exact where ``z`` underflows.

    Args:
        scores: one score a label; -inf leaves a label out.
        k: see `soft_topk`.
        alpha: see `soft_topk`.
        n_iter: see `soft_topk`.

    Raises:
        ValueError: see `soft_topk`.
    """
    scores = at_least_float32(scores)
    return F.logsigmoid(alpha * (scores + soft_topk_shift(scores, k, alpha, n_iter)[..., None]))


def soft_topk_shift(
    scores: Float[Tensor, "*batch labels"], k: Budget, alpha: float = 2.0, n_iter: int = 32
) -> Float[Tensor, "*batch"]:
    """Return each row's ``t`` with ``sum_l sigmoid(alpha (s_l + t)) = k``; +inf where k is all labels or more.

    It costs passes over the scores but keeps none of their size, and its gradient ``-v / sum v`` can be differentiated
    again.

    Args:
        scores: one score a label; -inf leaves a label out.
        k: see `soft_topk`.
        alpha: see `soft_topk`.
        n_iter: see `soft_topk`.

    Raises:
        ValueError: see `soft_topk`.
    """
    _check(alpha, n_iter)
    if scores.dim() == 0 or scores.shape[-1] == 0 or not scores.is_floating_point():
        raise ValueError(f"scores are floats [..., labels] with at least one label, got {list(scores.shape)}")
    budget = _budget(scores, k)
    scores = at_least_float32(scores)
    flat = scores.reshape(-1, scores.shape[-1])
    shift: Tensor = _find_shift(flat, budget.to(flat.dtype), float(alpha), int(n_iter))
    return shift.reshape(scores.shape[:-1])


def soft_topk_loss(
    scores: Float[Tensor, "queries labels"],
    targets: Targets,
    k: Budget | Literal["num_positives"] = 5,
    alpha: float = 2.0,
    *,
    n_iter: int = 32,
    weights: Tensor | None = None,
    reduction: Reduction = "mean",
) -> Float[Tensor, "*reduced"]:
    """Return ``-1/|P_i| sum_{j in P_i} log z_ij`` with ``z_i = soft_topk(s_i; k, alpha)``.

    Args:
        scores: one score a label, already divided by the temperature. -inf leaves a label out.
        targets: a matrix, pairs or a sparse matrix; see `postern.heads.decoupled_softmax_loss`.
        k: how many answers will be looked at: 5 trains for P@5, 100 for R@100; or one number a query; or
            "num_positives", each query's own number.
        alpha: steepness of the top-k; the paper's value is 2.
        n_iter: see `soft_topk`.
        weights: see `postern.heads.decoupled_softmax_loss`.
        reduction: "mean" over the queries that have positives, "sum", or "none".

    Raises:
        ValueError: see `soft_topk` and `postern.heads.decoupled_softmax_loss`.
    """
    check_reduction(reduction)
    positives, scores = positives_in(scores, targets), at_least_float32(scores)
    counts = positives.counts()
    if isinstance(k, str):
        if k != "num_positives":
            raise ValueError(f"k is a number, one number a query, or 'num_positives', got {k!r}")
        k = counts.clamp_min(1)
    shift = soft_topk_shift(scores, k, alpha, n_iter)
    totals = positives.sum(lambda score, t: F.softplus(-alpha * (score + t)), scores, shift, weights)
    return reduce(mean_over_positives(totals, counts), counts, reduction)


class SoftTopKLoss(nn.Module):
    """`soft_topk_loss` as a module.

    Args:
        k: how many answers will be looked at, or "num_positives".
        alpha: steepness of the top-k.
        n_iter: most passes over the scores.
        reduction: "mean", "sum" or "none".

    Raises:
        ValueError: a k, alpha or n_iter that is not positive, an unknown reduction.
    """

    def __init__(
        self,
        k: int | float | Literal["num_positives"] = 5,
        alpha: float = 2.0,
        n_iter: int = 32,
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__()
        check_reduction(reduction)
        _check(alpha, n_iter)
        if isinstance(k, str):
            if k != "num_positives":
                raise ValueError(f"k is a positive number or 'num_positives', got {k!r}")
        elif not 0 < k < float("inf"):
            raise ValueError(f"k must be a positive number, got {k}")
        self.k = k
        self.alpha = alpha
        self.n_iter = n_iter
        self.reduction: Reduction = reduction

    def forward(
        self, scores: Float[Tensor, "queries labels"], targets: Targets, weights: Tensor | None = None
    ) -> Float[Tensor, "*reduced"]:
        """Return the loss; see `soft_topk_loss`."""
        return soft_topk_loss(
            scores,
            targets,
            self.k,
            self.alpha,
            n_iter=self.n_iter,
            weights=weights,
            reduction=self.reduction,
        )


def _check(alpha: float, n_iter: int) -> None:
    if not 0 < alpha < float("inf"):
        raise ValueError(f"alpha must be a positive number, got {alpha}")
    if n_iter < 1:
        raise ValueError(f"n_iter must be at least 1, got {n_iter}")


def _budget(scores: Tensor, k: Budget) -> Real[Tensor, " rows"]:
    """One k a row."""
    rows = scores.shape[:-1]
    if not isinstance(k, Tensor):
        if not 0 < k < float("inf"):
            raise ValueError(f"k must be a positive number, got {k}")
        return scores.new_full((rows.numel(),), float(k), dtype=torch.promote_types(scores.dtype, torch.float32))
    if k.dim() and k.shape != rows:
        raise ValueError(f"k is one number, or one a row {list(rows)}, got {list(k.shape)}")
    if k.device.type != "meta" and not torch.compiler.is_compiling() and k.numel():
        low, high = (float(bound) for bound in k.aminmax())
        if not 0 <= low <= high < float("inf"):
            raise ValueError(f"k must not be negative and must be finite, got {low} to {high}")
    return k.expand(rows).reshape(-1)


# An operator of torch, so that torch.compile takes a loop as one step whose length depends on the data.
@torch.library.custom_op("postern::soft_topk_shift", mutates_args=())
def _find_shift(scores: Tensor, k: Tensor, alpha: float, n_iter: int) -> Tensor:
    r"""Solve ``logit(mean_l sigmoid(alpha (s_l + t))) = logit(k / L)`` row by row.

    In this form the equation is linear in t wherever the sigmoids are all small or all large, and for equal scores
    altogether, so that Newton steps are nearly right from the start. The root lies between ``logit(k/L)/alpha - max s``
    and ``logit(k/L)/alpha - min s``; a step that leaves what is known of this bracket, or that is not half as long as
    the last one, is replaced by a bisection.
    """
    lowest, count = scores.amin(1), scores.new_full((len(scores),), scores.shape[1])
    if bool((lowest == -torch.inf).any()):
        is_in = scores > -torch.inf
        lowest, count = torch.where(is_in, scores, torch.inf).amin(1), is_in.sum(1).to(scores.dtype)
    aim = k.log() - (count - k).clamp_min(0).log()  # logit(k / L), infinite where none or all are wanted
    is_open = aim.isfinite()
    aim = torch.where(is_open, aim, 0.0)
    low = aim / alpha - scores.amax(1)
    high = aim / alpha - lowest
    low, high = torch.where(is_open, low, 0.0), torch.where(is_open, high, 0.0)
    shift, last_step = (low + high) / 2, high - low
    # What a Newton step leaves undone is about its square, in units of 1 / alpha.
    short, rounding = (1e-5, 1e-14) if scores.dtype == torch.float64 else (1e-3, 1e-6)
    is_settled, z = ~is_open, torch.empty_like(scores)
    for _ in range(n_iter):
        torch.add(scores, shift[:, None], out=z).mul_(alpha).sigmoid_()
        total = z.sum(1)
        rest = count - total
        slope = total - torch.linalg.vector_norm(z, dim=1).square()
        error = total.log() - rest.log() - aim
        low, high = torch.where(error < 0, shift, low), torch.where(error < 0, high, shift)
        step = -error / (alpha * slope * (1 / total + 1 / rest))
        newton = shift + step
        is_newton = (newton >= low) & (newton <= high) & (step.abs() <= last_step / 2)
        moved = torch.where(is_newton, newton, (low + high) / 2)
        is_right = error.abs() <= rounding
        moved = torch.where(is_settled | is_right, shift, moved)
        shift, last_step = moved, (moved - shift).abs()
        is_settled = is_settled | is_right | (is_newton & (alpha * step.abs() < short)) | (low == high)
        if bool(is_settled.all()):
            break
    return torch.where(is_open, shift, torch.where(k > 0, torch.inf, -torch.inf))


@_find_shift.register_fake
def _(scores: Tensor, k: Tensor, alpha: float, n_iter: int) -> Tensor:
    return scores.new_empty(scores.shape[0])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    scores, _, ctx.alpha, _ = inputs
    ctx.save_for_backward(scores, output)


def _implicit_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """``-v / sum v`` times the gradient, in operations that can be differentiated again."""
    scores, shift = ctx.saved_tensors
    z = torch.sigmoid(ctx.alpha * (scores + shift[:, None]))
    v = z - z * z
    slope = v.sum(1)
    # Where all sigmoids are 0 or 1 to the last digit, nothing moves them.
    scale = torch.where(slope > 0, grad / slope, 0.0)
    return -scale[:, None] * v, None, None, None


_find_shift.register_autograd(_implicit_gradient, setup_context=_keep)
