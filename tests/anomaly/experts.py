"""Random predictions of two experts, for tests."""

import numpy as np

from postern.anomaly import ExpertPredictions


def random_predictions(
    seed: int = 0,
    samples: int = 60,
    seen: int = 5,
    unseen: int = 3,
    placeholders: int = 1,
    concentration: float = 0.3,
    skill: float = 2.0,
) -> ExpertPredictions:
    """Classes in shuffled columns, placeholder columns among them, both experts right more often than not."""
    rng = np.random.default_rng(seed)
    classes = seen + unseen + placeholders
    columns = rng.permutation(classes)
    seen_columns, unseen_columns = columns[:seen], columns[seen : seen + unseen]
    labels = np.concatenate([columns[: seen + unseen], rng.choice(columns[: seen + unseen], samples - seen - unseen)])
    labels = rng.permutation(labels)

    def expert(known: np.ndarray) -> np.ndarray:
        weights = np.zeros((samples, classes))
        weights[:, known] = rng.gamma(concentration, size=(samples, len(known))) + 1e-6
        rows = np.flatnonzero(np.isin(labels, known))
        weights[rows, labels[rows]] += skill * rng.random(len(rows))
        return weights / weights.sum(axis=1, keepdims=True)

    return ExpertPredictions(
        expert(seen_columns), expert(columns[: seen + unseen]), seen_columns, unseen_columns, labels
    )
