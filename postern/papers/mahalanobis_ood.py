"""Mahalanobis detector: normal is what lies near a class mean in a network's features, layer by layer."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date
from typing import Literal

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.metrics import roc_curve
from torch import Tensor, nn
from torch.nn import functional as F

from postern.anomaly import (
    ODIN,
    LocalIntrinsicDimensionality,
    MahalanobisDetector,
    MaxSoftmax,
    OutlierDetector,
    ood_metrics,
)
from postern.claims import AllOf, AtLeast, Difference, Metrics, Paper, Run
from postern.data import Images, load, shift_and_mirror
from postern.nets import ConvNet, ResNet, evaluating, resnet34
from postern.robust import ascend, bim, carlini_wagner_l2, deepfool, fgsm

PAPER = Paper(
    slug="mahalanobis-ood",
    title="A Simple Unified Framework for Detecting Out-of-Distribution Samples and Adversarial Attacks",
    date=date(2018, 7, 10),
    arxiv="1807.03888",
    authors=4,
    family="anomaly",
    summary=(
        "A classifier gives confident answers also to inputs that it knows nothing of. The paper fits one Gaussian a "
        "class, with a common covariance, to the features of a trained network, and calls an input abnormal that is "
        "far from all class means; a small step on the input and several layers make the score sharper. No training "
        "of the network is needed. One detector serves for foreign images and for adversarial ones, and the same "
        "Gaussians learn new classes. It is for whoever must know when not to trust a classifier."
    ),
    reported=(
        "ResNet-34 on CIFAR-10, SVHN as the foreign images, TNR at 95 % TPR / AUROC: maximum softmax 32.47 / 89.88, "
        "ODIN 86.55 / 96.65, last layer alone 54.51 / 93.92, with input pre-processing and all layers 96.42 / 99.14.",
        "Either of the two additions alone brings the TNR to above 91.",
        "CIFAR-100 against LSUN, ResNet-34: TNR 45.6 with ODIN, 90.9 with the method.",
        "Adversarial images of Carlini and Wagner's attack: 82.9 with local intrinsic dimensionality, 95.8 with the "
        "method.",
        "Class-incremental, half of CIFAR-100 as new classes: area under the curve of base against new accuracy 40.0, "
        "against 32.7 for a softmax head and 32.9 for Euclidean distances.",
        "The lead stays with noisy labels and with few training samples.",
    ),
    components=(
        "postern.anomaly.MahalanobisDetector",
        "postern.anomaly.LayerDistances",
        "postern.anomaly.LayerEnsemble",
        "postern.anomaly.TiedGaussian",
        "postern.anomaly.FeatureTaps",
        "postern.anomaly.MaxSoftmax",
        "postern.anomaly.ODIN",
        "postern.anomaly.LocalIntrinsicDimensionality",
        "postern.anomaly.ood_metrics",
    ),
    code="pokaxpoka/deep_Mahalanobis_detector",
    details=(
        "Features are means over space, one number a channel, in evaluation mode and without augmentation. All "
        "training samples count, also the misclassified ones.",
        "The step on the input is taken separately for each layer, towards the class that is closest there; after the "
        "step the closest class is looked for again. Its sign is plus one where the gradient is zero.",
        "The step is measured in pixels between 0 and 1: where a network is given normalised pixels, the sign is "
        "divided by the deviation that they were normalised with.",
        "A channel that is silent on the training set has no variance. The pseudo-inverse leaves it out; a plain "
        "inverse makes it decide everything.",
        "Training features of an overfitted network lie closer to the means than those of new normal inputs, so a "
        "threshold must come from held-out inputs.",
        "The published tables for foreign images tune step and weights on a thousand of the foreign images themselves, "
        "which is more than the plain softmax is given. Tuning on adversarial images of one's own is the fairer way.",
        "Distances are sums of squares of whitened features: two matrix products for any number of classes. The "
        "official code multiplies a batch with its own transpose for each class and keeps the diagonal.",
    ),
    differences=(
        "The scores of the layers differ in scale by orders of magnitude; they are standardised before the regression.",
        "The score is minus the squared distance; the official code halves it.",
        "All layers come from one forward pass where the official code runs one a layer; gradients share one graph.",
        "The covariance can be shrunk (Ledoit-Wolf), which the paper does not do.",
        "Local intrinsic dimensionality looks for neighbours among training inputs, not, as the official code does, "
        "among the clean images that the adversarial ones were made from.",
        "Carlini and Wagner's attack searches for its weight; the official code fixes it.",
        "Steps are chosen by AUROC, as the claims are judged; for foreign images the official code takes the TNR.",
        "Average precision is the sum over steps; the official code takes the trapezoid rule.",
        "At the small scale digits of 14 x 14 pixels and a network of four convolutions stand in for CIFAR-10 and "
        "ResNet-34.",
    ),
    example="""import torch
from torch.nn.functional import cross_entropy

from postern.anomaly import MahalanobisDetector, ood_metrics
from postern.data import load
from postern.nets import ConvNet

torch.manual_seed(0)
train, test = load("digits", "train"), load("digits", "test")
network = ConvNet(in_channels=1, num_classes=10, widths=(8, 16, 16))
optimizer = torch.optim.Adam(network.parameters(), 0.01)
for _ in range(8):
    for batch in torch.randperm(len(train)).split(64):
        optimizer.zero_grad()
        cross_entropy(network(train.scaled()[batch]), train.labels[batch]).backward()
        optimizer.step()

