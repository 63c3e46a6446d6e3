"""The data protocol of generalised zero-shot learning: which classes are unseen, and in which of two phases.

Paper: Adaptive Confidence Smoothing for Generalized Zero-Shot Learning (arXiv 1812.09903), section 3, after Zero-Shot
Learning -- The Good, the Bad and the Ugly (arXiv 1703.04394).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, Shaped
from numpy.typing import ArrayLike


@dataclass(frozen=True, eq=False)
class GZSLPhase:
    """What the experts are trained on, and what their combination is tuned or tested on.

    Attributes:
        train: rows to train on, all of seen classes.
        evaluation: other rows, of seen and of unseen classes.
        seen: labels of the classes in ``train``.
        unseen: labels of the other classes in ``evaluation``.
    """

    train: Int[np.ndarray, " train"]
    evaluation: Int[np.ndarray, " evaluation"]
    seen: Shaped[np.ndarray, " seen"]
    unseen: Shaped[np.ndarray, " unseen"]


@dataclass(frozen=True, eq=False)
class GZSLSplit:
    """Both phases. The evaluation rows of one are none of the other's.

    Attributes:
        validation: some classes of the test phase's training set play the unseen ones here.
        test: training rows are all those of the validation phase, to train on or to tune on.
    """

    validation: GZSLPhase
    test: GZSLPhase


def gzsl_split(
    labels: ArrayLike,
    validation_unseen: int | ArrayLike,
    test_unseen: int | ArrayLike,
    held_out: float = 0.25,
    random_state: int | np.random.Generator | None = None,
) -> GZSLSplit:
    """Split samples into train, validation and test so that tuning never sees a test class or a test sample.

    Of each seen class the share ``held_out`` of its samples is tested on; of each class that is also seen in the
    validation phase, as many again are tuned on. Of unseen classes all samples that are left are evaluated.

    Args:
        labels: one a sample.
        validation_unseen: classes that only the validation phase treats as unseen, or how many to draw.
        test_unseen: classes that are unseen in both, or how many to draw; 0 for none, where there is nothing to test.
        held_out: share of a seen class's samples, in (0, 0.5).
        random_state: seed or generator.

    Raises:
        ValueError: a share outside (0, 0.5), classes that are not there or are named twice, no class left to train on,
            or a seen class with too few samples to be in every part.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1 or not len(labels):
        raise ValueError(f"labels has one class a sample, at least one, got shape {labels.shape}")
    if not 0 < held_out < 0.5:
        raise ValueError(f"held_out is a share between 0 and 0.5, got {held_out}")
    rng = np.random.default_rng(random_state)
    left = rng.permutation(np.unique(labels))
    test_classes, left = _taken("test_unseen", test_unseen, left)
    validation_classes, train_classes = _taken("validation_unseen", validation_unseen, left)
    if not len(train_classes) or not len(validation_classes):
        raise ValueError(
            f"a split needs classes to train on and some that only validation treats as unseen, got "
            f"{len(train_classes)} and {len(validation_classes)}"
        )
    trained, tuned, tested = [], [], []
    for label in np.sort(np.concatenate([train_classes, validation_classes])):
        rows = rng.permutation(np.flatnonzero(labels == label))
        count = round(held_out * len(rows))
        if not count or len(rows) <= 2 * count:
            raise ValueError(
                f"each part takes {held_out:g} of a class's samples and leaves some to train on, but class {label!r} "
                f"has {len(rows)}"
            )
        tested.append(rows[:count])
        if label in validation_classes:
            tuned.append(rows[count:])
        else:
            tuned.append(rows[count : 2 * count])
            trained.append(rows[2 * count :])
    train, validation = np.sort(np.concatenate(trained)), np.sort(np.concatenate(tuned))
    unseen_rows = np.flatnonzero(np.isin(labels, test_classes))
    return GZSLSplit(
        GZSLPhase(train, validation, np.sort(train_classes), np.sort(validation_classes)),
        GZSLPhase(
            np.sort(np.concatenate([train, validation])),
            np.sort(np.concatenate([*tested, unseen_rows])),
            np.sort(np.concatenate([train_classes, validation_classes])),
            np.sort(test_classes),
        ),
    )


def _taken(name: str, wanted: int | ArrayLike, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The classes that are named, or the first so many, and those that are left."""
    if isinstance(wanted, int | np.integer):
        if not 0 <= wanted <= len(classes):
            raise ValueError(f"{name} lies between 0 and the {len(classes)} classes that are left, got {wanted}")
        return classes[:wanted], classes[wanted:]
    named = np.asarray(wanted)
    if named.ndim != 1 or len(np.unique(named)) != len(named) or not np.isin(named, classes).all():
        raise ValueError(f"{name} are different classes that are there and not taken, got {named.tolist()}")
    return named, classes[~np.isin(classes, named)]
