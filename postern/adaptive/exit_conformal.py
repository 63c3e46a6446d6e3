"""Conformal sets whose threshold depends on the exit at which a sample leaves the network.

Paper: Jointly-Learned Exit and Inference for a Dynamic Neural Network (JEI-DNN, arXiv 2310.09163). With one common
threshold it is split conformal prediction with the score ``1 - p_y``.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor


def conformal_quantile(scores: Float[Tensor, " samples"], alpha: float) -> float:
    """The score of rank ``ceil((n + 1) (1 - alpha))``; infinite where there are too few samples for that.

    A new score, exchangeable with these, exceeds it with a probability of at most ``alpha``.

    Args:
        scores: of calibration samples; larger is stranger.
        alpha: between 0 and 1.
    """
    # 1e-9 undoes the rounding of a product that is an integer
    rank = math.ceil((len(scores) + 1) * (1 - alpha) - 1e-9)
    return scores.sort().values[rank - 1].item() if rank <= len(scores) else math.inf


class ExitConformal:
    """Sets of classes that hold the right one with a probability of ``1 - alpha``: ``{c : p_c >= 1 - q_l}``.

    ``q_l`` is the conformal quantile of the scores ``1 - p_y`` of the calibration samples that leave at exit ``l``; of
    all samples' scores at that exit where no more than ``min_samples`` leave there.

    Args:
        alpha: share of samples whose set may miss the right class, between 0 and 1.
        min_samples: an exit with no more samples than this is calibrated on all samples.
        is_per_exit: False for one threshold, from the score of each sample where it leaves.

    Attributes:
        thresholds: ``q_l``, one an exit, after `fit`; infinite where every class is in the set.

    Raises:
        ValueError: an alpha outside (0, 1), or a negative number of samples.
    """

    thresholds: Float[Tensor, " exits"]

    def __init__(self, alpha: float = 0.05, min_samples: int = 20, is_per_exit: bool = True) -> None:
        if not 0 < alpha < 1 or min_samples < 0:
            raise ValueError(f"alpha lies in (0, 1), min_samples is not negative, got {alpha} and {min_samples}")
        self.alpha, self.min_samples, self.is_per_exit = alpha, min_samples, is_per_exit

    def fit(self, scores: Float[Tensor, "samples exits"], exits: Int64[Tensor, " samples"]) -> ExitConformal:
        """Find the thresholds.

        Args:
            scores: ``1 - p_y`` of each sample at each exit, the final head included; see `conformal_scores`.
            exits: where each sample leaves.

        Raises:
            ValueError: sizes that do not match, no samples, or an exit that does not exist.
        """
        if scores.dim() != 2 or exits.shape != scores.shape[:1] or not len(exits):
            raise ValueError(
                f"scores are [samples, exits], one exit a sample, got {list(scores.shape)} and {list(exits.shape)}"
            )
        _check_exits(exits, scores.shape[1])
        own = scores.gather(1, exits[:, None]).squeeze(1)
        if not self.is_per_exit:
            thresholds = [conformal_quantile(own, self.alpha)] * scores.shape[1]
        else:
            thresholds = []
            for exit_index in range(scores.shape[1]):
                here = own[exits == exit_index]
                enough = len(here) > self.min_samples
                thresholds.append(conformal_quantile(here if enough else scores[:, exit_index], self.alpha))
        self.thresholds = torch.tensor(thresholds, dtype=scores.dtype, device=scores.device)
        return self

    def predict_set(
        self, probabilities: Float[Tensor, "samples classes"], exits: Int64[Tensor, " samples"]
    ) -> Bool[Tensor, "samples classes"]:
        """Which classes are in each sample's set.

        Args:
            probabilities: of the exit at which each sample leaves.
            exits: where each sample leaves.

        Raises:
            ValueError: sizes that do not match, an exit that `fit` has not seen, or no `fit` before.
        """
        if not hasattr(self, "thresholds"):
            raise ValueError("fit finds the thresholds that predict_set needs; call it first")
        if probabilities.dim() != 2 or exits.shape != probabilities.shape[:1]:
            raise ValueError(
                "probabilities are [samples, classes], one exit a sample, got "
                f"{list(probabilities.shape)} and {list(exits.shape)}"
            )
        _check_exits(exits, len(self.thresholds))
        # the score of each class, compared as it was in fit: p >= 1 - q would round differently
        return 1 - probabilities <= self.thresholds[exits][:, None]


def conformal_scores(
    probabilities: Float[Tensor, "*batch classes"], labels: Int64[Tensor, "*batch"]
) -> Float[Tensor, "*batch"]:
    """``1 - p_y``, the score of `ExitConformal`.

    Args:
        probabilities: of the classes.
        labels: the right classes.
    """
    return 1 - probabilities.gather(-1, labels[..., None]).squeeze(-1)


def _check_exits(exits: Tensor, num_exits: int) -> None:
    if len(exits) and (int(exits.min()) < 0 or int(exits.max()) >= num_exits):
        raise ValueError(f"exits lie in 0..{num_exits - 1}, got {int(exits.min())}..{int(exits.max())}")
