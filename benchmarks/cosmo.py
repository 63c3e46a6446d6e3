"""The sweep over a gate's thresholds and temperatures: one sort a temperature beside a loop over all points.

    python -m benchmarks.cosmo [--workers N] [--seconds S]

The loop combines the experts' probabilities anew at each point and evaluates them, as the paper's code does; so does
the pool of processes, which is made for each sweep, also as there. All curves are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
from collections.abc import Iterable

import numpy as np
import torch

from benchmarks._tables import Row, best_times, record
from postern.anomaly import (
    ExpertPredictions,
    MaxProbGate,
    critical_thresholds,
    domain_best,
    gzsl_combine,
    gzsl_scores,
    seen_unseen_curve,
    unseen_probability,
)

# Test samples, seen and unseen classes of the benchmarks with ResNet features, and the grid of the paper's code.
DATA_SETS = {
    "AWA1": (10_643, 40, 10, np.r_[0:0.7:0.05, 0.7:1.2:0.005, 1.2:2:0.05], (0.003, 0.01, 0.03, 0.1)),
    "CUB": (4731, 150, 50, np.arange(-2.5, 2.5, 0.1), (0.1, 0.3, 1.0, 3.0)),
    "SUN": (4020, 645, 72, np.arange(-2.5, 20, 0.2), (0.1, 0.3, 1.0, 3.0, 10.0)),
}

Point = tuple[ExpertPredictions, np.ndarray, float, float]


def drawn(samples: int, num_seen: int, num_unseen: int) -> ExpertPredictions:
    rng = np.random.default_rng(0)
    classes = num_seen + num_unseen
    labels = np.concatenate([np.arange(classes), rng.integers(classes, size=samples - classes)])
    seen, unseen = np.arange(num_seen), np.arange(num_seen, classes)

    def expert(known: np.ndarray) -> np.ndarray:
        weights = np.zeros((samples, classes))
        weights[:, known] = np.exp(2 * rng.normal(size=(samples, len(known))))
        rows = np.flatnonzero(labels < len(known))
        weights[rows, labels[rows]] *= np.exp(3 * rng.random(len(rows)))
        return weights / weights.sum(axis=1, keepdims=True)

    return ExpertPredictions(expert(seen), expert(np.arange(classes)), seen, unseen, labels)


def at_point(point: Point) -> float:
    predictions, q, threshold, temperature = point
    p_unseen = unseen_probability(q, threshold, temperature)
    seen, unseen = predictions.seen, predictions.unseen
    scores = gzsl_combine(predictions.seen_expert, predictions.zero_shot, p_unseen, seen, unseen)
    return gzsl_scores(predictions.known_labels, scores, seen, unseen)["acc_h"]


def points(
    predictions: ExpertPredictions, q: np.ndarray, thresholds: Iterable[float], temperatures: Iterable[float]
) -> list[Point]:
    return [(predictions, q, *point[::-1]) for point in itertools.product(temperatures, thresholds)]


def loop(predictions: ExpertPredictions, q: np.ndarray, thresholds: np.ndarray, temperatures: tuple) -> np.ndarray:
    return np.array([at_point(point) for point in points(predictions, q, thresholds, temperatures)])


def pool(
    predictions: ExpertPredictions, q: np.ndarray, thresholds: np.ndarray, temperatures: tuple, workers: int
) -> np.ndarray:
    with multiprocessing.get_context("fork").Pool(workers) as processes:
        return np.array(processes.map(at_point, points(predictions, q, thresholds, temperatures)))


def sort(predictions: ExpertPredictions, q: np.ndarray, thresholds: np.ndarray, temperatures: tuple) -> np.ndarray:
    seen = domain_best(predictions.seen_expert, predictions.seen)
    unseen = domain_best(predictions.zero_shot, predictions.unseen)
    sizes, labels = (len(predictions.seen), len(predictions.unseen)), predictions.known_labels
    curves = []
    for temperature in temperatures:
        critical = critical_thresholds(seen, unseen, q, *sizes, temperature)
        arguments = (critical, seen.column, unseen.column, labels, predictions.seen, predictions.unseen, thresholds)
        curves.append(seen_unseen_curve(*arguments).acc_h)
    return np.concatenate(curves)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=min(12, os.cpu_count() or 1), help="processes of the pool")
    parser.add_argument("--seconds", type=float, default=2.0, help="how long to time each row of the table")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    workers = arguments.workers
    rows: list[Row] = []
    for name, (samples, num_seen, num_unseen, thresholds, temperatures) in DATA_SETS.items():
        predictions = drawn(samples, num_seen, num_unseen)
        q = MaxProbGate().score_seen(predictions)
        grid = (predictions, q, thresholds, temperatures)
        expected = loop(*grid)
        for found in (pool(*grid, workers), sort(*grid)):
            np.testing.assert_allclose(found, expected, atol=1e-9)
        names = {"loop": loop, "pool": pool, "sort": sort, "grid": grid, "workers": workers}
        calls = {"loop": "loop(*grid)", "pool": "pool(*grid, workers)", "sort": "sort(*grid)"}
        times = best_times(calls, arguments.seconds, names, rounds=2)
        rows.append(
            {
                "sizes of": name,
                "samples": f"{samples:,}",
                "classes": f"{num_seen} + {num_unseen}",
                "points": f"{len(expected)}",
                "loop, s": times["loop"],
                f"pool of {workers}, s": times["pool"],
                "sort, s": f"{times['sort']:.4f}",
                "loop / sort": times["loop"] / times["sort"],
                "pool / sort": times["pool"] / times["sort"],
            }
        )
    title = "Seconds of one sweep over thresholds and temperatures, and ratios; one thread but for the pool"
    record("cosmo", "Tuning a gate between two experts against a loop over a grid", {title: rows})


if __name__ == "__main__":
    main()
