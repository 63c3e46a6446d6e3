import copy
import pickle

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.covariance import LedoitWolf
from sklearn.exceptions import NotFittedError
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from postern.anomaly import FeatureTaps, LayerDistances, LayerEnsemble, MahalanobisDetector, TiedGaussian, ood_metrics
from postern.anomaly.gaussian import Factors
from postern.nets import ConvNet, Normalize
from postern.robust import fgsm
from tests.anomaly.networks import digits, noise, trained
from tests.modules import check_module

LAYERS = ["stages.0", "stages.1", "stages.2"]


@pytest.fixture(scope="module")
def detector():
    images, labels, _, _ = digits()
    return MahalanobisDetector(trained(), LAYERS).fit(images, labels)


def pooled(network, images, stage):
    """Features of one stage, computed without taps."""
    with torch.no_grad():
        for module in network.stages[: stage + 1]:
            images = module(images)
    return images.mean(dim=(2, 3))


def literal_score(network, train, labels, images, stage):
    """Equations 1 and 2 written out in float64, class by class."""
    features, points = (pooled(network, x, stage).double().numpy() for x in (train, images))
    means = [features[labels == c].mean(axis=0) for c in range(10)]
    centred = features - np.stack(means)[labels]
    precision = np.linalg.pinv(centred.T @ centred / len(features), hermitian=True)
    return np.max([-np.einsum("ni,ij,nj->n", points - mean, precision, points - mean) for mean in means], axis=0)


def test_scores_of_all_layers_are_equations_1_and_2(detector):
    images, labels, test, _ = digits()
    expected = np.column_stack([literal_score(trained(), images, labels.numpy(), test, stage) for stage in range(3)])
    np.testing.assert_allclose(detector.layer_scores(test), expected, rtol=2e-4, atol=1e-3)
    np.testing.assert_array_equal(detector.score_samples(test), detector.layer_scores(test)[:, -1])


def test_streaming_batch_size_and_loader_change_nothing(detector):
    images, labels, test, _ = digits()
    loader = DataLoader(TensorDataset(images, labels), batch_size=100)
    for other in (
        MahalanobisDetector(trained(), LAYERS, batch_size=37).fit(images, labels),
        MahalanobisDetector(trained(), LAYERS).fit(loader),
    ):
        for ours, theirs in zip(detector.gaussians_, other.gaussians_, strict=True):
            np.testing.assert_allclose(ours.covariance_, theirs.covariance_, rtol=1e-4, atol=1e-8)
        np.testing.assert_allclose(other.layer_scores(test), detector.layer_scores(test), rtol=1e-3)


