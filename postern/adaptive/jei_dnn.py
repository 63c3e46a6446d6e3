"""JEI-DNN: gates and classifiers of a network's exits learnt together, on a frozen backbone.

    min  E  sum_l P(exit = l | x) [ CE(f_l(x), y) + lambda c_l ]

The gates learn to point at the exit with the least loss and cost; each classifier learns from a sample by as much as
the gates send it there. Both are trained by turns.

Paper: Jointly-Learned Exit and Inference for a Dynamic Neural Network (JEI-DNN, arXiv 2310.09163). In the released code
the factor that restores the scale of the classifiers' loss is not detached, and cancels the weights; see `im_loss`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from postern.adaptive.early_exit import EarlyExitModel
from postern.adaptive.exit_features import ExitFeatures
from postern.adaptive.exit_gates import GateExit, exit_probabilities

ExitLoss = Literal["cross_entropy", "error", "confidence"]
MAX_POSITIVE_WEIGHT = 5.0
_LAST_RATE = 0.02  # of the first one


def exit_losses(
    logits: Sequence[Float[Tensor, "batch classes"]],
    labels: Int64[Tensor, " batch"],
    kind: ExitLoss = "cross_entropy",
) -> Float[Tensor, "batch exits"]:
    """The loss of each sample at each exit, in nats or in its own unit.

    Args:
        logits: of each exit.
        labels: the right classes.
        kind: "cross_entropy"; "error", 0 where the prediction is right and 1 where not; "confidence", minus the largest
            probability where the prediction is right and 0 where not.

    Raises:
        ValueError: an unknown kind.
    """
    if kind not in get_args(ExitLoss):
        raise ValueError(f"kind is one of {get_args(ExitLoss)}, got {kind!r}")
    if kind == "cross_entropy":
        losses = [F.cross_entropy(each, labels, reduction="none") for each in logits]
    else:
        right = [(each.argmax(1) == labels).to(each.dtype) for each in logits]
        if kind == "error":
            losses = [1 - each for each in right]
        else:
            losses = [-each.softmax(1).amax(1) * hit for each, hit in zip(logits, right, strict=True)]
    return torch.stack(losses, dim=1)


def gate_targets(
    losses: Float[Tensor, "batch exits"], cost: Float[Tensor, " exits"], lam: float
) -> tuple[Float[Tensor, "batch gates"], Int64[Tensor, " batch"]]:
    """What each gate should say: stop, from the exit with the least ``loss_l + lam c_l`` onwards.

        e* = argmin_{l=1..L} (loss_l + lam c_l),      t_l = 1 if l >= e* else 0,  for l < L

    Args:
        losses: of each sample at each exit, the final head last.
        cost: of each exit, as a share of the full cost.
        lam: the price of the full cost, in the unit of the losses.

    Returns:
        The targets, one column less than there are exits, all 0 where the final head is best; and ``e*``, from 0.

    Raises:
        ValueError: other numbers of costs than of exits, or less than two.
    """
    if losses.dim() != 2 or losses.shape[1] < 2 or cost.shape != losses.shape[1:]:
        raise ValueError(
            f"two or more exits have a loss for each sample and a cost, got {list(losses.shape)} and {list(cost.shape)}"
        )
    best = (losses + lam * cost.to(losses)).argmin(1)
    gates = torch.arange(losses.shape[1] - 1, device=losses.device)
    return (gates >= best[:, None]).to(losses.dtype), best


def positive_weights(best: Int64[Tensor, " samples"], num_gates: int) -> Float[Tensor, " gates"]:
    """Weights of the targets 1: ``min(5, (n - n_l) / max(n_l, 0.1))``, if ``n_l`` samples are best off at exit ``l``.

    Args:
        best: ``e*`` of validation samples, as `gate_targets` finds it.
        num_gates: number of exits without the final head.
    """
    counts = torch.bincount(best, minlength=num_gates)[:num_gates].float()
    return ((len(best) - counts) / counts.clamp_min(0.1)).clamp_max(MAX_POSITIVE_WEIGHT)


def gate_loss(
    log_odds: Float[Tensor, "batch gates"],
    targets: Float[Tensor, "batch gates"],
    positive_weight: Float[Tensor, " gates"] | None = None,
) -> Float[Tensor, ""]:
    """Binary cross entropy of the gates, the mean over samples and gates; targets 1 weigh ``positive_weight``.

    Args:
        log_odds: of the gates.
        targets: see `gate_targets`.
        positive_weight: see `positive_weights`; 1 if None.
    """
    return F.binary_cross_entropy_with_logits(log_odds, targets.to(log_odds), pos_weight=positive_weight)


def im_loss(
    losses: Float[Tensor, "batch gates"], p_exit: Float[Tensor, "batch gates"], ratio_grad: bool = False
) -> Float[Tensor, ""]:
    """Loss of the inference modules, weighted by the probability of leaving there and brought back to its old scale.

        mean_{samples, l} (w_l CE_l ratio),      ratio = sum_l CE_l / (sum_l w_l CE_l + 1e-8)

    If the ratio is differentiated, as the released code does, the weights cancel: the loss is the plain mean of
    ``CE_l`` and so is its gradient. Detached, which is the method described, the value is the same and the gradient
    weighted.

    Args:
        losses: cross entropy of each sample at each exit but the final head.
        p_exit: probability of leaving there; not differentiated.
        ratio_grad: whether to differentiate the ratio.
    """
    weighted = p_exit.detach() * losses
    ratio = losses.sum(1, keepdim=True) / (weighted.sum(1, keepdim=True) + 1e-8)
    return (weighted * (ratio if ratio_grad else ratio.detach())).mean()


class JEIDNNTrainer:
    """Trains the exits of a model with a frozen backbone, and the gates before them, on cached features.

    First `warm_up` trains the classifiers alone, then `fit` trains gates and classifiers by turns, both by stochastic
    gradient descent with momentum. In `warm_up` the rate stays at ``head_lr``. In each call of `fit` the rates of gates
    and classifiers fall together, batch by batch, from ``gate_lr`` and ``head_lr`` to a fiftieth of them along half a
    period of a cosine. The trained gates are ``policy``.

    Args:
        model: its classifiers are trained, in place.
        lam: the price of the full cost; the larger, the earlier samples leave.
        cost: of each exit and the final head, in any unit; see `exit_costs`.
        phase_batches: batches in a turn; the gates have the first.
        ratio_grad: differentiate the ratio in `im_loss`, as the released code does.
        gates_are_independent: take the gates for independent; see `exit_probabilities`. Not the paper's method.
        target: the loss by which gates are taught; see `exit_losses`.
        trains_heads: False to leave the classifiers as they are in their turns, which trains the gates alone, as often.
        gate_lr: learning rate of the gates at the start of `fit`.
        head_lr: learning rate of the classifiers in `warm_up`, and at the start of `fit`.
        momentum: of both.
        weight_decay: of both.
        batch_size: samples in a batch.
        generator: of the order of the samples; the global one if None.

    Raises:
        ValueError: other numbers of costs than of exits, costs that do not rise, sizes below 1, or a negative price.
    """

    def __init__(
        self,
        model: EarlyExitModel,
        lam: float,
        cost: Float[Tensor, " exits"],
        *,
        phase_batches: int = 200,
        ratio_grad: bool = False,
        gates_are_independent: bool = False,
        target: ExitLoss = "cross_entropy",
        trains_heads: bool = True,
        gate_lr: float = 0.01,
        head_lr: float = 0.01,
        momentum: float = 0.9,
        weight_decay: float = 5e-4,
        batch_size: int = 64,
        generator: torch.Generator | None = None,
    ) -> None:
        if cost.shape != (model.num_exits + 1,) or not (cost.diff() > 0).all() or cost[0] < 0:
            raise ValueError(f"{model.num_exits} exits and the final head have rising costs, got {cost.tolist()}")
        if phase_batches < 1 or batch_size < 1 or not 0 <= lam < math.inf:
            raise ValueError(
                "phase_batches and batch_size are positive, lam is not negative, got "
                f"phase_batches={phase_batches}, batch_size={batch_size}, lam={lam}"
            )
        if target not in get_args(ExitLoss):
            raise ValueError(f"target is one of {get_args(ExitLoss)}, got {target!r}")
        self.model, self.lam, self.phase_batches, self.ratio_grad = model, lam, phase_batches, ratio_grad
        self.target, self.trains_heads, self.batch_size, self.generator = target, trains_heads, batch_size, generator
        self.gate_lr, self.head_lr, self.momentum, self.weight_decay = gate_lr, head_lr, momentum, weight_decay
        device = next(model.heads.parameters()).device
        self.cost = (cost / cost[-1]).to(device, torch.float32)
        self.policy = GateExit(model.num_exits, is_independent=gates_are_independent).to(device)

    def warm_up(self, train: ExitFeatures, validation: ExitFeatures, epochs: int = 6, patience: int = 2) -> list[float]:
        """Train the classifiers alone, the earlier ones with larger weights: ``sum_l (G + 2 - l) CE_l``, l from 1 to G.

        A classifier whose validation loss has not improved for ``patience`` epochs gets its best parameters back and
        is left alone; at the end all have their best.

        Args:
            train: samples to learn from.
            validation: other samples, to stop by.
            epochs: passes over the training samples at most.
            patience: epochs without improvement after which a classifier is done.

        Returns:
            The lowest validation cross entropy of each classifier.
        """
        heads = [head for head in self.model.heads if isinstance(head, nn.Linear)]
        best = [math.inf] * len(heads)
        kept = [{name: value.clone() for name, value in head.state_dict().items()} for head in heads]
        waited = [0] * len(heads)
        optimizers = [self._optimizer(head, self.head_lr) for head in heads]
        for _ in range(epochs):
            open_heads = [index for index in range(len(heads)) if waited[index] < patience]
            if not open_heads:
                break
            for batch in self._batches(train):
                losses = [
                    (len(heads) + 1 - index) * F.cross_entropy(heads[index](batch.features[index]), batch.labels)
                    for index in open_heads
                ]
                _step(torch.stack(losses).sum(), [optimizers[index] for index in open_heads])
            with torch.no_grad():
                for index in open_heads:
                    found = F.cross_entropy(heads[index](validation.features[index]), validation.labels).item()
                    waited[index] = 0 if found < best[index] else waited[index] + 1
                    if found < best[index]:
                        best[index] = found
                        kept[index] = {name: value.clone() for name, value in heads[index].state_dict().items()}
        for head, state in zip(heads, kept, strict=True):
            head.load_state_dict(state)
        return best

    def fit(self, train: ExitFeatures, validation: ExitFeatures, epochs: int = 10) -> GateExit:
        """Train gates and classifiers by turns.

        Args:
            train: samples to learn from.
            validation: other samples, by which the gates' targets are weighted anew after every epoch.
            epochs: passes over the training samples.

        Returns:
            The gates, which are ``policy`` too.
        """
        gates, heads = self._optimizer(self.policy, self.gate_lr), self._optimizer(self.model.heads, self.head_lr)
        steps = max(1, epochs * math.ceil(len(train) / self.batch_size))
        weight = torch.ones(self.model.num_exits, device=self.cost.device)
        done = 0
        for _ in range(epochs):
            for batch in self._batches(train):
                # The rates follow the whole training, whoever's turn it is.
                share = _LAST_RATE + (1 - _LAST_RATE) * (1 + math.cos(math.pi * done / steps)) / 2
                gates.param_groups[0]["lr"], heads.param_groups[0]["lr"] = share * self.gate_lr, share * self.head_lr
                is_gates_turn = (done // self.phase_batches) % 2 == 0
                if is_gates_turn:
                    _step(self.gate_step_loss(batch, weight), [gates])
                elif self.trains_heads:
                    _step(self.head_step_loss(batch), [heads])
                done += 1
            weight = self.validated_weights(validation)
        return self.policy

    def gate_step_loss(self, batch: ExitFeatures, positive_weight: Float[Tensor, " gates"]) -> Float[Tensor, ""]:
        """Loss of the gates on a batch; the classifiers get no gradient.

        Args:
            batch: samples.
            positive_weight: see `positive_weights`.
        """
        with torch.no_grad():
            logits = batch.all_logits(self.model)
            targets, _ = gate_targets(exit_losses(logits, batch.labels, self.target), self.cost, self.lam)
        return gate_loss(self.policy(logits), targets, positive_weight)

    def head_step_loss(self, batch: ExitFeatures) -> Float[Tensor, ""]:
        """Loss of the classifiers on a batch; the gates get no gradient.

        Args:
            batch: samples.
        """
        logits = self.model.exit_logits(batch.features)
        with torch.no_grad():
            g = torch.sigmoid(self.policy(logits))
            p_exit, _ = exit_probabilities(g, is_independent=self.policy.is_independent)
        return im_loss(exit_losses(logits, batch.labels), p_exit[:, :-1], self.ratio_grad)

    @torch.no_grad()
    def validated_weights(self, validation: ExitFeatures) -> Float[Tensor, " gates"]:
        """Weights of the gates' targets 1, from where validation samples are best off; see `positive_weights`.

        Args:
            validation: samples that nothing is trained on.
        """
        losses = exit_losses(validation.all_logits(self.model), validation.labels, self.target)
        return positive_weights(gate_targets(losses, self.cost, self.lam)[1], self.model.num_exits)

    def _optimizer(self, module: nn.Module, rate: float) -> torch.optim.SGD:
        return torch.optim.SGD(module.parameters(), rate, self.momentum, weight_decay=self.weight_decay)

    def _batches(self, samples: ExitFeatures) -> Iterator[ExitFeatures]:
        order = torch.randperm(len(samples), generator=self.generator).to(samples.labels.device)
        for batch in torch.split(order, self.batch_size):
            yield samples.rows(batch)


def _step(loss: Tensor, optimizers: Sequence[torch.optim.Optimizer]) -> None:
    for optimizer in optimizers:
        optimizer.zero_grad()
    torch.autograd.backward(loss)
    for optimizer in optimizers:
        optimizer.step()