detector = MahalanobisDetector(network, layers=network.layers)
detector.fit(train.scaled(), train.labels)
digits, noise = test.scaled(), torch.rand(300, 1, 8, 8)
detector.calibrate(digits[:180])  # on digits that the network was not trained on
print("digits accepted:", (detector.predict(digits[180:]) == 1).mean())
print("noise accepted: ", (detector.predict(noise) == 1).mean())
print(ood_metrics(detector.score_samples(digits[180:]), detector.score_samples(noise)))
""",
)

# The paper's grid, and one step more: the best step grows with the contrast of the images.
STEPS = (0.0, 0.0005, 0.001, 0.0014, 0.002, 0.005, 0.01, 0.02)


@dataclass(frozen=True)
class Classifier:
    """A network, what it is trained on, and which images are kept for the detectors."""

    dataset: str = "ylecun/mnist"
    side: int = 14  # pixels; images are averaged down to it
    classes: tuple[int, ...] = tuple(range(10))  # that the network is trained on
    training_images: int = 8000
    validation_images: int = 1000  # to fit and tune detectors: half of them each
    test_images: int = 2000
    widths: tuple[int, ...] = (16, 32, 64, 64)  # of the convolutional network's stages; empty for ResNet-34
    epochs: int = 4
    batch: int = 128
    learning_rate: float = 0.1  # peak of the one-cycle schedule of SGD with momentum 0.9
    augmentation: bool = False  # crops after padding by an eighth of the side, and mirroring
    noisy_labels: float = 0.0  # share of the training labels that are drawn at random
    fgsm_step: float = 0.1  # pixels, of the adversarial images that detectors are fitted on


SMOKE = Classifier(
    dataset="digits",
    side=8,
    training_images=1437,
    validation_images=160,
    test_images=200,
    widths=(8, 16, 16),
    epochs=6,
    batch=64,
)
FULL = Classifier(
    dataset="uoft-cs/cifar10",
    side=32,
    training_images=50_000,
    test_images=8000,
    widths=(),
    epochs=200,
    augmentation=True,
    fgsm_step=0.05,
)
SMALL = Classifier()


# -- foreign images -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Foreign:
    """A classifier, and the kinds of images that it was not made for."""

    classifier: Classifier
    outside: tuple[str, ...]  # data sets, or "noise" and "shuffled"


@PAPER.claim(
    "The Mahalanobis ensemble, fitted without any foreign images, finds foreign images better than the maximum softmax "
    "(by 0.02 in mean AUROC) and at least as well as ODIN tuned on them, and rejects 95 % of every kind.",
    reported="CIFAR-10 against SVHN, all tuned on SVHN: AUROC 99.14, maximum softmax 89.88, ODIN 96.65; TNR 96.42.",
    holds_when=AllOf(
        Difference("mahalanobis_mean_auroc", "softmax_mean_auroc", at_least=0.02),
        AtLeast("least_lead_over_odin", 0.0),
        AtLeast("mahalanobis_least_tnr95", 0.95),
    ),
    scales={
        "smoke": Foreign(SMOKE, ("noise", "shuffled")),
        "small": Foreign(SMALL, ("uoft-cs/cifar10", "noise", "shuffled")),
        "full": Foreign(FULL, ("ufldl-stanford/svhn", "ylecun/mnist", "noise", "shuffled")),
    },
    seeds=5,
    note=(
        "The ensemble's weights and step come from FGSM images of digits; ODIN's temperature and step from a thousand "
        "images of the very kind that it is tested on. These are far from digits: see the claim on held-out classes "
        "for what is near. Photographs and noise are brighter than digits, which any layer's features show, while the "
        "softmax is surest of all about them; the shuffled images, of the normal set with their quadrants exchanged, "
        "are the harder test."
    ),
)
def finds_foreign_images(config: Foreign, run: Run) -> Metrics:
    """Train a classifier, fit the detectors, and score images of other kinds."""
    setting = config.classifier
    study = _study(setting, run)
    foreign = {
        _short(name): _outside(name, study, setting, run, 10 + index) for index, name in enumerate(config.outside)
    }
    normal, adversarial = _fgsm_validation(study, setting, run)
    detectors: dict[str, OutlierDetector] = {
        "softmax": MaxSoftmax(study.network),
        "last_layer": study.mahalanobis(study.layers[-1:]),
        "last_layer_shrunk": study.mahalanobis(study.layers[-1:], shrinkage="ledoit_wolf"),
        "mahalanobis": study.mahalanobis().tune(normal, adversarial, STEPS, by="auroc"),
    }
    inside = {name: detector.score_samples(study.test) for name, detector in detectors.items()}
    quality: dict[tuple[str, str], dict[str, float]] = {}
    for kind, images in run.progress(foreign.items(), "foreign images", total=len(foreign)):
        tuning, test = images[: len(study.validation)], images[len(study.validation) :]
        tuned = {
            "odin": ODIN(study.network).tune(study.validation, tuning, magnitudes=STEPS, by="auroc"),
            "mahalanobis_tuned_on_it": study.mahalanobis().fit_ensemble(study.validation, tuning),
        }
        for name, detector in {**detectors, **tuned}.items():
            scores = inside[name] if name in inside else detector.score_samples(study.test)
            quality[name, kind] = ood_metrics(scores, detector.score_samples(test))
    rows = [{"images": kind, "detector": name, **measured} for (name, kind), measured in quality.items()]
    run.table("detection of foreign images", rows)
    auroc = _aurocs(quality)
    run.figure(
        "auroc-by-kind",
        _bars(auroc, ("softmax", "odin", "last_layer", "mahalanobis"), tuple(foreign)),
        "AUROC by kind of foreign images. " + _in_words(auroc),
    )
    return {
        "accuracy": study.accuracy,
        **{f"{name}_mean_auroc": _mean(auroc[name, kind] for kind in foreign) for name in (*detectors, "odin")},
        "least_lead_over_odin": min(auroc["mahalanobis", kind] - auroc["odin", kind] for kind in foreign),
        "mahalanobis_least_tnr95": min(quality["mahalanobis", kind]["tnr95"] for kind in foreign),
        **{f"{name}_auroc_{kind}": value for (name, kind), value in auroc.items()},
    }


@dataclass(frozen=True)
class Near:
    """A classifier, and images that resemble what it was made for: classes held out, or another data set."""

    classifier: Classifier
    held_out: tuple[int, ...] = ()
    dataset: str = ""  # empty for the held-out classes


NEAR = {
    "smoke": Near(replace(SMOKE, classes=tuple(range(8))), held_out=(8, 9)),
    "small": Near(replace(SMALL, classes=tuple(range(8))), held_out=(8, 9)),
    "full": Near(FULL, dataset="uoft-cs/cifar100"),
}


@PAPER.claim(
    "The Mahalanobis ensemble also finds images of classes that were held out better than the maximum softmax does.",
    reported="Not reported: the paper's foreign images are of other data sets.",
    holds_when=Difference("mahalanobis_auroc", "softmax_auroc", at_least=0.0),
    scales=NEAR,
    seeds=5,
    note=(
        "Digits 8 and 9, by a network that was trained on the others. The ensemble has every advantage: its weights "
        "and its step are tuned on images of the held-out classes, where the maximum softmax has nothing to tune. A "
        "new digit lies between the known ones in the features, where distances along directions without much variance "
        "say little, and the softmax is undecided just there. Others have found the same for CIFAR-10 and CIFAR-100."
    ),
)
def finds_held_out_classes(config: Near, run: Run) -> Metrics:
    """Train a classifier on some classes, and score images of the others."""
    study = _study(config.classifier, run)
    tuning, test = _near(config, study, run)
    normal, adversarial = _fgsm_validation(study, config.classifier, run)
    detectors: dict[str, OutlierDetector] = {
        "softmax": MaxSoftmax(study.network),
        "odin": ODIN(study.network).tune(study.validation, tuning, magnitudes=STEPS, by="auroc"),
        "last_layer": study.mahalanobis(study.layers[-1:]),
        "last_layer_shrunk": study.mahalanobis(study.layers[-1:], shrinkage="ledoit_wolf"),
        "mahalanobis_fgsm": study.mahalanobis().tune(normal, adversarial, STEPS, by="auroc"),
        "mahalanobis": study.mahalanobis().tune(study.validation, tuning, STEPS, by="auroc"),
    }
    scores = {
        name: (detector.score_samples(study.test), detector.score_samples(test))
        for name, detector in run.progress(detectors.items(), "detectors", total=len(detectors))
    }
    quality = {name: ood_metrics(*pair) for name, pair in scores.items()}
    run.table("detection of near images", [{"detector": name, **measured} for name, measured in quality.items()])
    run.figure(
        "roc",
        _roc_curves({name: scores[name] for name in ("softmax", "odin", "last_layer", "mahalanobis")}),
        "ROC curves for images near the training set. AUROC: "
        + ", ".join(f"{name} {measured['auroc']:.3f}" for name, measured in quality.items()),
    )
    return {"accuracy": study.accuracy} | {f"{name}_auroc": measured["auroc"] for name, measured in quality.items()}


@PAPER.claim(
    "On held-out classes, input pre-processing and the ensemble of layers each do no worse than the plain last layer.",
    reported="CIFAR-10 against SVHN: TNR 54.51 without, 92.26 and 91.45 with one of them, 96.42 with both.",
    holds_when=AllOf(
        Difference("preprocessed_auroc", "last_layer_auroc", at_least=0.0),
        Difference("ensemble_auroc", "last_layer_auroc", at_least=0.0),
    ),
    scales=NEAR,
    seeds=8,
    note=(
        "Measured where the score is far from perfect: on foreign images of other kinds nothing is left to gain. Step "
        "and weights are chosen on half of the validation images each, from both sides, as in the paper's main table."
    ),
)
def gains_from_each_part(config: Near, run: Run) -> Metrics:
    """Add the parts to the last layer's score, one by one and together."""
    study = _study(config.classifier, run)
    tuning, test = _near(config, study, run)
    last = study.mahalanobis(study.layers[-1:])
    detectors = {
        "last_layer": last,
        "preprocessed": study.mahalanobis(study.layers[-1:]).tune(study.validation, tuning, STEPS, by="auroc"),
        "ensemble": study.mahalanobis().fit_ensemble(study.validation, tuning),
        "both": study.mahalanobis().tune(study.validation, tuning, STEPS, by="auroc"),
    }
    quality = {
        name: ood_metrics(detector.score_samples(study.test), detector.score_samples(test))
        for name, detector in run.progress(detectors.items(), "parts", total=len(detectors))
    }
    rows = [{"detector": name, "step": detectors[name].eps_, **measured} for name, measured in quality.items()]
    run.table("parts", rows)
    by_step = {
        eps: ood_metrics(last.layer_scores(study.test, eps)[:, 0], last.layer_scores(test, eps)[:, 0])["auroc"]
        for eps in STEPS
    }
    run.figure(
        "auroc-by-step",
        _step_curve(by_step),
        "AUROC of the last layer against the size of the step on the input: "
        + ", ".join(f"{eps:g}: {value:.3f}" for eps, value in by_step.items()),
    )
    return (
        {"accuracy": study.accuracy}
        | {f"{name}_auroc": measured["auroc"] for name, measured in quality.items()}
        | {f"{name}_tnr95": measured["tnr95"] for name, measured in quality.items()}
        | {f"{name}_step": detector.eps_ for name, detector in detectors.items()}
    )


