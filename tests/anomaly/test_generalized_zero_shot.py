import numpy as np
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression

from postern.anomaly import (
    ESZSL,
    CalibratedStacking,
    ConfidenceGate,
    COSMOClassifier,
    GeneralizedZeroShotClassifier,
    gzsl_split,
    predict_with_experts,
)

NAMES = np.array([f"class {letter}" for letter in "hcafgbdelijnmk"])
UNSEEN = NAMES[[0, 7]]


def birds(seed=0):
    """Seven classes and their opposites; features are the attributes, mixed and with noise."""
    rng = np.random.default_rng(seed)
    attributes = rng.normal(size=(7, 4))
    attributes /= np.linalg.norm(attributes, axis=1, keepdims=True)
    attributes = np.concatenate([attributes, -attributes])
    labels = np.repeat(np.arange(14), 20)
    features = attributes[labels] @ rng.normal(size=(4, 10)) + 0.2 * rng.normal(size=(280, 10))
    return features, NAMES[labels], ESZSL(attributes, NAMES, 1.0, 0.1)


def classifier(expert, **settings):
    gate = ConfidenceGate(top_seen=3, top_unseen=2)
    return GeneralizedZeroShotClassifier(expert, combiner=COSMOClassifier(gate), **settings)


def test_classes_with_and_without_training_samples_are_recognised():
    features, labels, expert = birds()
    is_unseen = np.isin(labels, UNSEEN)
    train = ~is_unseen & (np.arange(280) % 4 > 0)
    fitted = classifier(expert).fit(features[train], labels[train])
    assert fitted.unseen_.tolist() == sorted(UNSEEN)
    assert fitted.seen_.tolist() == sorted(set(NAMES) - set(UNSEEN))
    predicted = fitted.predict(features[~train])
    right = predicted == labels[~train]
    assert right[is_unseen[~train]].mean() > 0.6
    assert right[~is_unseen[~train]].mean() > 0.6
    assert fitted.score(features[~train], labels[~train]) == right.mean()
    scores = fitted.combiner_.evaluate(fitted.expert_predictions(features[~train], labels[~train]))
    assert scores["acc_h"] > 0.6


def test_it_is_tuned_on_experts_that_do_not_know_the_validation_classes():
    features, labels, expert = birds()
    rows = ~np.isin(labels, UNSEEN)
    features, labels = features[rows], labels[rows]
    fitted = classifier(expert, validation_classes=[NAMES[3], NAMES[5]], random_state=7).fit(features, labels)
    phase = gzsl_split(labels, [NAMES[3], NAMES[5]], 0, 0.25, 7).validation
    experts = [each.fit(features[phase.train], labels[phase.train]) for each in (LogisticRegression(), clone(expert))]
    evaluation = phase.evaluation
    validation = predict_with_experts(*experts, features[evaluation], phase.seen, phase.unseen, labels[evaluation])
    reference = COSMOClassifier(ConfidenceGate(3, 2)).tune(validation)
    assert fitted.combiner_.threshold_ == pytest.approx(reference.threshold_)
    assert fitted.combiner_.tuned_acc_h_ == pytest.approx(reference.tuned_acc_h_)
    np.testing.assert_allclose(fitted.zero_shot_expert_.coef_, clone(expert).fit(features, labels).coef_)


def test_any_combiner_and_experts():
    features, labels, expert = birds()
    train = ~np.isin(labels, UNSEEN)
    stacked = GeneralizedZeroShotClassifier(expert, combiner=CalibratedStacking()).fit(features[train], labels[train])
    assert isinstance(stacked.combiner_, CalibratedStacking)
    assert set(stacked.predict(features[~train])) <= set(NAMES)
    plain = GeneralizedZeroShotClassifier(expert, LogisticRegression(C=0.1)).fit(features[train], labels[train])
    assert plain.seen_expert_.C == 0.1
    assert plain.combiner_.mode == "adaptive"


def test_scikit_learn_conventions():
    features, labels, expert = birds()
    unfitted = classifier(expert, held_out=0.2)
    copied = clone(unfitted).set_params(combiner__gate__top_seen=2, zero_shot_expert__scale=2.0)
    assert (copied.held_out, copied.combiner.gate.top_seen, expert.scale) == (0.2, 2, 5.0)
    with pytest.raises(NotFittedError):
        unfitted.predict(features)
    train = ~np.isin(labels, UNSEEN)
    unfitted.fit(features[train], labels[train])
    assert unfitted.n_features_in_ == 10
    assert not hasattr(expert, "coef_")
    with pytest.raises(ValueError, match="3 features"):
        unfitted.predict(features[:, :3])
    with pytest.raises(ValueError, match="no class without training samples, of 14"):
        classifier(expert).fit(features, labels)
    with pytest.raises(ValueError, match=r"got 0 and 12"):
        classifier(expert, validation_classes=12).fit(features[train], labels[train])
