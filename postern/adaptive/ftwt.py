"""Fire Together Wire Together: train a network with dynamic filters, and the heads that choose them, side by side.

    L = CE(y, f(x)) + w(t) (1/L) sum_l sum_c mean_batch BCE(logits_{l,c}, target_{l,c})

with ``w = 1`` at first and 0 once the heads are left alone, while the network goes on adapting to their masks.

Paper: Fire Together Wire Together (FTWT, arXiv 2110.08232).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F

from postern.adaptive.dynamic_conv import BlockReport
from postern.adaptive.dynamic_network import DynamicNetwork
from postern.nets import evaluating

PredictorTarget = Literal["filters", "ones"]
Schedule = Callable[[torch.optim.Optimizer, int], torch.optim.lr_scheduler.LRScheduler]


def mask_loss(reports: Sequence[BlockReport]) -> Float[Tensor, ""]:
    """``(1/L) sum_l sum_c mean_batch BCE(logits, target)``: the mean over layers of the sum over filters.

    Args:
        reports: of the dynamic blocks.

    Raises:
        ValueError: no reports.
    """
    if not reports:
        raise ValueError("the loss is over at least one block, got none")
    losses = [
        F.binary_cross_entropy_with_logits(each.logits, each.target.to(each.logits), reduction="none").mean(0).sum()
        for each in reports
    ]
    return torch.stack(losses).mean()


def milestone_schedule(
    optimizer: torch.optim.Optimizer, steps: int, milestones: Sequence[float] = (0.405, 0.61, 0.755)
) -> torch.optim.lr_scheduler.LRScheduler:
    """A rate that falls tenfold at each milestone; by default after 81, 122 and 151 of 200 epochs, as in the paper.

    Args:
        optimizer: whose rates fall.
        steps: of the whole training.
        milestones: shares of the steps.

    Raises:
        ValueError: a milestone outside [0, 1].
    """
    if not all(0 <= share <= 1 for share in milestones):
        raise ValueError(f"milestones are shares of the training, between 0 and 1, got {list(milestones)}")
    return torch.optim.lr_scheduler.MultiStepLR(optimizer, [round(share * steps) for share in milestones])


class FTWTTrainer:
    """Trains a dynamic network from a trained dense one.

    Two optimisers, both stochastic gradient descent with momentum 0.9: the backbone's rate follows a schedule and has
    weight decay, the predictors' rate is constant without.

    Args:
        model: trained in place, in masked execution.
        epochs: passes over the training samples.
        backbone_lr: initial learning rate of all but the predictors.
        predictor_lr: learning rate of the predictors.
        weight_decay: of the backbone.
        schedule: makes, in each call of `fit`, what changes the backbone's rate after every step, from its optimiser
            and the number of steps: one of PyTorch's schedulers.
        cooldown: share of the epochs, the last ones, in which the predictors are left alone.
        batch_size: samples in a batch.
        augment: changes a batch of inputs before each use; none if None.
        generator: of the order of the samples; the global one if None.

    Raises:
        ValueError: sizes below 1, or a cooldown outside [0, 1].
    """

    def __init__(
        self,
        model: DynamicNetwork,
        epochs: int = 200,
        *,
        backbone_lr: float = 1e-2,
        predictor_lr: float = 0.1,
        weight_decay: float = 5e-4,
        schedule: Schedule = milestone_schedule,
        cooldown: float = 0.5,
        batch_size: int = 128,
        augment: Callable[[Tensor], Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if epochs < 1 or batch_size < 1 or not 0 <= cooldown <= 1:
            raise ValueError(
                "epochs and batch_size are positive, cooldown is a share of the epochs, between 0 and 1, got "
                f"epochs={epochs}, batch_size={batch_size}, cooldown={cooldown}"
            )
        self.model, self.epochs, self.batch_size = model, epochs, batch_size
        self.schedule, self.cooldown = schedule, cooldown
        self.augment, self.generator = augment, generator
        self.backbone_lr = backbone_lr
        self.backbone = torch.optim.SGD(model.backbone_parameters(), backbone_lr, 0.9, weight_decay=weight_decay)
        self.predictors = torch.optim.SGD(model.predictors.parameters(), predictor_lr, 0.9)

    def pretrain_predictors(
        self,
        inputs: Float[Tensor, "samples channels height width"],
        *,
        epochs: int = 1,
        target: PredictorTarget = "filters",
        learning_rate: float = 0.01,
    ) -> float:
        """Train the predictors alone, with Adam, on the unpruned network; it is left as it is.

        Short trainings need it: masks of untrained predictors can ruin a network.

        Args:
            inputs: training samples.
            epochs: passes over them.
            target: "filters" for the most active ones, "ones" to keep every filter at first, as the paper's code can.
            learning_rate: of Adam.

        Returns:
            The loss of the last batch.

        Raises:
            ValueError: an unknown target.
        """
        if target not in get_args(PredictorTarget):
            raise ValueError(f"target is one of {get_args(PredictorTarget)}, got {target!r}")
        optimizer = torch.optim.Adam(self.model.predictors.parameters(), learning_rate)
        loss = torch.zeros(())
        self.model.set_execution("unpruned")
        with evaluating(self.model):
            for _ in range(epochs):
                for rows in self._batches(len(inputs), inputs.device):
                    _, reports = self.model.with_reports(inputs[rows])
                    if target == "ones":
                        reports = tuple(each._replace(target=torch.ones_like(each.target)) for each in reports)
                    loss = mask_loss(reports)
                    optimizer.zero_grad()
                    torch.autograd.backward(loss)
                    optimizer.step()
        self.backbone.zero_grad()
        self.model.set_execution("masked")
        return loss.item()

    def fit(
        self, inputs: Float[Tensor, "samples channels height width"], labels: Int64[Tensor, " samples"]
    ) -> list[tuple[float, float]]:
        """Train backbone and predictors.

        Args:
            inputs: training samples.
            labels: their classes.

        Returns:
            Mean cross entropy and mean loss of the masks in each epoch.

        Raises:
            FloatingPointError: the loss is no number any more.
            ValueError: other numbers of labels than of samples.
        """
        if len(inputs) != len(labels) or not len(labels):
            raise ValueError(f"each sample has a label, got {len(inputs)} samples and {len(labels)} labels")
        self.model.set_execution("masked").train()
        # The scheduler of an earlier call may have left another rate.
        self.backbone.param_groups[0]["lr"] = self.backbone_lr
        schedule = self.schedule(self.backbone, self.epochs * math.ceil(len(labels) / self.batch_size))
        history = []
        for epoch in range(self.epochs):
            is_cooling = epoch >= (1 - self.cooldown) * self.epochs
            sums, batches = torch.zeros(2), 0
            for rows in self._batches(len(inputs), inputs.device):
                batch = inputs[rows] if self.augment is None else self.augment(inputs[rows])
                output, reports = self.model.with_reports(batch)
                task, masks = F.cross_entropy(output, labels[rows]), mask_loss(reports)
                self.backbone.zero_grad()
                self.predictors.zero_grad()
                torch.autograd.backward(task if is_cooling else task + masks)
                self.backbone.step()
                schedule.step()
                if not is_cooling:
                    self.predictors.step()
                sums, batches = sums + torch.stack([task, masks]).detach().cpu(), batches + 1
            task_mean, mask_mean = (sums / batches).tolist()
            if not math.isfinite(task_mean):
                raise FloatingPointError(
                    f"training diverged in epoch {epoch}: the cross entropy is {task_mean}. Lower backbone_lr, which "
                    f"is {self.backbone_lr:g}, or call pretrain_predictors first"
                )
            history.append((task_mean, mask_mean))
        self.model.eval()
        return history

    def _batches(self, samples: int, device: torch.device) -> Iterator[Tensor]:
        yield from torch.split(torch.randperm(samples, generator=self.generator).to(device), self.batch_size)
