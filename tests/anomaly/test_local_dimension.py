import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.neighbors import NearestNeighbors

from postern.anomaly import LocalIntrinsicDimensionality, local_intrinsic_dimension
from postern.robust import fgsm
from tests.anomaly.networks import digits, noise, trained

LAYERS = ["stages.1", "stages.2"]


def test_estimate_is_the_formula_on_the_nearest_neighbours():
    points, reference = torch.rand(7, 4), torch.rand(50, 4)
    r, _ = NearestNeighbors(n_neighbors=12).fit(reference.numpy()).kneighbors(points.numpy())
    expected = -12 / np.log(r / r[:, -1:]).sum(axis=1)
    np.testing.assert_allclose(local_intrinsic_dimension(points, reference, 12).numpy(), expected, rtol=1e-4)


@pytest.mark.parametrize("dimension", [1, 3, 8])
def test_it_is_the_dimension_of_the_space_that_the_data_fill(dimension):
    """Uniform in a cube, embedded in ten dimensions by a rotation; the mean over points is near the truth."""
    generator = torch.Generator().manual_seed(0)
    rotation, _ = torch.linalg.qr(torch.randn(10, 10, generator=generator))
    samples = torch.rand(4000, dimension, generator=generator) @ rotation[:dimension]
    inner = samples[(samples @ rotation.T)[:, :dimension].sub(0.5).abs().amax(dim=1) < 0.25][:200]
    estimate = local_intrinsic_dimension(inner, samples, 20, is_in_reference=True).mean().item()
    assert estimate == pytest.approx(dimension, rel=0.15)


def test_a_point_of_the_reference_leaves_itself_out():
    reference = torch.rand(40, 3)
    for i in range(5):
        point, others = reference[i : i + 1], torch.cat([reference[:i], reference[i + 1 :]])
        torch.testing.assert_close(
            local_intrinsic_dimension(point, reference, 9, is_in_reference=True),
            local_intrinsic_dimension(point, others, 9),
        )


def test_copies_and_equal_distances_stay_finite():
    reference = torch.cat([torch.zeros(2, 2), torch.eye(2), -torch.eye(2)])
    estimates = local_intrinsic_dimension(torch.zeros(1, 2), reference, 4)
    assert 0 < estimates.item() < 0.1
    assert torch.isfinite(local_intrinsic_dimension(torch.zeros(1, 2), reference[2:], 4)).all()


def test_scores_are_negative_dimensions_layer_by_layer():
    images, _, test, _ = digits()
    detector = LocalIntrinsicDimensionality(trained(), LAYERS, num_neighbors=15, batch_size=64).fit(images)
    chosen = torch.from_numpy(np.random.default_rng(0).choice(len(images), 100, replace=False))
    with torch.no_grad():
        reference, points = trained().features(images[chosen]), trained().features(test)
    expected = -local_intrinsic_dimension(points, reference, 15)
    np.testing.assert_allclose(detector.layer_scores(test)[:, 1], expected.numpy(), rtol=1e-4)
    np.testing.assert_array_equal(detector.score_samples(test), detector.layer_scores(test)[:, 1])


def test_tuned_on_attacks_it_finds_them():
    images, _, test, labels = digits()
    attacked = fgsm(trained(), test, labels, 0.2)
    detector = LocalIntrinsicDimensionality(trained(), LAYERS).fit(images).tune(test, attacked, (5, 20, 60))
    assert detector.num_neighbors_ in (5, 20, 60)
    assert detector.score_samples(attacked).mean() < detector.score_samples(test).mean()


def test_scikit_learn_conventions_and_bad_input():
    images, _, test, _ = digits()
    detector = clone(LocalIntrinsicDimensionality(trained(), LAYERS, num_neighbors=7))
    assert detector.get_params()["num_neighbors"] == 7
    with pytest.raises(NotFittedError):
        detector.score_samples(test)
    with pytest.raises(ValueError, match=r"100 references.*got 20"):
        detector.fit(images[:20])
    with pytest.raises(ValueError, match="got 1"):
        detector.set_params(num_neighbors=1).fit(images)
    with pytest.raises(ValueError, match=r"got \[101\]"):
        detector.set_params(num_neighbors=7).fit(images).tune(test, noise(20), neighbors=(101,))
    with pytest.raises(ValueError, match="other reference samples"):
        local_intrinsic_dimension(torch.rand(3, 2), torch.rand(5, 2), 5, is_in_reference=True)
