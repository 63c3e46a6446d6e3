"""Boxes as a detector emits them, in clusters around objects."""

import numpy as np


def crowded_boxes(n, seed, boxes_per_object=10):
    rng = np.random.default_rng(seed)
    objects = rng.uniform(0, 30 * (n / boxes_per_object) ** 0.5, (n // boxes_per_object + 1, 2))
    centre = objects[rng.integers(0, len(objects), n)] + rng.normal(0, 3, (n, 2))
    half = rng.uniform(5, 15, (n, 2))
    return np.concatenate([centre - half, centre + half], axis=1), rng.uniform(0, 1, n)
