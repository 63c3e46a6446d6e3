"""The Z-loss: how many standard deviations the true class's score lies above the mean of all scores.

Shifting or scaling all scores of a row changes nothing, and the loss belongs to the spherical family: with
`postern.heads.FactoredSphericalHead` an output layer is trained by it at a cost that does not depend on the number of
classes. The scores rank the classes; they are no logarithms of probabilities, so there is no perplexity.

Paper: "The Z-loss: a shift and scale invariant classification loss belonging to the Spherical Family" (arXiv
1604.08859). It has nothing to do with the "z-loss" of later language models, which adds ``1e-4 log^2 Z`` to the
cross-entropy to keep the normaliser ``Z`` near one.

The official code adds epsilon to the standard deviation; here it goes below the root, squared, where it does the same
and leaves a finite gradient if all scores are equal.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from postern.heads.spherical import Reduction, SphericalHead, SphericalLoss


def z_loss(
    scores: Float[Tensor, "*batch classes"],
    target: Int[Tensor, "*batch"],
    a: float = 1.0,
    b: float = 0.0,
    epsilon: float = 1e-12,
    reduction: Reduction = "mean",
) -> Float[Tensor, "*reduced"]:
    """Return ``1/a log(1 + exp(a (b - z_c)))`` with ``z_c = (o_c - mean(o)) / std(o)``, the z-score of the true class.

    The mean and the (population) standard deviation are over the D classes. The gradient with respect to the scores,
    ``-sigmoid(a (b - z_c)) / std * (e_c - 1/D - z_c (o - mean) / (D std))``, sums to zero and is orthogonal to them.

    Args:
        scores: one score a class; less than float32 is computed with in float32.
        target: indices of the true classes.
        a: sharpness, positive. The larger, the less an example counts whose z-score is above b.
        b: the z-score to reach. D scores have z-scores of at most sqrt(D - 1); useful are 3 to 30, to be tuned with a.
        epsilon: keeps the standard deviation from zero.
        reduction: "mean" over the examples, "sum", or "none".

    Raises:
        ValueError: an ``a`` or epsilon that is not positive, or see `SphericalLoss.forward`.
    """
    loss: Tensor = ZLoss(a, b, epsilon, reduction)(scores, target)
    return loss


class ZLoss(SphericalLoss):
    """`z_loss` as a module, and over statistics: ``std^2 = q/D - (s/D)^2``.

    Args:
        a: sharpness, positive.
        b: the z-score to reach.
        epsilon: keeps the standard deviation from zero.
        reduction: "mean" over the examples, "sum", or "none".

    Raises:
        ValueError: an ``a`` or epsilon that is not positive, a ``b`` that is not finite, or an unknown reduction.
    """

    is_shift_invariant = True

    def __init__(self, a: float = 1.0, b: float = 0.0, epsilon: float = 1e-12, reduction: Reduction = "mean") -> None:
        super().__init__(reduction)
        if not 0 < a < float("inf") or not abs(b) < float("inf"):
            raise ValueError(f"a must be positive and finite and b finite, got a={a} and b={b}")
        if not epsilon > 0:
            raise ValueError(f"epsilon must be positive, got {epsilon}")
        self.a = a
        self.b = b
        self.epsilon = epsilon

    def from_statistics(
        self,
        total: Float[Tensor, "*batch"],
        square_total: Float[Tensor, "*batch"],
        target_score: Float[Tensor, "*batch"],
        num_classes: int,
    ) -> Float[Tensor, "*batch"]:
        """Return one loss an example; see `SphericalLoss.from_statistics`."""
        mean = total / num_classes
        variance = (square_total / num_classes - mean.square()).clamp_min(0)
        z = (target_score - mean) / torch.sqrt(variance + self.epsilon**2)
        return -nn.functional.logsigmoid(self.a * (z - self.b)) / self.a


class ZLossHead(SphericalHead):
    """Linear scores ``W h + b`` with the Z-loss, every score computed.

    Args:
        in_features: width of the hidden vectors.
        num_classes: number of classes, at least 2.
        bias: whether there is a bias.
        a: sharpness, positive.
        b: the z-score to reach.

    Raises:
        ValueError: sizes that make no classifier, or an ``a`` or ``b`` that `ZLoss` refuses.
    """

    def __init__(self, in_features: int, num_classes: int, bias: bool = True, a: float = 1.0, b: float = 0.0) -> None:
        super().__init__(in_features, num_classes, ZLoss(a, b), bias)
