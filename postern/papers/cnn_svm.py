"""CNN-SVM: a support vector machine on top of a convolutional network, and what its evaluation really measured."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import date

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from postern.adaptive import expected_calibration_error
from postern.claims import AllOf, Difference, Metrics, Paper, Run
from postern.data import ImageName, load
from postern.heads import SoftmaxHead, SVMHead, svm_predict
from postern.heads.cnn_svm import train_cnn
from postern.nets import AgarapCNN, initialize_truncated

PAPER = Paper(
    slug="cnn-svm",
    title=(
        "An Architecture Combining Convolutional Neural Network (CNN) and Support Vector Machine (SVM) for Image "
        "Classification"
    ),
    date=date(2017, 12, 10),
    arxiv="1712.03541",
    authors=1,
    family="heads",
    summary=(
        "The softmax on top of a small convolutional network gives way to a linear support vector machine, trained "
        "with it by a squared hinge. The paper finds the SVM slightly behind on MNIST and Fashion-MNIST, against what "
        "an earlier paper had found. Its code, however, looks at the signs of the SVM's scores only, and breaks ties "
        "by the order of the classes. It is for whoever wants a margin loss, or a lesson in evaluation."
    ),
    reported=(
        "MNIST, 10 000 steps: 99.23 % test accuracy with softmax, 99.04 % with the SVM (one run each).",
        "Fashion-MNIST, the same: 91.86 % with softmax, 90.72 % with the SVM.",
    ),
    components=(
        "postern.heads.SVMHead",
        "postern.heads.L2SVMLoss",
        "postern.heads.one_vs_rest_hinge",
        "postern.heads.svm_predict",
        "postern.heads.CNNSVMClassifier",
        "postern.nets.AgarapCNN",
    ),
    code="AFAgarap/cnn-svm",
    details=(
        "Predict by the highest score. The paper's code takes the highest sign: with two positive scores the class "
        "that comes first wins, with none it is class 0.",
        "Softmax must not be scored by signs, as its logits are not trained around zero: no fair control.",
        "The hinge is averaged over batch and classes, so that its gradients are as many times smaller than those of "
        "the sum; the two forms want different learning rates.",
        "In the averaged form the regulariser weighs next to nothing.",
        "Weights are drawn from a normal distribution with deviation 0.1, cut at twice that; all biases begin at 0.1.",
    ),
    differences=(
        "The paper's equation sums the losses and has a factor 1/2 before the squared weights, its code averages both "
        "and has none. Both are here; the code's is the default.",
        "Targets become -1 and +1 in a new tensor; the paper's code changes the caller's labels.",
        "The small scale has a quarter of the channels, 10 000 training images and 1000 steps a run, so that three "
        "learning rates for each head fit into minutes.",
    ),
    example="""from sklearn.model_selection import train_test_split

from postern.data import ImageName, load
from postern.heads import CNNSVMClassifier

digits = load("digits", "all")
images, labels = digits.scaled().numpy(), digits.labels.numpy()
train, test, train_labels, test_labels = train_test_split(images, labels, test_size=0.5, random_state=0)
for rule in ("argmax", "sign_argmax"):
    model = CNNSVMClassifier(
        rule=rule, channels=(16, 32), kernel_size=3, hidden_dim=128, steps=200, random_state=0
    ).fit(train, train_labels)
    print(f"{rule:11} {model.score(test, test_labels):.1%}")
