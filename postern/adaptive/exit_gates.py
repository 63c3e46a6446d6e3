"""Learnt gates that decide from the uncertainty of an exit's prediction whether to stop.

Paper: Jointly-Learned Exit and Inference for a Dynamic Neural Network (JEI-DNN, arXiv 2310.09163).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

NUM_UNCERTAINTY_FEATURES = 4


def uncertainty_features(logits: Float[Tensor, "*batch classes"]) -> Float[Tensor, "*batch 4"]:
    """Four statistics of the softmax ``p``, which a gate decides by.

    ``max_c p_c``; the entropy ``-sum_c p_c log p_c`` in nats; the margin ``p_(1) - p_(2)``; and the entropy of
    ``p^2 / sum(p^2)``. Computed in float32 at least.

    Args:
        logits: of an exit; two classes at least.

    Raises:
        ValueError: a single class.
    """
    if logits.shape[-1] < 2:
        raise ValueError(f"uncertainty needs two classes at least, got {logits.shape[-1]}")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_p = torch.stack([logits, 2 * logits]).log_softmax(-1)  # twice the logits give p^2 / sum(p^2)
    p = log_p.exp()
    first, second = p[0].topk(2, dim=-1).values.unbind(-1)
    entropy, sharpened = (p * log_p).sum(-1).neg().unbind()
    return torch.stack([first, entropy, first - second, sharpened], dim=-1)


def gate_operations(num_classes: int) -> int:
    """Operations of a gate and its statistics for one sample, ``9 C + 6`` as the paper's code counts them.

    Args:
        num_classes: number of logits, ``C``.
    """
    return 9 * num_classes + 6


class ExitGate(nn.Module):
    """``w . u(logits) + b``: the log-odds of stopping, one linear layer over `uncertainty_features`.

    The statistics are detached, so that a gate never shapes the classifier that it watches.
    """

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(NUM_UNCERTAINTY_FEATURES, 1)

    def forward(self, logits: Float[Tensor, "*batch classes"]) -> Float[Tensor, "*batch 1"]:
        """Return the log-odds.

        Args:
            logits: of the exit.
        """
        log_odds: Tensor = self.linear(uncertainty_features(logits.detach()))
        return log_odds


def exit_probabilities(
    g: Float[Tensor, "batch gates"], *, is_independent: bool = False
) -> tuple[Float[Tensor, "batch gates+1"], Float[Tensor, "batch gates"]]:
    """The probability of leaving at each exit, and that of stopping once there.

        P(exit = l) = max(0, min(g_l, 1 - sum_{j<l} g_j)),      P(exit = L) = 1 - sum_l P(exit = l)
        a_l = P(exit = l) / prod_{j<l} (1 - a_j)

    The product telescopes to ``1 - sum_{j<l} P(exit = j)``. Where it is 0 everything has left and ``a_l`` is 1. These
    are not independent gates, ``P(exit = l) = g_l prod_{j<l} (1 - g_j)`` and ``a_l = g_l``, which give other exits.

    Args:
        g: the gates' outputs in [0, 1].
        is_independent: take the gates for independent, which the paper does not.

    Returns:
        ``P`` with a column for the final head, whose rows have the sum 1; and ``a``, in [0, 1].
    """
    left = (1 - g).cumprod(1) if is_independent else 1 - g.cumsum(1).clamp_max(1)
    left = nn.functional.pad(left, (1, 0), value=1.0)
    p_exit = left[:, :-1] - left[:, 1:]
    a = g if is_independent else torch.where(left[:, :-1] > 0, p_exit / left[:, :-1], 1.0)
    return torch.cat([p_exit, left[:, -1:]], dim=1), a


def exit_decision(a: Float[Tensor, "batch gates"], threshold: float = 0.5) -> Int64[Tensor, " batch"]:
    """The first exit with ``a_l >= threshold``; the number of gates, for the final head, where there is none.

    Args:
        a: of `exit_probabilities`.
        threshold: between 0 and 1.
    """
    stops = nn.functional.pad(a >= threshold, (0, 1), value=True)
    return stops.int().argmax(1)


class GateExit(nn.Module):
    """The test rule of JEI-DNN as an exit policy: stop at the first exit with ``a_l >= threshold``.

    Its ``forward`` gives the log-odds of all gates at once, for training.

    Args:
        num_gates: one for each exit but the final head.
        threshold: of the probability of stopping once there, between 0 and 1.
        is_independent: take the gates for independent, so that ``a_l`` is the gate's output; see `exit_probabilities`.

    Raises:
        ValueError: no gates, or a threshold outside (0, 1].
    """

    def __init__(self, num_gates: int, threshold: float = 0.5, *, is_independent: bool = False) -> None:
        super().__init__()
        if num_gates < 1:
            raise ValueError(f"there is at least one gate, got num_gates={num_gates}")
        if not 0 < threshold <= 1:
            raise ValueError(f"threshold is a probability above 0, got {threshold}")
        self.threshold, self.is_independent = threshold, is_independent
        self.gates = nn.ModuleList(ExitGate() for _ in range(num_gates))

    def forward(self, logits: Sequence[Float[Tensor, "batch classes"]]) -> Float[Tensor, "batch gates"]:
        """Return the log-odds of each gate.

        Args:
            logits: of each exit; those of the final head may follow.
        """
        return torch.cat([gate(each) for gate, each in zip(self.gates, logits, strict=False)], dim=1)

    def decide(
        self, logits: Float[Tensor, "batch classes"], index: int, state: Float[Tensor, " batch"] | None
    ) -> tuple[Bool[Tensor, " batch"], Float[Tensor, " batch"]]:
        """Decide for the samples that have come as far as an exit; see `ExitPolicy`.

        The state is what the gates so far have left of a probability of 1: ``r_l = max(r_{l-1} - g_l, 0)``, from 1 on;
        independent gates look at nothing but their own output.
        """
        g = torch.sigmoid(self.gates[index](logits)).squeeze(1)
        # a_l = min(g_l, r) / r, which reaches a threshold of at most 1 where g_l does that of r; r = 0 stops
        if state is None or self.is_independent:
            return g >= self.threshold, 1 - g
        return g >= self.threshold * state, (state - g).clamp_min(0)