# -- adversarial images -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attacks:
    """A classifier, and the attacks that its detectors meet."""

    classifier: Classifier
    bim_step: float = 0.02  # pixels
    bim_steps: int = 5
    deepfool_overshoot: float = 0.1
    carlini_wagner_steps: int = 100
    carlini_wagner_searches: int = 2
    adaptive_weights: tuple[float, ...] = (1.0, 0.3, 0.1, 0.03, 0.0)  # of the detector's log-odds
    adaptive_margin: float = 1.0  # of the wrong logit over the right one, beyond which the attack is content
    adaptive_steps: int = 40


@PAPER.claim(
    "Fitted on FGSM alone, the Mahalanobis ensemble finds BIM and Carlini-Wagner images with an AUROC of 0.95, and "
    "better than local intrinsic dimensionality and the maximum softmax do.",
    reported="Carlini-Wagner images, ResNet: 95.8 against 82.9 for local intrinsic dimensionality.",
    holds_when=AllOf(
        AtLeast("mahalanobis_auroc_bim", 0.95),
        AtLeast("mahalanobis_auroc_carlini_wagner", 0.95),
        Difference("mahalanobis_auroc_bim", "dimensionality_auroc_bim", at_least=0.0),
        Difference("mahalanobis_auroc_carlini_wagner", "dimensionality_auroc_carlini_wagner", at_least=0.0),
        Difference("mahalanobis_auroc_bim", "softmax_auroc_bim", at_least=0.0),
        Difference("mahalanobis_auroc_carlini_wagner", "softmax_auroc_carlini_wagner", at_least=0.0),
    ),
    scales={
        "smoke": Attacks(
            replace(SMOKE, test_images=100), carlini_wagner_steps=30, carlini_wagner_searches=3, adaptive_steps=10
        ),
        "small": Attacks(replace(SMALL, test_images=500)),
        "full": Attacks(replace(FULL, test_images=5000), bim_step=0.01, bim_steps=6),
    },
    seeds=5,
    note=(
        "Normal are clean images and copies with Gaussian noise of the attack's own l2 norm; images count that are "
        "classified rightly clean and noisy, and wrongly after the attack. DeepFool and Carlini and Wagner stop just "
        "beyond the boundary: their changes are the smallest for the features, and the softmax finds them at once, "
        "since it is undecided there. Shown besides are the ensemble fitted on a quarter of each attack itself (known, "
        "as in the paper's main table) and an attack within BIM's bound that raises the detector's own score while it "
        "fools the network (adaptive): it shows what is left against an attacker who knows the detector."
    ),
)
def finds_adversarial_images(config: Attacks, run: Run) -> Metrics:
    """Fit detectors on one attack and test them on others, and on one that is made against them."""
    setting = config.classifier
    study = _study(setting, run)
    normal, abnormal = _fgsm_validation(study, setting, run)
    detector = study.mahalanobis().tune(normal, abnormal, STEPS, by="auroc")
    dimensionality = LocalIntrinsicDimensionality(study.network, study.layers, random_state=run.seed).fit(study.train)
    detectors: dict[str, OutlierDetector] = {
        "mahalanobis": detector,
        "dimensionality": dimensionality.tune(normal, abnormal),
        "softmax": MaxSoftmax(study.network),
    }
    attacks: dict[str, tuple[Callable[..., Tensor], dict[str, float]]] = {
        "fgsm": (fgsm, {"eps": setting.fgsm_step}),
        "bim": (bim, {"step": config.bim_step, "num_steps": config.bim_steps}),
        "deepfool": (deepfool, {"overshoot": config.deepfool_overshoot}),
        "carlini_wagner": (
            carlini_wagner_l2,
            {"num_steps": config.carlini_wagner_steps, "num_searches": config.carlini_wagner_searches},
        ),
        "adaptive": (_adaptive(detector, config), {}),
    }
    quality: dict[tuple[str, str], dict[str, float]] = {}
    success, sizes = {}, {}
    for attack, (function, arguments) in run.progress(attacks.items(), "attacks", total=len(attacks)):
        attacked = _attacked(function, study, study.test, study.test_labels, **arguments)
        normal, abnormal, success[attack] = _selected(study, study.test, study.test_labels, attacked, run)
        sizes[attack] = (attacked - study.test).flatten(1).norm(dim=1).mean().item()
        for name, one in detectors.items():
            quality[name, attack] = ood_metrics(one.score_samples(normal), one.score_samples(abnormal))
        quality["mahalanobis_known", attack] = _known_attack(study, normal, abnormal)
    rows = [
        {"attack": attack, "success": success[attack], "l2": sizes[attack], "detector": name, **measured}
        for (name, attack), measured in quality.items()
    ]
    run.table("detection of adversarial images", rows)
    auroc = _aurocs(quality)
    run.figure(
        "auroc-by-attack",
        _bars(auroc, tuple(detectors), tuple(attacks)),
        "AUROC by attack, the detectors fitted on FGSM. " + _in_words(auroc),
    )
    return {
        "accuracy": study.accuracy,
        **{f"{name}_auroc_{attack}": value for (name, attack), value in auroc.items()},
        **{f"success_{attack}": value for attack, value in success.items()},
    }