def test_directions_are_the_signs_of_finite_differences():
    """Smooth network, in float64, so that central differences have the digits to tell the sign."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Conv2d(4, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3)
    )
    images, labels = torch.rand(60, 1, 6, 6), torch.arange(60) % 3
    distances = MahalanobisDetector(network, ["1", "3"]).fit(images, labels).distances()
    distances = copy.deepcopy(distances).double()
    x, h = images[:2].double(), 1e-6
    for layer, direction in enumerate(distances.directions(x)):
        for pixel in range(36):
            shift = torch.zeros(36, dtype=torch.float64)
            shift[pixel] = h
            shift = shift.view(1, 1, 6, 6)
            with torch.no_grad():
                slope = (distances.scores(x - shift) - distances.scores(x + shift))[:, layer] / (2 * h)
            tells = slope.abs() > 1e-6
            assert tells.any()
            assert torch.equal(direction.flatten(1)[tells, pixel], slope[tells].sign())


def test_the_step_is_the_papers(detector):
    """Equation 3 with the nearest class fixed before the step and found again after it, layer by layer."""
    _, _, test, _ = digits()
    images, eps, distances_of = test[:20], 0.02, detector.distances()
    expected = []
    for layer in range(3):
        x = images.clone().requires_grad_()
        _, distances = distances_of(x)
        nearest = distances[layer].argmin(dim=1)
        (gradient,) = torch.autograd.grad(distances[layer].gather(1, nearest[:, None]).sum(), x)
        stepped = x - eps * torch.where(gradient >= 0, 1.0, -1.0)
        expected.append(-distances_of(stepped)[1][layer].amin(dim=1).detach())
    np.testing.assert_allclose(detector.layer_scores(images, eps), torch.stack(expected, 1).numpy(), rtol=1e-3)


def test_a_small_step_raises_the_scores(detector):
    _, _, test, _ = digits()
    before, after = detector.layer_scores(test, 0.0), detector.layer_scores(test, 0.002)
    assert ((after > before).mean(axis=0) > 0.9).all()


def test_normalised_inputs_with_std_are_as_pixels_with_a_normalising_network():
    images, labels, test, _ = digits()
    inside = nn.Sequential(Normalize((0.3,), (0.35,)), copy.deepcopy(trained()))
    pixels = MahalanobisDetector(inside, ["1.stages.2"], eps=0.01).fit(images, labels)
    normalise = inside[0]
    normalised = MahalanobisDetector(inside[1], ["stages.2"], eps=0.01, std=(0.35,)).fit(normalise(images), labels)
    np.testing.assert_allclose(normalised.layer_scores(normalise(test)), pixels.layer_scores(test), rtol=1e-3)


def test_outliers_score_lower_and_are_refused(detector):
    _, _, test, _ = digits()
    detector = copy.deepcopy(detector)
    with pytest.raises(NotFittedError, match="calibrate"):
        detector.predict(test)
    detector.calibrate(test[:180], 0.9)
    assert 0.9 <= (detector.predict(test[:180]) == 1).mean() <= 0.92
    assert (detector.predict(noise(50)) == -1).mean() > 0.9
    np.testing.assert_allclose(
        detector.decision_function(test), detector.score_samples(test) - detector.offset_, rtol=1e-12
    )
    assert ood_metrics(detector.score_samples(test), detector.score_samples(noise(50)))["auroc"] > 0.95


def test_the_ensemble_weighs_the_layer_scores(detector):
    _, _, test, _ = digits()
    detector = copy.deepcopy(detector).fit_ensemble(test[:180], noise(100))
    expected = LayerEnsemble().fit(detector.layer_scores(test[:180]), detector.layer_scores(noise(100)))
    np.testing.assert_allclose(
        detector.score_samples(test[180:]), expected.score_samples(detector.layer_scores(test[180:])), rtol=1e-6
    )
    assert ood_metrics(detector.score_samples(test[180:]), detector.score_samples(noise(50, seed=1)))["auroc"] > 0.99


def test_tuning_takes_the_step_that_separates_the_held_out_half_best(detector):
    images, labels, test, test_labels = digits()
    outside = fgsm(trained(), test, test_labels, 0.1)
    steps = (0.0, 0.05, 0.3)
    tuned = copy.deepcopy(detector).tune(test, outside, steps, by="auroc")
    qualities = []
    for eps in steps:
        inside_scores, outside_scores = detector.layer_scores(test, eps), detector.layer_scores(outside, eps)
        ensemble = LayerEnsemble().fit(inside_scores[0::2], outside_scores[0::2])
        held = ensemble.score_samples(inside_scores[1::2]), ensemble.score_samples(outside_scores[1::2])
        qualities.append(ood_metrics(*held)["auroc"])
    assert len(set(qualities)) > 1
    assert tuned.eps_ == steps[int(np.argmax(qualities))]
    assert tuned.eps == 0.0  # what the user gave stays
    np.testing.assert_array_equal(tuned.layer_scores(test), tuned.layer_scores(test, tuned.eps_))
    assert tuned.fit(images, labels).ensemble_ is None


def test_classes_of_the_gaussian_classifier_and_a_class_added(detector):
    images, labels, test, test_labels = digits()
    assert (detector.predict_class(test) == test_labels.numpy()).mean() > 0.93
    known, known_test = labels < 9, test_labels < 9
    incremental = MahalanobisDetector(trained(), LAYERS).fit(images[known], labels[known])
    np.testing.assert_array_equal(incremental.classes_, np.arange(9))
    before = incremental.score_samples(test[~known_test])
    reference = TiedGaussian().fit(incremental.features(images[known])[-1], labels[known].numpy())
    reference.add_class(incremental.features(images[~known])[-1], 9)
    incremental.add_class(images[~known], 9)
    np.testing.assert_array_equal(incremental.predict_class(test), reference.predict(incremental.features(test)[-1]))
    np.testing.assert_allclose(
        incremental.score_samples(test), reference.score_samples(incremental.features(test)[-1]), rtol=1e-3
    )
    assert incremental.score_samples(test[~known_test]).mean() > before.mean()


def test_dead_channels_do_not_leak(detector):
    """A channel that is silent on the training set, and speaks on outliers, changes no score."""
    images, labels, test, _ = digits()
    network = ConvNet(1, 10, widths=(8,)).eval()
    dead = copy.deepcopy(network)
    with torch.no_grad():
        dead.stages[0][0].weight[0].fill_(-1.0)  # ReLU of minus a sum of pixels
    scores, silent = (
        MahalanobisDetector(model, ["stages.0"]).fit(images, labels).layer_scores(-test) for model in (network, dead)
    )
    assert np.isfinite(silent).all()
    features = MahalanobisDetector(dead, ["stages.0"]).fit(images, labels).features(-test)[0]
    assert features[:, 0].min() > 0
    living = TiedGaussian().fit(
        MahalanobisDetector(dead, ["stages.0"]).fit(images, labels).features(images)[0][:, 1:], labels.numpy()
    )
    np.testing.assert_allclose(silent[:, 0], living.score_samples(features[:, 1:]), rtol=1e-3)
    assert not np.allclose(scores, silent)


def test_ledoit_wolf_is_estimated_on_all_batches_together():
    images, labels, _, _ = digits()
    detector = MahalanobisDetector(trained(), LAYERS, shrinkage="ledoit_wolf", batch_size=100).fit(images, labels)
    features, classes = detector.features(images)[-1], labels.numpy()
    centred = features - np.stack([features[classes == c].mean(axis=0) for c in range(10)])[classes]
    reference = LedoitWolf(assume_centered=True).fit(centred)
    np.testing.assert_allclose(detector.gaussians_[-1].precision_, reference.precision_, rtol=1e-5)


def test_the_network_is_left_as_it_was():
    images, labels, test, _ = digits()
    network = copy.deepcopy(trained()).train()
    state, hooks = copy.deepcopy(network.state_dict()), [len(module._forward_hooks) for module in network.modules()]
    detector = MahalanobisDetector(network, LAYERS).fit(images, labels)
    detector.layer_scores(test, 0.01)
    assert all(module.training for module in network.modules())
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    np.testing.assert_allclose(
        detector.layer_scores(test[:5]),
        MahalanobisDetector(trained(), LAYERS).fit(images, labels).layer_scores(test[:5]),
    )
    assert [len(module._forward_hooks) for module in network.modules()] == hooks


def test_layer_distances_is_a_module():
    generator = torch.Generator().manual_seed(0)

    def build():
        factors = [
            Factors(torch.randn(width, 3, generator=generator), torch.randn(width), torch.randn(2, 3))
            for width in (4, 5)
        ]
        return LayerDistances(FeatureTaps(ConvNet(1, 3, widths=(4, 5)).eval(), ["stages.0", "stages.1"]), factors)

    def build_seeded():
        generator.manual_seed(0)
        return build()

    check_module(build_seeded, torch.rand(3, 1, 6, 6))


def test_scikit_learn_conventions(detector):
    images, labels, test, _ = digits()
    copied = clone(MahalanobisDetector(trained(), LAYERS, eps=0.01, shrinkage=0.1))
    params = copied.get_params()
    assert (params["layers"], params["eps"], params["shrinkage"], params["std"]) == (LAYERS, 0.01, 0.1, None)
    with pytest.raises(NotFittedError):
        copied.layer_scores(test)
    copied.set_params(eps=0.0, shrinkage=None).fit(images, labels)
    np.testing.assert_allclose(copied.layer_scores(test), detector.layer_scores(test), rtol=1e-5)
    restored = pickle.loads(pickle.dumps(detector))
    np.testing.assert_array_equal(restored.layer_scores(test), detector.layer_scores(test))


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda d, x, y: MahalanobisDetector(d.model, LAYERS, eps=-1).fit(x, y), "-1"),
        (lambda d, x, y: MahalanobisDetector(d.model, ["nope"]).fit(x, y), "no layer 'nope'"),
        (lambda d, x, y: MahalanobisDetector(d.model, LAYERS).fit(x, y[:-1]), "as many labels"),
        (lambda d, x, y: MahalanobisDetector(d.model, LAYERS).fit([]), "none"),
        (lambda d, x, y: MahalanobisDetector(d.model, LAYERS).fit([x]), "batches of"),
        (
            lambda d, x, y: MahalanobisDetector(d.model, LAYERS, std=(0.1, 0.2), eps=0.1).fit(x, y).score_samples(x),
            "std",
        ),
        (lambda d, x, y: d.layer_scores(x, -0.1), "-0.1"),
        (lambda d, x, y: d.layer_scores(x[:0]), "at least one"),
        (lambda d, x, y: d.layer_scores(x / 0), "NaN or infinity"),
        (lambda d, x, y: d.tune(x, x, magnitudes=()), "eps"),
        (lambda d, x, y: d.calibrate(x, 1.5), "1.5"),
        (lambda d, x, y: d.add_class(x, 3), "new class"),
    ],
)
def test_bad_input(detector, act, message):
    images, labels, _, _ = digits()
    with pytest.raises(ValueError, match=message):
        act(detector, images[:100], labels[:100])