""",
)

# Three tenths of a point of accuracy: what the rule must cost, fixed with the reported deficits 0.19 and 1.14 in view.
RULE_COSTS = 0.003
# Half a point: heads that differ by less are as good as each other.
TIE = 0.005


@dataclass(frozen=True)
class Comparison:
    """Both heads on the same network: the images, the network and the training."""

    data: ImageName
    train_images: int
    validation_images: int
    test_images: int
    channels: tuple[int, int]
    kernel_size: int
    hidden_dim: int
    steps: int
    learning_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    batch_size: int = 128
    wrong_labels: float = 0.0  # share of the training labels


DIGITS = Comparison("digits", 700, 198, 899, (16, 32), 3, 128, 600)
SMOKE = replace(DIGITS, steps=80, learning_rates=(1e-3,))
MNIST = Comparison("ylecun/mnist", 10_000, 2000, 10_000, (8, 16), 5, 256, 1000)
FULL = Comparison("ylecun/mnist", 55_000, 5000, 10_000, (32, 64), 5, 1024, 10_000)
TUNED_NOTE = (
    "Each head's learning rate is the best of three on validation images. The SVM is one trained model, scored by "
    "both rules."
)


@PAPER.claim(
    "On digits, predicting by the signs of its scores costs the SVM accuracy; by the highest score it ties softmax.",
    reported="The SVM behind softmax by 0.19 (MNIST) and 1.14 points (Fashion-MNIST), scored by signs.",
    holds_when=AllOf(
        Difference("svm", "svm_by_sign", at_least=RULE_COSTS),
        Difference("softmax", "svm", at_least=-TIE, at_most=TIE),
    ),
    scales={"smoke": SMOKE, "small": DIGITS, "full": DIGITS},
    seeds=15,  # five left the tie of the heads open
    gpu=(),
    note=TUNED_NOTE,
)
def sign_rule_costs_accuracy_on_digits(config: Comparison, run: Run) -> Metrics:
    return _compare(config, run)


@PAPER.claim(
    "On MNIST, predicting by the signs of its scores costs the SVM accuracy; by the highest score it ties softmax.",
    reported="99.23 % with softmax, 99.04 % with the SVM scored by signs.",
    holds_when=AllOf(
        Difference("svm", "svm_by_sign", at_least=RULE_COSTS),
        Difference("softmax", "svm", at_least=-TIE, at_most=TIE),
    ),
    scales={"smoke": SMOKE, "small": MNIST, "full": FULL},
    seeds=8,  # three left it open
    note=TUNED_NOTE,
)
def sign_rule_costs_accuracy_on_mnist(config: Comparison, run: Run) -> Metrics:
    return _compare(config, run)


@PAPER.claim(
    "With the paper's settings and its evaluation, softmax is ahead of the SVM on MNIST by the 0.19 points it reports.",
    reported="99.23 % against 99.04 %, one run each.",
    holds_when=Difference("softmax", "svm_by_sign", at_least=0.0019),
    scales={
        "smoke": SMOKE,
        "small": replace(MNIST, learning_rates=(1e-3,)),
        "full": replace(FULL, learning_rates=(1e-3,)),
    },
    seeds=5,
    note=(
        "A literal replication: learning rate 0.001 for both heads, the averaged objective, the SVM scored by signs. "
        "The small scale is shorter and narrower than the paper's."
    ),
)
def softmax_is_ahead_by_the_papers_evaluation(config: Comparison, run: Run) -> Metrics:
    return _compare(config, run)


@PAPER.claim(
    "With a fifth of the training labels wrong, the SVM is at least as accurate as softmax.",
    reported="Not reported; margins that stop pulling are often said to bear wrong labels better.",
    holds_when=Difference("svm", "softmax", at_least=0.0),
    scales={
        "smoke": replace(SMOKE, wrong_labels=0.2),
        "small": replace(DIGITS, wrong_labels=0.2),
        "full": replace(FULL, wrong_labels=0.2),
    },
    seeds=5,
    note="Only training labels are wrong; the learning rates are chosen on clean validation images.",
)
def svm_bears_wrong_labels(config: Comparison, run: Run) -> Metrics:
    return _compare(config, run)


@dataclass(frozen=True)
class _Sets:
    """Images and labels to train, choose and test on."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class _Trained:
    """A trained head's scores, and how it was chosen."""

    learning_rate: float
    validation_accuracy: float
    scores: Tensor


def _compare(config: Comparison, run: Run) -> dict[str, float]:
    """Train both heads at every learning rate, choose by validation accuracy, test once."""
    sets = _load(config, run)
    softmax, svm = (_train_best(name, config, sets, run) for name in ("softmax", "svm"))
    target = sets.test[1]
    result = {
        "softmax": _accuracy(softmax.scores.argmax(1), target),
        "svm": _accuracy(svm_predict(svm.scores), target),
        "svm_by_sign": _accuracy(svm_predict(svm.scores, "sign_argmax"), target),
    }
    positive = (svm.scores > 0).sum(1)
    result |= {
        "no_positive_score": _share(positive == 0),
        "several_positive_scores": _share(positive > 1),
        "softmax_calibration_error": _calibration_error(softmax.scores, target),
        "svm_calibration_error": _calibration_error(svm.scores, target),
    }
    run.table(
        "accuracy by head and rule",
        [
            {"head": head, "rule": rule, "learning rate": trained.learning_rate, "accuracy": result[name]}
            for head, rule, name, trained in (
                ("softmax", "highest score", "softmax", softmax),
                ("SVM", "highest score", "svm", svm),
                ("SVM", "highest sign", "svm_by_sign", svm),
            )
        ],
    )
    run.figure("margins", _margins(svm.scores, target), _margins_in_words(svm.scores, target))
    return result


