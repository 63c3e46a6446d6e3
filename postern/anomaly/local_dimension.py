"""Detect adversarial inputs by the local intrinsic dimensionality of a network's features.

Paper: Characterizing Adversarial Subspaces Using Local Intrinsic Dimensionality (arXiv 1801.02613).

Difference: neighbours are looked for among training inputs drawn once, so that an input can be judged by itself. The
paper's code looks among the clean inputs of the minibatch that the adversarial ones were made from, which no one has
who meets an adversarial input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Float
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from postern.anomaly.detector import OutlierDetector
from postern.anomaly.ensemble import LayerEnsemble, Quality, choose_ensemble
from postern.anomaly.taps import FeatureTaps, Pool, spatial_mean
from postern.nets.evaluation import evaluating

NEIGHBOURS = (10, 20, 30, 40, 50, 60, 70, 80, 90)
"""Numbers of neighbours that the comparison tries, among 100 reference inputs."""


def local_intrinsic_dimension(
    points: Float[Tensor, "points features"],
    reference: Float[Tensor, "references features"],
    num_neighbors: int,
    is_in_reference: bool = False,
) -> Float[Tensor, " points"]:
    r"""Maximum-likelihood estimate ``-k / sum_{i <= k} log(r_i / r_k)`` from the ``k`` nearest distances ``r_i``.

    Args:
        points: where to estimate.
        reference: samples of the data.
        num_neighbors: ``k``, at least 2.
        is_in_reference: whether the points are among the reference, so that the nearest one, the point itself, is left
            out.

    Raises:
        ValueError: fewer reference samples than neighbours, or fewer than two neighbours.
    """
    return _dimensions(points, reference, [num_neighbors], is_in_reference)[0]


def _dimensions(
    points: Tensor, reference: Tensor, neighbors: Sequence[int], is_in_reference: bool
) -> list[Float[Tensor, " points"]]:
    """Estimates for several numbers of neighbours from distances sorted once."""
    skipped = int(is_in_reference)
    if not len(neighbors) or min(neighbors) < 2 or max(neighbors) + skipped > len(reference):
        raise ValueError(
            f"numbers of neighbours lie between 2 and the {len(reference) - skipped} other reference samples, "
            f"got {list(neighbors)}"
        )
    distances = torch.cdist(points.double(), reference.double(), compute_mode="donot_use_mm_for_euclid_dist")
    nearest = distances.topk(max(neighbors) + skipped, dim=1, largest=False).values[:, skipped:]
    # a copy of a reference sample, at distance 0, counts as very near; k equal distances as a very high dimension
    tiny = torch.finfo(torch.float64).tiny
    logarithms = nearest.clamp_min(tiny).log()
    estimates = []
    for k in neighbors:
        spread = (logarithms[:, k - 1 : k] - logarithms[:, :k]).sum(dim=1)
        estimates.append(k / spread.clamp_min(torch.finfo(torch.float64).eps))
    return estimates


class LocalIntrinsicDimensionality(OutlierDetector):
    """Local intrinsic dimensionality at several layers, combined by a logistic regression.

    Adversarial inputs lie off the data, where distances to it are alike, so that the dimensionality looks high.

    Args:
        model: a trained classifier.
        layers: names of the submodules whose features are used.
        num_neighbors: nearest reference inputs that count.
        num_references: training inputs to look for neighbours among.
        pool: makes one vector of a layer's output; the mean over space by default.
        batch_size: inputs in one pass.
        random_state: seed for the draw of the reference inputs.

    Attributes:
        references_: the reference inputs' features, one matrix a layer.
        ensemble_: the `LayerEnsemble`, None before `tune`.
        num_neighbors_: the number in use: ``num_neighbors``, or what `tune` chose.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str],
        num_neighbors: int = 20,
        num_references: int = 100,
        pool: Pool = spatial_mean,
        batch_size: int = 256,
        random_state: int = 0,
    ) -> None:
        self.model = model
        self.layers = layers
        self.num_neighbors = num_neighbors
        self.num_references = num_references
        self.pool = pool
        self.batch_size = batch_size
        self.random_state = random_state

    def fit(self, inputs: Tensor, labels: Any = None) -> Self:
        """Draw the reference inputs.

        Args:
            inputs: in-distribution inputs, e.g. the network's training set.
            labels: not used.

        Raises:
            ValueError: fewer inputs than references, or fewer references than neighbours.
        """
        if len(inputs) < self.num_references:
            raise ValueError(f"{self.num_references} references need as many inputs, got {len(inputs)}")
        if not 2 <= self.num_neighbors <= self.num_references:
            raise ValueError(
                f"num_neighbors lies between 2 and the {self.num_references} references, got {self.num_neighbors}"
            )
        drawn = np.random.default_rng(self.random_state).choice(len(inputs), self.num_references, replace=False)
        self.references_ = self._features(inputs[torch.from_numpy(drawn)])
        self.ensemble_: LayerEnsemble | None = None
        self.num_neighbors_ = int(self.num_neighbors)
        return self

    def layer_scores(self, inputs: Tensor) -> Float[np.ndarray, "batch layers"]:
        """Negative local intrinsic dimensionality at each layer; higher is more normal."""
        check_is_fitted(self, "references_")
        return self._scores_at(inputs, [self.num_neighbors_])[0]

    def tune(
        self,
        inside: Tensor,
        outside: Tensor,
        neighbors: Sequence[int] = NEIGHBOURS,
        by: Quality = "auroc",
        cv: int = 5,
    ) -> Self:
        """Choose the number of neighbours and weigh the layers: every second input fits, the others choose.

        Args:
            inside: clean and noisy inputs that the network was not trained on.
            outside: adversarial ones.
            neighbors: the numbers to compare.
            by: what decides, "tnr95" or "auroc".
            cv: folds for the choice of the regression's penalty.

        Raises:
            ValueError: numbers that the references do not allow, or too few inputs.
        """
        check_is_fitted(self, "references_")
        inside_scores, outside_scores = self._scores_at(inside, neighbors), self._scores_at(outside, neighbors)
        candidates = zip(neighbors, inside_scores, outside_scores, strict=True)
        self.num_neighbors_, self.ensemble_ = choose_ensemble(candidates, by, cv)
        return self

    def score_samples(self, inputs: Tensor) -> Float[np.ndarray, " batch"]:
        """The ensemble's score, or before `tune` that of the last layer; higher is more normal."""
        scores = self.layer_scores(inputs)
        return scores[:, -1] if self.ensemble_ is None else self.ensemble_.score_samples(scores)

    def _scores_at(self, inputs: Tensor, neighbors: Sequence[int]) -> list[Float[np.ndarray, "batch layers"]]:
        layers = self._features(inputs)
        by_layer = [
            _dimensions(features, reference, neighbors, is_in_reference=False)
            for features, reference in zip(layers, self.references_, strict=True)
        ]
        return [-torch.stack(column, dim=1).numpy() for column in zip(*by_layer, strict=True)]

    def _features(self, inputs: Tensor) -> list[Float[Tensor, "batch features"]]:
        with FeatureTaps(self.model, self.layers, self.pool) as taps, evaluating(self.model), torch.no_grad():
            parts = [taps(batch)[1] for batch in self._batches(inputs)]
        return [torch.cat(layer).cpu() for layer in zip(*parts, strict=True)]
