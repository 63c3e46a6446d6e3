import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.base import clone
from sklearn.covariance import EmpiricalCovariance, LedoitWolf, ShrunkCovariance
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.utils.estimator_checks import check_estimator

from postern.anomaly import TiedGaussian, squared_distances, whitening_matrix


def clusters(seed=0, samples=90, features=5, classes=3):
    """Correlated clusters of unequal sizes."""
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(classes), rng.choice(classes, samples - classes, p=[0.5, 0.3, 0.2][:classes])])
    mixing = rng.normal(size=(features, features))
    centres = 3 * rng.normal(size=(classes, features))
    return centres[labels] + rng.normal(size=(samples, features)) @ mixing, labels


def naive_scores(features, means, precision):
    """The quadratic form, one sample and one class at a time."""
    return np.array([[-(f - mean) @ precision @ (f - mean) for mean in means] for f in features])


def test_estimates_are_maximum_likelihood():
    features, labels = clusters()
    gaussian = TiedGaussian().fit(features, labels)
    means = np.stack([features[labels == c].mean(axis=0) for c in range(3)])
    reference = EmpiricalCovariance(assume_centered=False).fit(features - means[labels])
    np.testing.assert_allclose(gaussian.means_, means, rtol=1e-12)
    np.testing.assert_allclose(gaussian.covariance_, reference.covariance_, rtol=1e-10)
    np.testing.assert_allclose(gaussian.precision_, reference.precision_, rtol=1e-8)
    np.testing.assert_array_equal(gaussian.class_count_, np.bincount(labels))
    np.testing.assert_allclose(gaussian.class_scores(features), naive_scores(features, means, reference.precision_))
    distances = np.min([reference.mahalanobis(features - mean) for mean in means], axis=0)
    # scikit-learn subtracts the (vanishing) mean of the centred features again
    np.testing.assert_allclose(-gaussian.score_samples(features), distances, rtol=1e-8)


def test_predictions_are_those_of_discriminant_analysis_with_equal_priors():
    features, _ = clusters(1, samples=300)
    labels = np.repeat([4, 7, 9], 100)
    features += np.eye(5)[np.repeat([0, 1, 2], 100)]
    reference = LinearDiscriminantAnalysis(solver="lsqr", priors=[1 / 3] * 3).fit(features, labels)
    np.testing.assert_array_equal(TiedGaussian().fit(features, labels).predict(features), reference.predict(features))


def test_shrinkage_is_that_of_scikit_learn():
    features, labels = clusters(2)
    centred = features - np.stack([features[labels == c].mean(axis=0) for c in range(3)])[labels]
    for shrinkage, amount, reference in [
        ("ledoit_wolf", LedoitWolf(assume_centered=True).fit(centred).shrinkage_, LedoitWolf(assume_centered=True)),
        (0.3, 0.3, ShrunkCovariance(shrinkage=0.3, assume_centered=True)),
    ]:
        gaussian = TiedGaussian(shrinkage).fit(features, labels)
        assert gaussian.shrinkage_ == pytest.approx(amount)
        np.testing.assert_allclose(gaussian.precision_, reference.fit(centred).precision_, rtol=1e-8)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 89), max_size=6, unique=True))
def test_any_split_into_batches_gives_the_same_estimates(seed, cuts):
    features, labels = clusters(seed % 1000)
    features = features + 1e4  # far from the origin, where sums of squares would lose digits
    order = np.random.default_rng(seed).permutation(90)
    streamed = TiedGaussian()
    for batch in np.split(order, sorted(cuts)):
        streamed.partial_fit(features[batch], labels[batch])
    whole = TiedGaussian().fit(features, labels)
    np.testing.assert_array_equal(streamed.classes_, whole.classes_)
    np.testing.assert_allclose(streamed.means_, whole.means_, rtol=1e-12)
    np.testing.assert_allclose(streamed.covariance_, whole.covariance_, rtol=1e-8, atol=1e-10)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_scores_do_not_change_under_an_invertible_affine_map(seed):
    features, labels = clusters(seed)
    rng = np.random.default_rng(seed)
    rotation, _ = np.linalg.qr(rng.normal(size=(5, 5)))
    mapping = rotation * rng.uniform(0.2, 5, 5)
    mapped = features @ mapping + rng.normal(size=5)
    scores = TiedGaussian().fit(features, labels).class_scores(features)
    np.testing.assert_allclose(TiedGaussian().fit(mapped, labels).class_scores(mapped), scores, rtol=1e-6)


def test_add_class_is_algorithm_2():
    features, labels = clusters(3)
    new = np.random.default_rng(5).normal(2, 1.5, (7, 5))
    gaussian = TiedGaussian().fit(features, labels)
    before = gaussian.covariance_.copy()
    gaussian.class_scores(features)  # the factors computed here must not survive
    gaussian.add_class(new, 3)
    expected = 3 / 4 * before + 1 / 4 * np.cov(new, rowvar=False, bias=True)
    np.testing.assert_allclose(gaussian.covariance_, expected, rtol=1e-12)
    np.testing.assert_allclose(gaussian.means_[3], new.mean(axis=0))
    np.testing.assert_array_equal(gaussian.classes_, [0, 1, 2, 3])
    expected_scores = naive_scores(new, gaussian.means_, np.linalg.inv(expected))
    np.testing.assert_allclose(gaussian.class_scores(new), expected_scores, rtol=1e-8)
    again = gaussian.add_class(new + 9, 4)
    np.testing.assert_allclose(
        again.covariance_, 4 / 5 * expected + 1 / 5 * np.cov(new, rowvar=False, bias=True), rtol=1e-9
    )