def _adaptive(detector: MahalanobisDetector, config: Attacks) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    """The attack of one who knows the detector and its weights.

    It raises another class's logit above the right one by a margin and, from there on, the detector's log-odds of being
    normal, weighed by several factors; of the results that fool the network it keeps for each image the one that looks
    most normal. With the cross-entropy instead of the margin it hardly works: its gradient vanishes on images that the
    network is sure of.
    """
    if detector.ensemble_ is None:
        raise ValueError("the adaptive attack needs a detector with fitted weights")
    radius = config.bim_step * config.bim_steps
    distances = detector.distances()
    layer_weights = torch.from_numpy(detector.ensemble_.weights_).float()

    def log_odds(layers: list[Tensor]) -> Tensor:
        scores = -torch.stack([layer.amin(dim=1) for layer in layers], dim=1)
        return torch.mv(scores, layer_weights.to(scores.device))

    def attack(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        found, best = images, torch.full((len(images),), -math.inf, device=images.device)
        for weight in config.adaptive_weights:

            def objective(pixels: Tensor, weight: float = weight) -> Tensor:
                logits, layers = distances(pixels)
                right = logits.gather(1, labels[:, None])[:, 0]
                margin = right - logits.scatter(1, labels[:, None], -math.inf).amax(dim=1)
                total: Tensor = weight * log_odds(layers) - margin.clamp_min(-config.adaptive_margin)
                return total

            changed = ascend(objective, images, 2 * radius / config.adaptive_steps, config.adaptive_steps, radius)
            with torch.no_grad():
                logits, layers = distances(changed)
                normality = log_odds(layers).where(logits.argmax(dim=1) != labels, -math.inf)
            found = torch.where((normality > best).view(-1, 1, 1, 1), changed, found)
            best = torch.maximum(best, normality)
        return found

    return attack


# -- new classes --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Increment:
    """A classifier of some classes, and others that are learned from a few images each."""

    classifier: Classifier
    new_classes: tuple[int, ...] = (8, 9)
    new_images: int = 100  # of each new class
    head_epochs: int = 20  # of fine-tuning a softmax head on the new images


@PAPER.claim(
    "Two classes added from 100 images each, without training, are classified along with the old ones half a point "
    "better by Mahalanobis than by Euclidean distance.",
    reported="Half of CIFAR-100 as new classes: area under base against new accuracy 40.0, Euclidean 32.9.",
    holds_when=Difference("mahalanobis_accuracy", "euclidean_accuracy", at_least=0.005),
    scales={
        "smoke": Increment(replace(SMOKE, classes=tuple(range(8))), new_images=60),
        "small": Increment(replace(SMALL, classes=tuple(range(8)))),
        "full": Increment(replace(FULL, classes=tuple(range(8)))),
    },
    seeds=10,
    note=(
        "Both use the same class means, of the last layer's features. The softmax head is fine-tuned on the images of "
        "the new classes alone, as none of the old ones are kept; areas are under the curve of base accuracy against "
        "new accuracy, as a constant added to the new classes' scores grows."
    ),
)
def learns_new_classes(config: Increment, run: Run) -> Metrics:
    """Add classes to a trained classifier by their means and covariances, and compare with two other ways."""
    setting = config.classifier
    study = _study(setting, run)
    everything = replace(setting, classes=setting.classes + config.new_classes)
    test, labels = _images(everything, "test", setting.test_images, run, stream=4)
    detector = study.mahalanobis(study.layers[-1:])
    new, new_labels = [], []
    for index, label in enumerate(config.new_classes):
        few, _ = _images(replace(setting, classes=(label,)), "train", config.new_images, run, stream=5 + index)
        detector.add_class(few, label)
        new.append(few)
        new_labels.append(torch.full((len(few),), label))
    gaussian, features = detector.gaussians_[0], detector.features(test)[0]
    euclidean = -torch.cdist(torch.from_numpy(features), torch.from_numpy(gaussian.means_)).square()
    scores = {
        "mahalanobis": gaussian.class_scores(features),
        "euclidean": euclidean.numpy(),
        "softmax": _finetuned_scores(
            study, detector.features(torch.cat(new))[0], torch.cat(new_labels), features, config
        ),
    }
    is_new = np.isin(gaussian.classes_, config.new_classes)
    target = np.searchsorted(gaussian.classes_, labels.numpy())
    metrics, curves = {"base_accuracy_before": study.accuracy}, {}
    for name, values in scores.items():
        right = values.argmax(axis=1) == target
        curves[name] = base_against_new(values, target, is_new)
        metrics |= {
            f"{name}_accuracy": float(right.mean()),
            f"{name}_base_accuracy": float(right[~is_new[target]].mean()),
            f"{name}_new_accuracy": float(right[is_new[target]].mean()),
            f"{name}_area": float(np.trapezoid(curves[name][0], curves[name][1])),
        }
    run.figure(
        "base-against-new",
        _base_new_curves(curves),
        "Accuracy on the base classes against accuracy on the new ones. Areas: "
        + ", ".join(f"{name} {metrics[f'{name}_area']:.3f}" for name in curves),
    )
    return metrics


def base_against_new(scores: np.ndarray, target: np.ndarray, is_new: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Base accuracy and new accuracy as a constant added to the new classes' scores grows.

    A sample goes to the best new class as soon as the constant exceeds its best base score less its best new score, so
    the curve follows from sorting these gaps.

    Args:
        scores: samples by classes.
        target: column of the true class.
        is_new: which columns are new classes.

    Returns:
        Both accuracies at each threshold, from no sample in a new class to all; the new accuracy never falls.
    """
    base, new = np.where(is_new, -np.inf, scores), np.where(is_new, scores, -np.inf)
    order = np.argsort(base.max(axis=1) - new.max(axis=1), kind="stable")
    of_new = is_new[target]
    base_right = (~of_new & (base.argmax(axis=1) == target))[order]
    new_right = (of_new & (new.argmax(axis=1) == target))[order]
    base_accuracy = (base_right.sum() - np.concatenate([[0], base_right.cumsum()])) / (~of_new).sum()
    return base_accuracy, np.concatenate([[0], new_right.cumsum()]) / of_new.sum()


# -- noisy labels -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NoisyLabels:
    """A classifier that was trained with some labels drawn at random, and foreign images."""

    classifier: Classifier
    outside: str = "shuffled"


@PAPER.claim(
    "With 30 % of the training labels random, the last layer's Mahalanobis score finds foreign images better than the "
    "maximum softmax, by 0.02 in AUROC.",
    reported="The lead over the maximum softmax and ODIN stays with noisy labels (a figure).",
    holds_when=Difference("mahalanobis_auroc", "softmax_auroc", at_least=0.02),
    scales={
        "smoke": NoisyLabels(replace(SMOKE, noisy_labels=0.3)),
        "small": NoisyLabels(replace(SMALL, noisy_labels=0.3)),
        "full": NoisyLabels(replace(FULL, noisy_labels=0.3), "ufldl-stanford/svhn"),
    },
    seeds=10,
    note=(
        "Nothing is tuned on either side, and the Gaussians are fitted with the same noisy labels. Shown besides: the "
        "ensemble fitted on FGSM images, and the accuracies of the softmax and of the Gaussian classifier."
    ),
)
def withstands_noisy_labels(config: NoisyLabels, run: Run) -> Metrics:
    """Train with noisy labels, and compare the detectors, and the two classifiers."""
    study = _study(config.classifier, run)
    foreign = _outside(config.outside, study, config.classifier, run, stream=10)
    detector = study.mahalanobis(study.layers[-1:])
    normal, adversarial = _fgsm_validation(study, config.classifier, run)
    detectors: dict[str, OutlierDetector] = {
        "mahalanobis": detector,
        "softmax": MaxSoftmax(study.network),
        "ensemble": study.mahalanobis().fit_ensemble(normal, adversarial),
    }
    quality = {
        name: ood_metrics(one.score_samples(study.test), one.score_samples(foreign)) for name, one in detectors.items()
    }
    run.table("detection of foreign images", [{"detector": name, **measured} for name, measured in quality.items()])
    return {
        **{f"{name}_auroc": measured["auroc"] for name, measured in quality.items()},
        "softmax_accuracy": study.accuracy,
        "gaussian_accuracy": float((detector.predict_class(study.test) == study.test_labels.numpy()).mean()),
    }


# -- what the claims share ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Study:
    """A trained network and normal images: trained on, kept for tuning, kept for tests."""

    network: ConvNet | ResNet
    train: Tensor
    train_labels: Tensor
    validation: Tensor
    validation_labels: Tensor
    test: Tensor
    test_labels: Tensor
    accuracy: float  # on the test images
    device: torch.device

    @property
    def layers(self) -> list[str]:
        """Names of the stages whose features the detectors use."""
        return self.network.layers

    def mahalanobis(
        self, layers: Sequence[str] | None = None, shrinkage: Literal["ledoit_wolf"] | None = None
    ) -> MahalanobisDetector:
        """A detector fitted on the training images, by default on all layers."""
        detector = MahalanobisDetector(self.network, layers or self.layers, shrinkage=shrinkage)
        return detector.fit(self.train, self.train_labels)


def _study(setting: Classifier, run: Run) -> Study:
    """Draw the images and train the network."""
    train, labels = _images(setting, "train", setting.training_images, run, stream=0)
    held = setting.validation_images + setting.test_images
    images, truth = _images(setting, "test", held, run, stream=1)
    cut = setting.validation_images
    if setting.noisy_labels:
        is_noisy = torch.rand(len(labels), generator=run.generator(2)) < setting.noisy_labels
        random = torch.randint(len(setting.classes), labels.shape, generator=run.generator(3))
        labels = torch.where(is_noisy, torch.tensor(setting.classes)[random], labels)
    network = _network(setting, train.shape[1]).to(run.device)
    _train(network, train, labels, setting, run)
    validation, test = (images[:cut], truth[:cut]), (images[cut:], truth[cut:])
    accuracy = (_predictions(network, test[0], run.device) == test[1]).float().mean().item()
    return Study(network, train, labels, *validation, *test, accuracy, run.device)


def _network(setting: Classifier, channels: int) -> ConvNet | ResNet:
    classes = max(setting.classes) + 1
    if setting.widths:
        return ConvNet(channels, classes, setting.widths)
    return resnet34(classes, channels)


def _train(network: nn.Module, images: Tensor, labels: Tensor, setting: Classifier, run: Run) -> None:
    optimizer = torch.optim.SGD(
        network.parameters(), setting.learning_rate, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    steps = -(-len(images) // setting.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, setting.learning_rate, epochs=setting.epochs, steps_per_epoch=steps
    )
    generator = run.generator(7)
    images, labels = images.to(run.device), labels.to(run.device)
    network.train()
    for epoch in run.progress(range(setting.epochs), "training"):
        total = torch.zeros((), device=run.device)
        for index in torch.split(torch.randperm(len(images), generator=generator), setting.batch):
            index = index.to(run.device)
            batch = images[index]
            if setting.augmentation:
                batch = shift_and_mirror(batch, batch.shape[2] // 8, generator)
            loss = F.cross_entropy(network(batch), labels[index])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            total += loss.detach() * len(index)
        run.log(epoch, training_loss=total.item() / len(images))
    network.eval()


def _predictions(network: nn.Module, images: Tensor, device: torch.device) -> Tensor:
    with evaluating(network), torch.no_grad():
        return torch.cat([network(batch.to(device)).argmax(dim=1).cpu() for batch in torch.split(images, 500)])


def _attacked(
    attack: Callable[..., Tensor], study: Study, images: Tensor, labels: Tensor, **arguments: float
) -> Tensor:
    """Adversarial versions of the images, in batches on the network's device."""
    batches = zip(torch.split(images, 250), torch.split(labels, 250), strict=True)
    return torch.cat(
        [attack(study.network, x.to(study.device), y.to(study.device), **arguments).cpu() for x, y in batches]
    )


def _selected(study: Study, images: Tensor, labels: Tensor, attacked: Tensor, run: Run) -> tuple[Tensor, Tensor, float]:
    """Normal images (clean and noisy), abnormal ones, and the attack's success.

    The noise is Gaussian, of the attack's l2 norm image by image. Images are kept that are classified rightly clean and
    noisy, and wrongly after the attack.
    """
    noisy = _noisy(images, (attacked - images).flatten(1).norm(dim=1), run.generator(8))
    clean_right, noisy_right, attacked_right = (
        _predictions(study.network, x, study.device) == labels for x in (images, noisy, attacked)
    )
    kept = clean_right & noisy_right & ~attacked_right
    run.require(int(kept.sum()) >= 20, f"an attack gave {int(kept.sum())} adversarial images, too few to judge by")
    success = (clean_right & ~attacked_right).sum() / clean_right.sum()
    return torch.cat([images[kept], noisy[kept]]), attacked[kept], success.item()


def _noisy(images: Tensor, sizes: Tensor, generator: torch.Generator) -> Tensor:
    """Images with Gaussian noise that changes them by given l2 norms, also after clipping to [0, 1]."""
    noise = change = torch.randn(images.shape, generator=generator)
    for _ in range(10):  # black pixels lose half of the noise, so it grows until what is left has the size
        noise = noise * (sizes / change.flatten(1).norm(dim=1).clamp_min(1e-12)).view(-1, 1, 1, 1)
        change = (images + noise).clamp(0, 1) - images
    return images + change


def _fgsm_validation(study: Study, setting: Classifier, run: Run) -> tuple[Tensor, Tensor]:
    """Normal and adversarial images from the validation images, for detectors that see nothing else abnormal."""
    attacked = _attacked(fgsm, study, study.validation, study.validation_labels, eps=setting.fgsm_step)
    normal, adversarial, _ = _selected(study, study.validation, study.validation_labels, attacked, run)
    return normal, adversarial


def _known_attack(study: Study, normal: Tensor, abnormal: Tensor) -> dict[str, float]:
    """The ensemble fitted on every fourth image of the very attack, and measured on the others.

    Normal images come as clean ones and then their noisy copies, in the order of the adversarial ones.
    """
    is_seen = torch.arange(len(abnormal)) % 4 == 0
    detector = study.mahalanobis().fit_ensemble(normal[is_seen.repeat(2)], abnormal[is_seen])
    return ood_metrics(detector.score_samples(normal[~is_seen.repeat(2)]), detector.score_samples(abnormal[~is_seen]))


def _images(setting: Classifier, split: str, count: int, run: Run, stream: int) -> tuple[Tensor, Tensor]:
    """Images of the classifier's classes drawn at random, and their labels."""
    loaded = _loaded(setting.dataset, split)
    wanted = torch.isin(loaded.labels, torch.tensor(setting.classes)).nonzero()[:, 0]
    drawn = wanted[torch.randperm(len(wanted), generator=run.generator(stream))[:count]]
    return _fitted(loaded.pixels[drawn].float() / 255, loaded.pixels.shape[1], setting.side), loaded.labels[drawn]


def _loaded(name: str, split: str) -> Images:
    images = load(name, split)
    if not isinstance(images, Images):
        raise ValueError(f"the experiment needs images, but {name!r} is a {type(images).__name__}")
    return images


def _outside(name: str, study: Study, setting: Classifier, run: Run, stream: int) -> Tensor:
    """Foreign images of the classifier's size and channels, as many as it has for validation and tests together."""
    count = setting.validation_images + setting.test_images
    if name == "noise":
        return torch.rand(count, *study.test.shape[1:], generator=run.generator(stream))
    if name == "shuffled":
        return _shuffled(_images(setting, "test", count, run, stream)[0], run.generator(stream + 100))
    loaded = _loaded(name, "test")
    drawn = torch.randperm(len(loaded), generator=run.generator(stream))[:count]
    return _fitted(loaded.pixels[drawn].float() / 255, study.test.shape[1], setting.side)


def _shuffled(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images with their quadrants moved, each image by an order of its own that is not the right one."""
    half = images.shape[-1] // 2
    orders = torch.tensor([order for order in itertools.permutations(range(4)) if order != (0, 1, 2, 3)])
    chosen = orders[torch.randint(len(orders), (len(images),), generator=generator)]
    parts = [images[..., row : row + half, column : column + half] for row in (0, half) for column in (0, half)]
    quadrants = torch.stack(parts, dim=1)[torch.arange(len(images))[:, None], chosen]
    top, bottom = (torch.cat([quadrants[:, k], quadrants[:, k + 1]], dim=-1) for k in (0, 2))
    return torch.cat([top, bottom], dim=-2)


def _near(config: Near, study: Study, run: Run) -> tuple[Tensor, Tensor]:
    """Images near the training set, to tune on and to test with."""
    setting = config.classifier
    if config.dataset:
        images = _outside(config.dataset, study, setting, run, stream=10)
    else:
        count = setting.validation_images + setting.test_images
        images, _ = _images(replace(setting, classes=config.held_out), "test", count, run, stream=10)
    cut = min(setting.validation_images, len(images) // 2)
    return images[:cut], images[cut:]


def _fitted(pixels: Tensor, channels: int, side: int) -> Tensor:
    """Images averaged, or enlarged, to a side, and turned grey or coloured."""
    if pixels.shape[1] != channels:
        pixels = pixels.mean(dim=1, keepdim=True).expand(-1, channels, -1, -1)
    if pixels.shape[-1] < side:
        return F.interpolate(pixels, (side, side), mode="bilinear").clamp(0, 1)
    return F.adaptive_avg_pool2d(pixels, side)


def _finetuned_scores(
    study: Study, new_features: np.ndarray, new_labels: Tensor, features: np.ndarray, config: Increment
) -> np.ndarray:
    """Logits of the trained head with a row for each new class, fine-tuned on features of the new classes."""
    old = study.network.head
    head = nn.Linear(old.in_features, old.out_features + len(config.new_classes))
    with torch.no_grad():
        head.weight.zero_()[: old.out_features] = old.weight.cpu()
        head.bias.zero_()[: old.out_features] = old.bias.cpu()
    optimizer = torch.optim.SGD(head.parameters(), 0.01, momentum=0.9)
    inputs = torch.from_numpy(new_features).float()
    for _ in range(config.head_epochs):
        for index in torch.split(torch.randperm(len(inputs)), 32):
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(head(inputs[index]), new_labels[index]))
            optimizer.step()
    with torch.no_grad():
        scores: np.ndarray = head(torch.from_numpy(features).float()).numpy()
    return scores


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _short(name: str) -> str:
    return name.rsplit("/", 1)[-1]


Rates = Mapping[tuple[str, str], float]


def _aurocs(quality: Mapping[tuple[str, str], Mapping[str, float]]) -> dict[tuple[str, str], float]:
    return {key: measured["auroc"] for key, measured in quality.items()}


def _in_words(rates: Rates) -> str:
    """Every number, by what was detected."""
    kinds = dict.fromkeys(kind for _, kind in rates)
    listed = (
        f"{kind}: " + ", ".join(f"{name} {value:.3f}" for (name, k), value in rates.items() if k == kind)
        for kind in kinds
    )
    return "; ".join(listed) + "."


def _bars(rates: Rates, names: Sequence[str], kinds: Sequence[str]) -> Figure:
    figure = Figure(figsize=(7, 3.2))
    axes = figure.add_subplot()
    width = 0.8 / len(names)
    for index, name in enumerate(names):
        places = np.arange(len(kinds)) + (index - (len(names) - 1) / 2) * width
        axes.bar(places, [rates[name, kind] for kind in kinds], width, label=name.replace("_", " "))
    axes.set_xticks(range(len(kinds)), [kind.replace("_", " ") for kind in kinds])
    axes.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
    axes.set_ylabel("AUROC")
    axes.set_ylim(0, 1.02)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=len(names), frameon=False)
    return figure


def _roc_curves(scores: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    figure = Figure(figsize=(4.5, 4.2))
    axes = figure.add_subplot()
    for name, (inside, outside) in scores.items():
        truth = np.repeat([1, 0], [len(inside), len(outside)])
        false_positive, true_positive, _ = roc_curve(truth, np.concatenate([inside, outside]))
        axes.plot(false_positive, true_positive, label=name.replace("_", " "))
    axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8, linestyle=":")
    axes.set_xlabel("abnormal images accepted")
    axes.set_ylabel("normal images accepted")
    axes.legend(loc="lower right")
    return figure


def _step_curve(by_step: Mapping[float, float]) -> Figure:
    figure = Figure(figsize=(5.5, 3.2))
    axes = figure.add_subplot()
    axes.plot(list(by_step), list(by_step.values()), marker="o")
    axes.locator_params(axis="x", nbins=5)
    axes.set_xlabel("step on the input, pixels")
    axes.set_ylabel("AUROC of the last layer")
    return figure


def _base_new_curves(curves: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> Figure:
    figure = Figure(figsize=(4.5, 4.2))
    axes = figure.add_subplot()
    for name, (base, new) in curves.items():
        axes.plot(new, base, label=name)
    axes.set_xlabel("accuracy on new classes")
    axes.set_ylabel("accuracy on base classes")
    axes.legend(loc="lower left")
    return figure