def _load(config: Comparison, run: Run) -> _Sets:
    """Split by the seed; MNIST has a test set of its own, the digits are divided."""
    generator = run.generator()
    wanted = config.train_images + config.validation_images
    if config.data == "digits":
        images = load(config.data, "all")
        pixels, labels = images.scaled(), images.labels
        order = torch.randperm(len(labels), generator=generator)
        test_rows = order[wanted : wanted + config.test_images]
        test = pixels[test_rows], labels[test_rows]
    else:
        images = load(config.data, "train")
        order = torch.randperm(len(images.labels), generator=generator)[:wanted]
        kept = torch.zeros(len(images.labels), dtype=torch.bool).index_fill_(0, order, True)
        pixels, labels = images.pixels[kept].float() / 255, images.labels[kept]
        order = torch.randperm(wanted, generator=generator)
        tested = load(config.data, "test", config.test_images)
        test = tested.scaled(), tested.labels
    train_rows, validation_rows = order[: config.train_images], order[config.train_images : wanted]
    train_labels = labels[train_rows].clone()
    wrong = torch.rand(len(train_labels), generator=generator) < config.wrong_labels
    shift = torch.randint(1, 10, train_labels.shape, generator=generator)
    train_labels[wrong] = (train_labels + shift)[wrong] % 10
    return _Sets(
        train=(pixels[train_rows].to(run.device), train_labels.to(run.device)),
        validation=(pixels[validation_rows].to(run.device), labels[validation_rows].to(run.device)),
        test=(test[0].to(run.device), test[1].to(run.device)),
    )


def _train_best(name: str, config: Comparison, sets: _Sets, run: Run) -> _Trained:
    """Train one head at every learning rate, from the same initialisation on the same batches, and keep the best."""
    trained = []
    for learning_rate in config.learning_rates:
        torch.manual_seed(run.seed)
        shape = sets.train[0].shape
        network = AgarapCNN(shape[1], (shape[2], shape[3]), config.channels, config.kernel_size, config.hidden_dim)
        head = SVMHead(config.hidden_dim, 10) if name == "svm" else SoftmaxHead(config.hidden_dim, 10)
        initialize_truncated(head)
        network, head = network.to(run.device), head.to(run.device)
        train_cnn(
            network,
            head,
            *sets.train,
            steps=run.progress(range(config.steps), f"{name} at {learning_rate:g}"),
            batch_size=config.batch_size,
            learning_rate=learning_rate,
            generator=run.generator(1),
        )
        validation = _scores(network, head, sets.validation[0]).argmax(1)
        accuracy = _accuracy(validation, sets.validation[1])
        trained.append(_Trained(learning_rate, accuracy, _scores(network, head, sets.test[0])))
    return max(trained, key=lambda candidate: candidate.validation_accuracy)


def _scores(network: AgarapCNN, head: SVMHead | SoftmaxHead, images: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([head.logits(network(part)) for part in torch.split(images, 1000)])


def _accuracy(predicted: Tensor, target: Tensor) -> float:
    return _share(predicted == target)


def _share(condition: Tensor) -> float:
    return condition.double().mean().item()


def _calibration_error(scores: Tensor, target: Tensor) -> float:
    """Of the softmax's confidence."""
    confidence, predicted = scores.double().softmax(1).max(1)
    return expected_calibration_error(confidence, predicted == target, binning="uniform")


def _margins(scores: Tensor, target: Tensor) -> Figure:
    figure = Figure(figsize=(6, 3))
    axes = figure.subplots()
    true, best_other = _true_and_best_other(scores, target)
    bins = np.linspace(-2.5, 2.5, 51).tolist()
    axes.hist(np.clip(true, -2.5, 2.5), bins, alpha=0.6, label="true class")
    axes.hist(np.clip(best_other, -2.5, 2.5), bins, alpha=0.6, label="best of the others")
    axes.axvline(0, color="gray", linewidth=1)
    axes.set(xlabel="score", ylabel="test images", yscale="log")
    axes.legend()
    return figure


def _margins_in_words(scores: Tensor, target: Tensor) -> str:
    true, best_other = _true_and_best_other(scores, target)
    return (
        f"Histogram of the SVM's scores on the test images. The true class scores {np.median(true):.2f} in the median, "
        f"the best of the others {np.median(best_other):.2f}. {np.mean(true <= 0):.1%} of the true classes and "
        f"{np.mean(best_other > 0):.1%} of the others lie on the wrong side of zero."
    )


def _true_and_best_other(scores: Tensor, target: Tensor) -> tuple[np.ndarray, np.ndarray]:
    scores, target = scores.cpu(), target.cpu()
    others = scores.scatter(1, target[:, None], -torch.inf)
    return scores.gather(1, target[:, None])[:, 0].numpy(), others.amax(1).numpy()