def test_an_added_class_stands_where_its_label_belongs():
    features, labels = clusters(4)
    gaussian = TiedGaussian().fit(features, labels * 2).add_class(features[:9] + 50, 3)
    np.testing.assert_array_equal(gaussian.classes_, [0, 2, 3, 4])
    np.testing.assert_array_equal(gaussian.predict(features[:9] + 50), [3] * 9)
    np.testing.assert_array_equal(gaussian.class_count_[[0, 1, 3]], np.bincount(labels))


def test_dead_and_duplicate_features_change_nothing():
    features, labels = clusters(5)
    scores = TiedGaussian().fit(features, labels).score_samples(features)
    padded = np.column_stack([features, np.zeros(90), features[:, 0]])
    gaussian = TiedGaussian().fit(padded, labels)
    np.testing.assert_allclose(gaussian.score_samples(padded), scores, rtol=1e-8)
    np.testing.assert_allclose(gaussian.precision_, np.linalg.pinv(gaussian.covariance_), atol=1e-9)
    revived = padded.copy()
    revived[:, 5] = 100  # a channel that was dead in training says nothing
    np.testing.assert_allclose(gaussian.score_samples(revived), scores, rtol=1e-8)


def test_higher_is_more_normal():
    features, labels = clusters(6)
    gaussian = TiedGaussian().fit(features, labels)
    np.testing.assert_allclose(gaussian.score_samples(gaussian.means_), 0, atol=1e-9)
    near, far = gaussian.score_samples(gaussian.means_ + 0.1), gaussian.score_samples(gaussian.means_ + 100)
    assert (far < near).all()
    assert (near < 0).all()


def test_float32_distances_agree_with_float64():
    """Means far from the origin and from each other, as features of a wide layer are."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(10), 100)
    features = 50 + 2 * rng.normal(size=(10, 64))[labels] + rng.normal(size=(1000, 64)) * rng.uniform(0.01, 1, 64)
    gaussian = TiedGaussian().fit(features, labels)
    factors = [torch.from_numpy(factor).float() for factor in gaussian.factors()]
    single = squared_distances(torch.from_numpy(features).float(), *factors)
    np.testing.assert_allclose(single.numpy(), -gaussian.class_scores(features), rtol=1e-3)


def test_distances_have_exact_gradients():
    features, labels = clusters(7)
    factors = [torch.from_numpy(factor) for factor in TiedGaussian().fit(features, labels).factors()]
    points = torch.from_numpy(features[:4]).requires_grad_()
    assert torch.autograd.gradcheck(lambda f: squared_distances(f, *factors), (points,))


def test_whitening_makes_the_covariance_the_identity():
    features, _ = clusters(8)
    covariance = np.cov(features, rowvar=False)
    whitening = whitening_matrix(covariance)
    np.testing.assert_allclose(whitening.T @ covariance @ whitening, np.eye(5), atol=1e-10)


def test_scikit_learn_conventions():
    gaussian = TiedGaussian(shrinkage=0.1)
    assert clone(gaussian).get_params() == {"shrinkage": 0.1}
    check_estimator(
        gaussian,
        expected_failed_checks={
            "check_fit_score_takes_y": "the arguments are called features and labels",
            "check_partial_fit_n_features": "partial_fit needs no list of classes: they may appear in any batch",
            "check_estimators_partial_fit_n_features": "the same",
            "check_n_features_in_after_fitting": "the same",
        },
    )


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda x, y: TiedGaussian(-0.1).fit(x, y), "-0.1"),
        (lambda x, y: TiedGaussian("oracle").fit(x, y), "oracle"),
        (lambda x, y: TiedGaussian(True).fit(x, y), "True"),
        (lambda x, y: TiedGaussian("ledoit_wolf").partial_fit(x, y), "all samples"),
        (lambda x, y: TiedGaussian().fit(x, y[:-1]), "inconsistent"),
        (lambda x, y: TiedGaussian().fit(np.where(x > 0, np.nan, x), y), "NaN"),
        (lambda x, y: TiedGaussian().fit(np.ones_like(x), y).score_samples(x), "do not vary"),
        (lambda x, y: TiedGaussian().fit(x, y).score_samples(x[:, :2]), "2 features"),
        (lambda x, y: TiedGaussian().fit(x, y).add_class(x, 1), "new class"),
        (lambda x, y: TiedGaussian().fit(x, y).add_class(x, 5).partial_fit(x, y), "add_class"),
        (lambda x, y: whitening_matrix(np.full((2, 2), np.nan)), "finite"),
    ],
)
def test_bad_input(act, message):
    with pytest.raises(ValueError, match=message):
        act(*clusters())
