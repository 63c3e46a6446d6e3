"""Early exits whose gates and classifiers are learnt together."""

from datetime import date

from postern.claims import Paper

PAPER = Paper(
    slug="jei-dnn",
    title="Jointly-Learned Exit and Inference for a Dynamic Neural Network",
    date=date(2023, 10, 13),
    arxiv="2310.09163",
    authors=3,
    family="adaptive",
    summary=(
        "A network with early exits answers easy inputs from a shallow layer. Usual exits threshold a confidence "
        "chosen after training, so the classifiers are trained on samples that they will never see, and their "
        "confidence is biased upwards. JEI-DNN freezes the backbone and alternates between small gates, which "
        "predict the exit with the least loss and cost, and linear classifiers weighted by the probability of "
        "exiting there. It suits whoever adds exits to a ready-made model and needs calibrated outputs."
    ),
    reported=(
        "A better curve of accuracy against cost than other exits that fit any architecture, on CIFAR-10, "
        "CIFAR-100, long-tailed CIFAR-100 and SVHN with T2T-ViT-7 and -14 (numbers not available to us).",
        "Better calibrated probabilities and smaller conformal sets at each exit (numbers not available to us).",
    ),
    code="networkslab/dynn",
)
