import numpy as np
import pytest
from scipy.special import softmax
from sklearn.base import clone
from sklearn.linear_model import Ridge
from sklearn.utils.estimator_checks import check_estimator

from postern.anomaly import ESZSL


def world(seed=0, samples=50, size=6, classes=7, attributes=4, trained=4):
    rng = np.random.default_rng(seed)
    described = rng.random((classes, attributes))
    labels = np.concatenate([np.arange(trained), rng.integers(trained, size=samples - trained)])
    return rng.normal(size=(samples, size)) + described[labels] @ rng.normal(size=(attributes, size)), labels, described


@pytest.mark.parametrize("size", [6, 80])
def test_the_weights_are_the_closed_form(size):
    """Also with more features than samples, where the smaller system is solved."""
    features, labels, attributes = world(size=size)
    expert = ESZSL(attributes, feature_penalty=0.7, attribute_penalty=0.3, scale=2.0).fit(features, labels)
    unit = attributes / np.linalg.norm(attributes, axis=1, keepdims=True)
    S, Y = unit[:4], np.where(labels[:, None] == np.arange(4), 1.0, -1.0)
    left = np.linalg.inv(features.T @ features + 0.7 * np.eye(size))
    expected = left @ features.T @ Y @ S @ np.linalg.inv(S.T @ S + 0.3 * np.eye(4))
    np.testing.assert_allclose(expert.coef_, expected, rtol=1e-7, atol=1e-10)
    scores = features @ expected @ unit.T
    np.testing.assert_allclose(expert.class_scores(features), scores, atol=1e-8)
    np.testing.assert_allclose(expert.predict_proba(features), softmax(2 * scores, axis=1), rtol=1e-6)
    np.testing.assert_array_equal(expert.predict(features), scores.argmax(axis=1))
    assert expert.predict_proba(features).shape == (50, 7)


def test_without_attributes_it_is_a_ridge_classifier():
    features, labels, _ = world()
    expert = ESZSL(feature_penalty=3.0, attribute_penalty=1.0).fit(features, labels)
    targets = np.where(labels[:, None] == np.arange(4), 1.0, -1.0)
    ridge = Ridge(alpha=3.0, fit_intercept=False).fit(features, targets)
    np.testing.assert_allclose(expert.class_scores(features), ridge.predict(features) / 2, rtol=1e-8)


def test_classes_without_a_sample_are_recognised_where_features_are_attributes():
    rng = np.random.default_rng(0)
    attributes = np.eye(8)[:, :5] + np.eye(8, 5, -3)
    attributes -= attributes.mean(axis=0)
    mixing = rng.normal(size=(5, 12))
    labels = np.repeat(np.arange(8), 20)
    unit = attributes / np.linalg.norm(attributes, axis=1, keepdims=True)
    features = unit[labels] @ mixing + 0.01 * rng.normal(size=(160, 12))
    expert = ESZSL(attributes, feature_penalty=1e-3, attribute_penalty=1e-3)
    expert.fit(features[labels < 6], labels[labels < 6])
    unseen = labels >= 6
    among_unseen = 6 + expert.class_scores(features[unseen])[:, 6:].argmax(axis=1)
    assert (among_unseen == labels[unseen]).mean() > 0.95


def test_labels_are_names_in_any_order():
    features, labels, attributes = world()
    names = np.array(["g", "a", "f", "b", "e", "c", "d"])
    named = ESZSL(attributes, names).fit(features, names[labels])
    np.testing.assert_array_equal(named.classes_, sorted(names))
    np.testing.assert_array_equal(
        named.predict(features), names[ESZSL(attributes).fit(features, labels).predict(features)]
    )


def test_the_length_of_an_attribute_vector_says_nothing():
    features, labels, attributes = world()
    longer = attributes * np.arange(1, 8)[:, None]
    np.testing.assert_allclose(
        ESZSL(longer).fit(features, labels).class_scores(features),
        ESZSL(attributes).fit(features, labels).class_scores(features),
    )


def test_scikit_learn_conventions():
    assert clone(ESZSL(scale=3.0)).get_params()["scale"] == 3.0
    check_estimator(
        ESZSL(),
        expected_failed_checks={
            "check_fit_score_takes_y": "the arguments are called features and labels",
            "check_classifiers_train": "there is no intercept, and the blobs are not centred",
        },
    )


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda x, y, a: ESZSL(a, feature_penalty=0.0).fit(x, y), r"feature_penalty is positive, got 0\.0"),
        (lambda x, y, a: ESZSL(a, attribute_penalty=-1.0).fit(x, y), r"attribute_penalty is positive, got -1\.0"),
        (lambda x, y, a: ESZSL(a, scale=0.0).fit(x, y), r"scale is positive, got 0\.0"),
        (lambda x, y, a: ESZSL(a[:3]).fit(x, y), r"\[3\] have none"),
        (lambda x, y, a: ESZSL(a, [1, 2]).fit(x, y), "one for each of 7 rows"),
        (lambda x, y, a: ESZSL(a, [1] * 7).fit(x, y), "different labels"),
        (lambda x, y, a: ESZSL(None, [1, 2]).fit(x, y), "attributes is None"),
        (
            lambda x, y, a: ESZSL(np.where(np.arange(7)[:, None] == 2, 0, a)).fit(x, y),
            "attributes of class 2 are all zero",
        ),
        (lambda x, y, a: ESZSL(np.full_like(a, np.nan)).fit(x, y), "NaN"),
        (lambda x, y, a: ESZSL(a).fit(np.where(x > 0, np.nan, x), y), "NaN"),
        (lambda x, y, a: ESZSL(a).fit(x, y[:-1]), "inconsistent"),
        (lambda x, y, a: ESZSL(a).fit(x, y).predict(x[:, :2]), "2 features"),
    ],
)
def test_bad_input(act, message):
    with pytest.raises(ValueError, match=message):
        act(*world())
