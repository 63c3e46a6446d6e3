"""Dynamic pruning of channels by predicting which would be active."""

from datetime import date

from postern.claims import Paper

PAPER = Paper(
    slug="fire-together",
    title="Fire Together Wire Together: A Dynamic Pruning Approach with Self-Supervised Mask Prediction",
    date=date(2021, 10, 15),
    arxiv="2110.08232",
    authors=4,
    family="adaptive",
    summary=(
        "Dynamic pruning runs for each input only some filters of each layer, and usually learns its gates by a "
        "sparsity penalty that fights the task. Here gating is plain binary classification: a tiny head sees the "
        "input of a layer and predicts which outputs would be among the most active, with labels taken from the "
        "layer itself. How many are kept follows from a share of the total activation, so the saving can be "
        "estimated before training. It suits those who compress a trained network to a budget."
    ),
    reported=(
        "CIFAR-10, VGG16-BN (93.82 %): 93.55 % with 65 % fewer FLOPs, 92.65 % with 74 % fewer.",
        "CIFAR-10, ResNet56 (93.66 %): 92.63 % with 66 % fewer FLOPs.",
        "ImageNet, ResNet34 (73.30 %): 72.17 % with 47.42 % fewer FLOPs.",
        "ImageNet, MobileNetV1 (69.57 %): 69.66 % with 41.07 % fewer FLOPs.",
    ),
    code="selkerdawy/FTWT",
)
