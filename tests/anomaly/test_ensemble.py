import warnings

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.linear_model import LogisticRegressionCV

from postern.anomaly import LayerEnsemble
from postern.anomaly.ensemble import choose, choose_ensemble


def layer_scores(seed=0, gap=1.5):
    """Three layers on scales that differ by a million; only the first two tell."""
    rng = np.random.default_rng(seed)
    scale = np.array([1e3, 1.0, 1e-3])
    inside, outside = rng.normal(size=(200, 3)), rng.normal(size=(150, 3)) - [gap, gap, 0]
    return inside * scale, outside * scale


def test_log_odds_are_those_of_logistic_regression_on_standardised_scores():
    inside, outside = layer_scores()
    ensemble = LayerEnsemble().fit(inside, outside)
    both = np.concatenate([inside, outside])
    standard = (both - both.mean(axis=0)) / both.std(axis=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        reference = LogisticRegressionCV(cv=5).fit(standard, np.repeat([1, 0], [200, 150]))
    np.testing.assert_allclose(ensemble.score_samples(both), reference.decision_function(standard), rtol=1e-6)


def test_weights_are_in_units_of_the_raw_scores():
    inside, outside = layer_scores()
    ensemble = LayerEnsemble().fit(inside, outside)
    constant = ensemble.score_samples(inside) - inside @ ensemble.weights_
    np.testing.assert_allclose(constant, constant[0], rtol=1e-6)
    assert ensemble.weights_[0] > 0
    assert ensemble.weights_[1] > 0


def test_the_units_of_the_layers_do_not_matter():
    inside, outside = layer_scores()
    scale = np.array([1e-3, 7.0, 1e5])
    ensemble, scaled = LayerEnsemble().fit(inside, outside), LayerEnsemble().fit(inside * scale, outside * scale)
    np.testing.assert_allclose(ensemble.score_samples(inside), scaled.score_samples(inside * scale), rtol=1e-4)


def test_scikit_learn_conventions():
    assert clone(LayerEnsemble(cv=3)).get_params() == {"cv": 3}


def test_choice_is_the_best_and_the_first_of_equals():
    good, bad = np.array([2.0, 3.0]), np.array([0.0, 1.0])
    candidates = [("bad", bad, good), ("good", good, bad), ("as good", good + 1, bad)]
    assert choose(candidates, "auroc") == "good"
    assert choose(candidates, "tnr95") == "good"


def test_ensembles_are_fitted_on_one_half_and_compared_on_the_other():
    def halves(gaps):
        (fit_inside, fit_outside), (held_inside, held_outside) = (layer_scores(seed, gap) for seed, gap in gaps)
        inside, outside = np.empty((400, 3)), np.empty((300, 3))
        inside[0::2], inside[1::2], outside[0::2], outside[1::2] = fit_inside, held_inside, fit_outside, held_outside
        return inside, outside

    overfitted, honest = halves([(0, 5.0), (1, 0.0)]), halves([(2, 2.0), (3, 2.0)])
    setting, ensemble = choose_ensemble([("overfitted", *overfitted), ("honest", *honest)], "auroc", 5)
    assert setting == "honest"
    expected = LayerEnsemble().fit(honest[0][0::2], honest[1][0::2])
    np.testing.assert_allclose(ensemble.weights_, expected.weights_)


def test_bad_input():
    inside, outside = layer_scores()
    with pytest.raises(ValueError, match="3 and 2"):
        LayerEnsemble().fit(inside, outside[:, :2])
    with pytest.raises(ValueError, match=r"5 folds.*3 outside"):
        LayerEnsemble().fit(inside, outside[:3])
    with pytest.raises(ValueError, match="NaN"):
        LayerEnsemble().fit(inside, np.full((20, 3), np.nan))
    with pytest.raises(ValueError, match="accuracy"):
        choose([("a", inside[:, 0], outside[:, 0])], "accuracy")
    with pytest.raises(ValueError, match="at least one setting"):
        choose([], "auroc")
