"""The paper's whole classifier as a scikit-learn estimator: a small CNN with an SVM or a softmax on top.

Paper: "An Architecture Combining Convolutional Neural Network (CNN) and Support Vector Machine (SVM) for Image
Classification" (arXiv 1712.03541). Both heads are trained on the same network, from the same initialisation, on the
same batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal, Self

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, column_or_1d, validate_data
from torch import Tensor

from postern.heads.softmax import SoftmaxHead
from postern.heads.svm import Reduction, Rule, SVMHead, svm_predict
from postern.nets.agarap import AgarapCNN, initialize_truncated

HeadName = Literal["svm", "softmax"]


def train_cnn(
    network: AgarapCNN,
    head: SVMHead | SoftmaxHead,
    images: Tensor,
    target: Tensor,
    *,
    steps: Iterable[object],
    batch_size: int,
    learning_rate: float,
    generator: torch.Generator,
) -> None:
    """Train a network and its head by Adam on batches drawn epoch by epoch; both are left in evaluation mode.

    Args:
        network: gives the hidden vectors.
        head: gives the loss.
        images: [samples, channels, height, width].
        target: class indices [samples].
        steps: one item an update, such as a range, or one that shows progress.
        batch_size: samples an update.
        learning_rate: Adam's.
        generator: draws the batches.
    """
    network.train()
    head.train()
    optimizer = torch.optim.Adam([*network.parameters(), *head.parameters()], lr=learning_rate)
    order = torch.empty(0, dtype=torch.long)
    for _ in steps:
        if len(order) < min(batch_size, len(images)):
            order = torch.randperm(len(images), generator=generator)
        rows, order = order[:batch_size], order[batch_size:]
        optimizer.zero_grad(set_to_none=True)
        loss = head.loss(network(images[rows]), target[rows])
        torch.autograd.backward(loss)
        optimizer.step()
    network.eval()
    head.eval()


class CNNSVMClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """The paper's CNN with an L2-SVM or a softmax head, for images in scikit-learn's arrays.

    Args:
        head: "svm" or "softmax".
        penalty: the SVM's C.
        reduction: the SVM's objective, "mean" (the paper's code) or "sum" (its equation).
        rule: how the SVM predicts, "argmax" or, as the paper's code, "sign_argmax".
        image_shape: (height, width) or (channels, height, width) of a row of X. None takes square grey images where
            the number of features is a square, else one row of pixels.
        channels: channels of the two convolutions.
        kernel_size: side of the convolutions.
        hidden_dim: width of the dense layer.
        dropout: share of it that training drops.
        steps: number of updates.
        batch_size: samples an update.
        learning_rate: Adam's.
        random_state: seed of initialisation, batches and dropout.

    Attributes:
        classes_: the labels.
        network_: the trained network.
        head_: the trained head.
        n_iter_: number of updates.
    """

    def __init__(
        self,
        head: HeadName = "svm",
        *,
        penalty: float = 1.0,
        reduction: Reduction = "mean",
        rule: Rule = "argmax",
        image_shape: tuple[int, ...] | None = None,
        channels: tuple[int, int] = (32, 64),
        kernel_size: int = 5,
        hidden_dim: int = 1024,
        dropout: float = 0.5,
        steps: int = 10_000,
        batch_size: int = 128,
        learning_rate: float = 1e-3,
        random_state: int | None = None,
    ) -> None:
        self.head = head
        self.penalty = penalty
        self.reduction = reduction
        self.rule = rule
        self.image_shape = image_shape
        self.channels = channels
        self.kernel_size = kernel_size
        self.hidden_dim = hidden_dim
        self.dropout = dropout
        self.steps = steps
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.random_state = random_state

    def fit(self, X: Any, y: Any) -> Self:
        """Train on images.

        Args:
            X: [samples, height * width] or [samples, height, width] or [samples, channels, height, width]; pixels
                are best in [0, 1].
            y: labels [samples].

        Raises:
            ValueError: arrays that do not fit together, fewer than two classes, or a setting out of range.
        """
        images = self._images(X, reset=True)
        check_classification_targets(y)
        self.classes_, indices = np.unique(column_or_1d(y, warn=True), return_inverse=True)
        if len(indices) != len(images):
            raise ValueError(f"{len(images)} images need as many labels, got {len(indices)}")
        if len(self.classes_) < 2:
            raise ValueError(f"a classifier needs at least two classes, got 1 class: {self.classes_[0]!r}")
        for name in ("steps", "batch_size", "learning_rate"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        seed = self.random_state if self.random_state is not None else int(torch.seed() % 2**31)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            _, depth, height, width = images.shape
            self.network_ = AgarapCNN(
                depth, (height, width), self.channels, self.kernel_size, self.hidden_dim, self.dropout
            )
            self.head_ = self._build_head(len(self.classes_))
            initialize_truncated(self.head_)
            train_cnn(
                self.network_,
                self.head_,
                images,
                torch.from_numpy(indices).long(),
                steps=range(self.steps),
                batch_size=self.batch_size,
                learning_rate=self.learning_rate,
                generator=torch.Generator().manual_seed(seed),
            )
        self.n_iter_ = self.steps
        return self

    def decision_function(self, X: Any) -> np.ndarray:
        """Return the scores [samples, classes]; for two classes their difference [samples], as scikit-learn does."""
        scores = self._scores(X).double().numpy()
        return scores[:, 1] - scores[:, 0] if scores.shape[1] == 2 else scores

    def predict(self, X: Any) -> np.ndarray:
        """Return the labels [samples], by the estimator's rule."""
        rule: Rule = self.rule if self.head == "svm" else "argmax"
        indices = svm_predict(self._scores(X), rule).numpy()
        predicted: np.ndarray = self.classes_[indices]
        return predicted

    def _build_head(self, num_classes: int) -> SVMHead | SoftmaxHead:
        if self.head == "svm":
            return SVMHead(self.hidden_dim, num_classes, penalty=self.penalty, reduction=self.reduction)
        if self.head == "softmax":
            return SoftmaxHead(self.hidden_dim, num_classes)
        raise ValueError(f"head must be svm or softmax, got {self.head!r}")

    def _scores(self, X: Any) -> Tensor:
        check_is_fitted(self, "head_")
        images = self._images(X, reset=False)
        with torch.no_grad():
            return torch.cat([self.head_.logits(self.network_(part)) for part in torch.split(images, 1024)])

    def _images(self, X: Any, reset: bool) -> Tensor:
        """Check an array and return it as [samples, channels, height, width]."""
        array = validate_data(self, X, reset=reset, allow_nd=True, dtype=np.float32)
        samples, *rest = array.shape
        if len(rest) == 1:
            rest = list(self.image_shape or _square_or_row(rest[0]))
            if math.prod(rest) != array.shape[1]:
                raise ValueError(f"images of shape {tuple(rest)} have {math.prod(rest)} pixels, X has {array.shape[1]}")
        if len(rest) == 2:
            rest = [1, *rest]
        if len(rest) != 3:
            raise ValueError(f"X must hold images, flat, [height, width] or with channels first; got {array.shape}")
        return torch.from_numpy(np.ascontiguousarray(array).reshape(samples, *rest))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.non_deterministic = self.random_state is None
        return tags


def _square_or_row(pixels: int) -> tuple[int, int]:
    side = math.isqrt(pixels)
    return (side, side) if side * side == pixels else (1, pixels)
