import warnings

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.utils.estimator_checks import check_estimator

from postern.data import load
from postern.heads import CNNSVMClassifier

SMALL = {"channels": (16, 32), "kernel_size": 3, "hidden_dim": 128, "dropout": 0.0, "learning_rate": 1e-3}
TINY = {"channels": (4, 4), "kernel_size": 3, "hidden_dim": 16, "dropout": 0.0, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    images = load("digits", "train", 600)
    return images.scaled().numpy(), images.labels.numpy()


def test_scikit_learns_checks_of_an_estimator():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = check_estimator(CNNSVMClassifier(**TINY, steps=60, random_state=0), on_fail=None)
    failed = {result["check_name"]: result["exception"] for result in results if result["status"] == "failed"}
    assert not failed


@pytest.mark.parametrize("head", ["svm", "softmax"])
def test_learns_digits(head, digits):
    images, labels = digits
    model = CNNSVMClassifier(head, **SMALL, steps=150, random_state=0).fit(images, labels)
    assert model.score(images, labels) > 0.9
    assert model.decision_function(images).shape == (600, 10)
    assert (model.predict(images) == model.decision_function(images).argmax(1)).all()


def test_the_sign_rule_changes_predictions_and_not_the_training(digits):
    images, labels = digits
    model = CNNSVMClassifier(**SMALL, steps=30, random_state=0).fit(images, labels)
    by_sign = clone(model).set_params(rule="sign_argmax").fit(images, labels)
    np.testing.assert_array_equal(by_sign.decision_function(images), model.decision_function(images))
    scores = model.decision_function(images)
    first_positive = np.where((scores > 0).any(1), (scores > 0).argmax(1), 0)
    np.testing.assert_array_equal(by_sign.predict(images), first_positive)
    assert model.score(images, labels) > by_sign.score(images, labels)


def test_same_seed_same_model_and_the_global_generator_is_left_alone(digits):
    import torch

    images, labels = digits
    settings = SMALL | {"dropout": 0.5}
    torch.manual_seed(5)
    first = CNNSVMClassifier(**settings, steps=5, random_state=1).fit(images, labels)
    drawn = torch.rand(1)
    second = CNNSVMClassifier(**settings, steps=5, random_state=1).fit(images, labels)
    np.testing.assert_array_equal(first.decision_function(images), second.decision_function(images))
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(1))


def test_flat_images_are_square_images(digits):
    images, labels = digits
    flat = CNNSVMClassifier(**SMALL, steps=5, random_state=1).fit(images.reshape(600, 64), labels)
    whole = CNNSVMClassifier(**SMALL, steps=5, random_state=1).fit(images, labels)
    np.testing.assert_array_equal(flat.decision_function(images.reshape(600, 64)), whole.decision_function(images))


def test_probabilities_come_from_scikit_learn(digits):
    images, labels = digits
    model = CNNSVMClassifier(**SMALL, steps=40, random_state=0)
    calibrated = CalibratedClassifierCV(model, cv=2).fit(images.reshape(600, 64), labels)
    np.testing.assert_allclose(calibrated.predict_proba(images.reshape(600, 64)).sum(1), 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"head": "tree"}, "tree"),
        ({"steps": 0}, "steps must be positive, got 0"),
        ({"image_shape": (5, 5)}, "25 pixels, X has 64"),
        ({"penalty": -1.0}, "-1.0"),
    ],
)
def test_bad_settings(change, message, digits):
    images, labels = digits
    with pytest.raises(ValueError, match=message):
        CNNSVMClassifier(**SMALL | change).fit(images.reshape(600, 64), labels)
