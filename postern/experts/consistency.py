"""Two passes of a batch, pulled together: how stochastic experts learn to agree, and how far they do.

Paper: "Taming Sparsely Activated Transformer with Stochastic Experts" (THOR), arXiv 2110.04260. With passes ``p1`` and
``p2`` that differ in their experts and in what dropout zeroes, the loss of a batch is

    L = CE(p1) + CE(p2) + alpha CR,    CR = 1/2 [KL(p1 || p2) + KL(p2 || p1)],

each summed over tokens that count, and divided by their number. In a model without experts dropout alone makes the
passes differ: that is R-Drop, arXiv 2106.14448, the control without which little can be said of experts.

The official code takes the logarithm of a softmax, which is minus infinity for small probabilities in 16 bits; here
log-probabilities are computed as such, in float32 at least.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from postern.experts.stochastic_router import StochasticRouter, expert_draws, stochastic_routers
from postern.nets.evaluation import evaluating
from postern.precision import without_autocast

Batch = Mapping[str, Any] | Sequence[Any]


def symmetric_kl(
    log_p: Float[Tensor, "*tokens classes"],
    log_q: Float[Tensor, "*tokens classes"],
    mask: Bool[Tensor, "*tokens"] | None = None,
) -> Float[Tensor, ""]:
    """``1/2 sum_tokens sum_classes (p - q) (log p - log q)``, in nats, summed over tokens; in float32 at least.

    Gradients flow to both.

    Args:
        log_p: log-probabilities.
        log_q: others.
        mask: true where a token counts; None where all do.

    Raises:
        ValueError: shapes that differ, or a mask that does not fit.
    """
    if log_p.shape != log_q.shape or (mask is not None and mask.shape != log_p.shape[:-1]):
        raise ValueError(
            f"log-probabilities have one shape, and a mask that without classes; got {list(log_p.shape)}, "
            f"{list(log_q.shape)} and {None if mask is None else list(mask.shape)}"
        )
    with without_autocast(log_p.device):
        dtype = torch.promote_types(torch.promote_types(log_p.dtype, log_q.dtype), torch.float32)
        log_p, log_q = log_p.to(dtype), log_q.to(dtype)
        terms = (log_p.exp() - log_q.exp()) * (log_p - log_q)
        # both impossible: a difference of infinities, which counts nothing
        terms = terms.masked_fill(torch.isneginf(log_p) & torch.isneginf(log_q), 0.0).sum(-1)
        return (terms if mask is None else terms.masked_fill(~mask, 0.0)).sum() / 2


class ConsistencyLoss(nn.Module):
    """``(CE(p1) + CE(p2) + alpha CR) / tokens`` of two passes of one batch.

    Cross-entropy and consistency are summed over the same tokens: where one is a mean and the other a sum, alpha means
    something else in each batch.

    Args:
        alpha: weight of the consistency; the paper takes 5 for IWSLT'14 German to English, its code 1 by default.
        label_smoothing: share of the target's probability that goes to all classes alike.
        ignore_index: target of tokens that do not count.
        base: ``(logits [tokens, classes], target [tokens]) -> sum`` in the place of smoothed cross-entropy; it must
            leave out what ``ignore_index`` marks by itself.

    Raises:
        ValueError: a negative alpha, or a smoothing outside [0, 1).
    """

    def __init__(
        self,
        alpha: float = 5.0,
        *,
        label_smoothing: float = 0.1,
        ignore_index: int = -100,
        base: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        if not alpha >= 0 or not 0 <= label_smoothing < 1:
            raise ValueError(
                f"alpha is 0 or more and label smoothing lies in [0, 1), got {alpha} and {label_smoothing}"
            )
        self.alpha = alpha
        self.ignore_index = ignore_index
        smoothed = nn.CrossEntropyLoss(reduction="sum", label_smoothing=label_smoothing, ignore_index=ignore_index)
        self.base = smoothed if base is None else base

    def forward(
        self,
        first: Float[Tensor, "*tokens classes"],
        second: Float[Tensor, "*tokens classes"],
        target: Int[Tensor, "*tokens"],
        num_tokens: Tensor | float | None = None,
    ) -> Float[Tensor, ""]:
        """Return the loss.

        Args:
            first: logits of a pass.
            second: logits of the other.
            target: classes, the same for both.
            num_tokens: what the sums are divided by; by default the number of tokens that count. Where gradients are
                accumulated over several batches, give that of all of them.

        Raises:
            ValueError: shapes that do not fit.
        """
        if first.shape != second.shape or first.shape[:-1] != target.shape:
            raise ValueError(
                "two passes have logits [..., classes] for one target [...], got "
                f"{list(first.shape)}, {list(second.shape)} and {list(target.shape)}"
            )
        target = target.flatten().long()
        mask = target != self.ignore_index
        with without_autocast(first.device):
            dtype = torch.promote_types(first.dtype, torch.float32)
            first, second = (logits.flatten(0, -2).to(dtype) for logits in (first, second))
            total = self.base(first, target) + self.base(second, target)
            if self.alpha:
                total = total + self.alpha * symmetric_kl(first.log_softmax(-1), second.log_softmax(-1), mask)
            return total / (mask.sum().clamp_min(1) if num_tokens is None else num_tokens)

    def extra_repr(self) -> str:
        """Return what the printed module says of its settings."""
        return f"alpha={self.alpha}"


def two_passes(
    model: nn.Module, batch: Batch, *, is_concatenated: bool = True, generator: torch.Generator | None = None
) -> tuple[Float[Tensor, "*tokens classes"], Float[Tensor, "*tokens classes"]]:
    """The logits of two passes of a batch, each with experts of its own draw.

    Concatenated they are one call on twice the batch, in which everything but the experts is computed together. With
    gradient checkpointing layers draw again in the backward pass, when this function has returned: then set
    ``num_passes = 2`` on all `StochasticRouter` layers for good, and give no generator.

    Args:
        model: called with the batch; gives logits, or something that has them as ``logits`` or first. Without
            `StochasticRouter` layers dropout alone makes the passes differ, as in R-Drop.
        batch: the model's arguments, by name or in order; tensors with the batch first.
        is_concatenated: whether both passes are one call; two calls take longer, and are for models in which the
            sequences of a batch see each other.
        generator: draws the experts; torch's global one if None.
    """
    has_experts = any(isinstance(module, StochasticRouter) for module in model.modules())
    num_passes = 2 if is_concatenated else 1
    with expert_draws(model, num_passes=num_passes, generator=generator) if has_experts else nullcontext():
        if is_concatenated:
            first, second = logits_of(_call(model, _map(batch, _twice))).chunk(2)
            return first, second
        return logits_of(_call(model, batch)), logits_of(_call(model, batch))


def thor_step(
    model: nn.Module,
    batch: Batch,
    target: Int[Tensor, "*tokens"],
    loss: ConsistencyLoss,
    *,
    is_concatenated: bool = True,
    generator: torch.Generator | None = None,
) -> Float[Tensor, ""]:
    """The loss of a batch that goes through a model twice, for a training loop of one's own.

        thor_step(model, (source, target[:, :-1]), target[:, 1:], ConsistencyLoss(5.0)).backward()

    Args:
        model: see `two_passes`; in training mode.
        batch: see `two_passes`.
        target: classes.
        loss: of both passes.
        is_concatenated: see `two_passes`.
        generator: see `two_passes`.

    Raises:
        ValueError: logits and target that do not fit.
    """
    passes = two_passes(model, batch, is_concatenated=is_concatenated, generator=generator)
    result: Tensor = loss(*passes, target)
    return result


@torch.no_grad()
def expert_agreement(
    model: nn.Module,
    batch: Batch,
    mask: Bool[Tensor, "*tokens"] | None = None,
    *,
    num_draws: int = 10,
    generator: torch.Generator | None = None,
) -> float:
    """Mean symmetric divergence between predictions under different draws of experts, in nats a token; 0 if they agree.

    The model is in evaluation mode for the time, so that nothing but experts differs.

    Args:
        model: has `StochasticRouter` layers, of which one draws in evaluation at least.
        batch: see `two_passes`.
        mask: true where a prediction counts; None where all do.
        num_draws: predictions that are compared, each with each.
        generator: draws the experts; torch's global one if None.

    Raises:
        ValueError: no such layers, none that draws, or fewer than two draws.
    """
    routers = stochastic_routers(model)
    if not any(router.draws_in_evaluation for router in routers):
        found = sorted({_what_works(router) for router in routers})
        raise ValueError(
            f"agreement is between draws, but in every layer what works is fixed: {', '.join(found)}; draw by "
            "router.force(None) and expert_draws(model, level='sentence')"
        )
    if num_draws < 2:
        raise ValueError(f"agreement is between two draws at least, got {num_draws}")
    with evaluating(model), expert_draws(model, generator=generator):
        drawn = [log_probs_of(_call(model, batch)) for _ in range(num_draws)]
    num_tokens = drawn[0][..., 0].numel() if mask is None else int(mask.sum())
    pairs = [symmetric_kl(p, q, mask).item() for p, q in itertools.combinations(drawn, 2)]
    return sum(pairs) / len(pairs) / max(1, num_tokens)


@torch.no_grad()
def ensemble_log_probs(model: nn.Module, batch: Batch) -> Float[Tensor, "*tokens classes"]:
    """``log (1/N sum_e p(. | expert e in every layer))``: what all experts predict together, at N times the cost.

    Args:
        model: has `StochasticRouter` layers with N experts each; it is in evaluation mode for the time.
        batch: see `two_passes`.

    Raises:
        ValueError: no such layers, or layers that differ in the number of their experts.
    """
    sizes = {router.num_experts for router in stochastic_routers(model)}
    if len(sizes) > 1:
        raise ValueError(f"layers must have as many experts each, got layers with {sorted(sizes)}")
    (num_experts,) = sizes
    total: Tensor | None = None
    for expert in range(num_experts):
        with evaluating(model), expert_draws(model, expert=expert):
            log_probs = log_probs_of(_call(model, batch))
        total = log_probs if total is None else torch.logaddexp(total, log_probs)
    assert total is not None
    return total - math.log(num_experts)


def logits_of(output: Any) -> Tensor:
    """What a model predicts, of what it returns: a tensor, or something that has it as ``logits`` or first."""
    found: Tensor
    if isinstance(output, Tensor):
        return output
    found = output.logits if hasattr(output, "logits") else output[0]
    return found


def log_probs_of(output: Any) -> Float[Tensor, "*tokens classes"]:
    """Log-probabilities of what a model returns, in float32 at least."""
    logits = logits_of(output)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _what_works(router: StochasticRouter) -> str:
    if router.expert is None:
        return f"level={router.level!r}"
    return f"expert={router.expert.tolist() if isinstance(router.expert, Tensor) else router.expert}"


def _call(model: nn.Module, batch: Batch) -> Any:
    return model(**batch) if isinstance(batch, Mapping) else model(*batch)


def _map(batch: Batch, change: Callable[[Any], Any]) -> Batch:
    if isinstance(batch, Mapping):
        return {name: change(value) for name, value in batch.items()}
    return [change(value) for value in batch]


def _twice(value: Any) -> Any:
    return torch.cat([value, value]) if isinstance(value, Tensor) and value.dim() else value
