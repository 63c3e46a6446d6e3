"""Tables from classes to codes: which classes of a large vocabulary share one output vector.

Paper: "VQ-Logits: Compressing the Output Bottleneck of Large Language Models via Vector Quantized Logits" (arXiv
2505.10202), which takes the clusters of a trained head's rows, or a table assigned beforehand. The balanced tables are
a reconstruction; frequent classes with a code of their own (`frequency_kmeans_mapping`) are our extension.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

# Distances are computed in pieces of at most so many entries.
_PIECE = 1 << 24
# The start of k-means looks at so many points at most. A smaller sample would miss the few rows that stand apart, those
# of the most frequent classes, for which a code of their own matters most.
_START = 1 << 16


class Clusters(NamedTuple):
    """What `kmeans` finds.

    Attributes:
        centroids: the mean of each cluster's points.
        assignment: the cluster of each point; every cluster has at least one.
        inertia: sum of the squared distances of the points to their centroids.
    """

    centroids: Float[Tensor, "clusters features"]
    assignment: Int[Tensor, " points"]
    inertia: float


@torch.no_grad()
def kmeans(
    points: Float[Tensor, "points features"],
    num_clusters: int,
    *,
    iterations: int = 25,
    seed: int = 0,
    centroids: Float[Tensor, "clusters features"] | None = None,
) -> Clusters:
    """Cluster points by Lloyd's iterations from a greedy k-means++ start, on the points' device.

    A cluster that runs empty takes the point farthest from its centroid, so that none is empty in the end.

    Args:
        points: what to cluster, e.g. the rows of an output layer.
        num_clusters: number of clusters, at most one a point.
        iterations: Lloyd's iterations at most; they end when no point moves.
        seed: of the start, which looks at 65 536 points at most.
        centroids: where to start instead.

    Raises:
        ValueError: points that are no finite matrix, more clusters than points, or centroids of another shape.
    """
    if points.dim() != 2 or not points.is_floating_point() or not torch.isfinite(points).all():
        raise ValueError(f"points are a finite floating-point matrix, got {points.dtype} {tuple(points.shape)}")
    _check_sizes("clusters", num_clusters, "points", len(points))
    if iterations < 1:
        raise ValueError(f"k-means needs at least one iteration, got {iterations}")
    x = points.to(torch.promote_types(points.dtype, torch.float32))
    # Distances are differences of squares; near the origin they lose the fewest digits.
    origin = x.mean(0)
    x = x - origin
    if centroids is None:
        centres = _spread(x, num_clusters, torch.Generator().manual_seed(seed))
    elif centroids.shape == (num_clusters, points.shape[1]):
        centres = centroids.to(x) - origin
    else:
        raise ValueError(f"centroids must be {[num_clusters, points.shape[1]]}, got {list(centroids.shape)}")
    previous = None
    for _ in range(iterations):
        assignment, distances = _nearest(x, centres)
        assignment = _without_empty(assignment, distances, num_clusters)
        centres = _means(x, assignment, num_clusters)
        if previous is not None and torch.equal(assignment, previous):
            break
        previous = assignment
    inertia = (x - centres[assignment]).square().sum().item()
    return Clusters((centres + origin).to(points.dtype), assignment, inertia)


def random_mapping(
    num_classes: int, num_codes: int, generator: torch.Generator | None = None
) -> Int[Tensor, " num_classes"]:
    """Assign classes to codes at random; the codes' sizes differ by one at most.

    Raises:
        ValueError: more codes than classes, or none.
    """
    _check_sizes("codes", num_codes, "classes", num_classes)
    return torch.randperm(num_classes, generator=generator) % num_codes


def frequency_mapping(counts: Num[Tensor, " classes"], num_codes: int) -> Int[Tensor, " classes"]:
    """Cut the classes, most frequent first, into codes that are about equally frequent.

    Classes that are as frequent as a code should be alone have it alone, and those of one code are about equally
    frequent: what a layer assumes that cannot tell them apart.

    Args:
        counts: how often each class occurs in a text.
        num_codes: number of codes, at most one a class.

    Raises:
        ValueError: counts that are none, or more codes than classes.
    """
    check_counts(counts)
    _check_sizes("codes", num_codes, "classes", len(counts))
    order = torch.argsort(counts, descending=True, stable=True)
    falling = counts[order].double().tolist()
    left, mass, code = sum(falling), 0.0, 0
    codes = []
    for count, following in pairwise([*falling, 0.0]):
        codes.append(code)
        mass += count
        codes_left, classes_left = num_codes - code - 1, len(falling) - len(codes)
        # nearer to an equal share of what is left than with one class more
        is_full = (mass + following / 2) * (codes_left + 1) >= left
        if codes_left and (is_full or classes_left == codes_left):
            code, left, mass = code + 1, left - mass, 0.0
    return torch.empty(len(counts), dtype=torch.long, device=counts.device).scatter_(
        0, order, torch.tensor(codes, device=counts.device)
    )


def frequency_kmeans_mapping(
    rows: Float[Tensor, "classes features"],
    counts: Num[Tensor, " classes"],
    num_codes: int,
    *,
    num_shared: int | None = None,
    iterations: int = 25,
    seed: int = 0,
) -> Int[Tensor, " classes"]:
    """Give the most frequent classes a code each, and cluster the rest.

    Args:
        rows: a vector a class, e.g. the rows of a trained output layer.
        counts: how often each class occurs in a text.
        num_codes: number of codes, at most one a class.
        num_shared: how many of them are clusters; half by default.
        iterations: see `kmeans`.
        seed: see `kmeans`.

    Raises:
        ValueError: rows and counts that do not fit, or numbers of codes that are impossible.
    """
    check_counts(counts, len(rows))
    _check_sizes("codes", num_codes, "classes", len(rows))
    if num_shared is None:
        num_shared = max(1, num_codes // 2)
    if not 1 <= num_shared <= num_codes:
        raise ValueError(f"num_shared is between 1 and the number of codes, {num_codes}, got {num_shared}")
    order = torch.argsort(counts, descending=True, stable=True).to(rows.device)
    alone, rest = order[: num_codes - num_shared], order[num_codes - num_shared :]
    mapping = torch.empty(len(rows), dtype=torch.long, device=rows.device)
    mapping[alone] = torch.arange(len(alone), device=rows.device)
    clusters = kmeans(rows[rest], num_shared, iterations=iterations, seed=seed)
    mapping[rest] = len(alone) + clusters.assignment
    return mapping


def unigram_bias(
    counts: Num[Tensor, " classes"], mapping: Int[Tensor, " classes"], smoothing: float = 1.0
) -> Float[Tensor, " classes"]:
    """Return ``b_i = log(count_i / sum of the counts of i's code)``, so that ``e^b`` sums to one in each code.

    For a fixed mapping this is the likeliest distribution within codes that ignores the context.

    Args:
        counts: how often each class occurs in the training text.
        mapping: the code of each class.
        smoothing: added to every count, so that no class is impossible.

    Raises:
        ValueError: counts and mapping that do not fit, or smoothing that leaves a class impossible.
    """
    check_counts(counts, len(mapping))
    smoothed = counts.double() + smoothing
    if not smoothing >= 0 or not (smoothed > 0).all():
        raise ValueError(f"smoothing must leave every class a positive count, got {smoothing}")
    mapping = mapping.to(counts.device).long()
    mass = torch.zeros(int(mapping.max()) + 1, dtype=torch.float64, device=counts.device)
    mass = mass.index_add(0, mapping, smoothed)
    return (smoothed / mass[mapping]).log().float()


def check_counts(counts: Tensor, num_classes: int | None = None) -> None:
    """Check that counts are numbers of occurrences, one a class.

    Raises:
        ValueError: another shape, negative or infinite counts, or nothing counted.
    """
    if counts.dim() != 1 or (num_classes is not None and len(counts) != num_classes):
        wanted = "[classes]" if num_classes is None else f"[{num_classes}]"
        raise ValueError(f"counts must be {wanted}, one a class, got {list(counts.shape)}")
    if not len(counts) or not torch.isfinite(counts).all() or (counts < 0).any() or not (counts > 0).any():
        raise ValueError("counts are finite, not negative and not all zero")


def check_mapping(mapping: Tensor, num_classes: int, num_codes: int) -> None:
    """Check that a mapping gives each class a code.

    Raises:
        ValueError: another shape, not integer, or a code that does not exist.
    """
    if mapping.shape != (num_classes,) or mapping.is_floating_point() or mapping.is_complex():
        raise ValueError(f"a mapping is integer [{num_classes}], got {mapping.dtype} {list(mapping.shape)}")
    low, high = int(mapping.min()), int(mapping.max())
    if low < 0 or high >= num_codes:
        raise ValueError(f"a mapping is to codes 0..{num_codes - 1}, got {low}..{high}")


def _check_sizes(parts: str, num_parts: int, wholes: str, num_wholes: int) -> None:
    if not 1 <= num_parts <= num_wholes:
        raise ValueError(f"the number of {parts} is between 1 and that of {wholes}, {num_wholes}, got {num_parts}")


def _spread(x: Tensor, num_clusters: int, generator: torch.Generator) -> Tensor:
    """Greedy k-means++: of a few points drawn with the squared distance to the nearest centre, the best is the next."""
    if len(x) > _START:
        x = x[torch.randperm(len(x), generator=generator)[:_START].to(x.device)]
    trials = 2 + int(math.log(num_clusters))
    squares = x.square().sum(1)

    def distances_to(chosen: Tensor) -> Tensor:
        return torch.addmm(squares, x[chosen], x.T, alpha=-2).add_(squares[chosen, None]).clamp_min_(0)

    first = torch.randint(len(x), (1,), generator=generator).to(x.device)
    chosen = [first]
    closest = distances_to(first)[0]
    for _ in range(num_clusters - 1):
        cumulative = closest.cumsum(0)
        draws = torch.rand(trials, generator=generator).to(x) * cumulative[-1]
        # Where all points left are copies of chosen ones, any will do.
        candidates = torch.searchsorted(cumulative, draws, right=True).clamp_max_(len(x) - 1)
        nearer = torch.minimum(distances_to(candidates), closest)
        best = nearer.sum(1).argmin()
        chosen.append(candidates[best, None])
        closest = nearer[best]
    return x[torch.cat(chosen)]


def _nearest(x: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest centre of each point, and its squared distance."""
    half_squares = centres.square().sum(1) / 2
    assignment, distances = [], []
    for part in torch.split(x, max(1, _PIECE // len(centres))):
        best = torch.addmm(half_squares, part, centres.T, alpha=-1).min(1)
        assignment.append(best.indices)
        distances.append((2 * best.values + part.square().sum(1)).clamp_min_(0))
    return torch.cat(assignment), torch.cat(distances)


def _without_empty(assignment: Tensor, distances: Tensor, num_clusters: int) -> Tensor:
    """Move the worst-fitted points of clusters that can spare them to empty clusters."""
    sizes = torch.bincount(assignment, minlength=num_clusters).tolist()
    empty = [cluster for cluster, size in enumerate(sizes) if size == 0]
    if not empty:
        return assignment
    assigned = assignment.tolist()
    worst = iter(distances.argsort(descending=True).tolist())
    for cluster in empty:
        point = next(point for point in worst if sizes[assigned[point]] > 1)
        sizes[assigned[point]] -= 1
        sizes[cluster], assigned[point] = 1, cluster
    return torch.tensor(assigned, device=assignment.device)


def _means(x: Tensor, assignment: Tensor, num_clusters: int) -> Tensor:
    sizes = torch.bincount(assignment, minlength=num_clusters)
    return x.new_zeros(num_clusters, x.shape[1]).index_add_(0, assignment, x) / sizes[:, None]
