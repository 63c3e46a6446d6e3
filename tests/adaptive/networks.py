"""Small networks with exits that the tests of the family share."""

import torch
from torch import nn

from postern.adaptive import EarlyExitModel
from postern.nets import ConvNet, ResidualMLP, ResNet


def apart(model):
    """With classifiers that tell untrained features apart."""
    for head in model.heads:
        nn.init.normal_(head.weight, std=3.0)
    return model.eval()


def vector_model(classes=3, seed=0):
    torch.manual_seed(seed)
    backbone = ResidualMLP(6, classes, width=8, depth=4)
    return apart(EarlyExitModel(backbone, backbone.layers[:-1], classes, widths=8, norm="norm"))


def conv_model(classes=4, seed=0):
    torch.manual_seed(seed)
    backbone = ConvNet(2, classes, widths=(4, 6, 8, 8))
    return apart(EarlyExitModel(backbone, backbone.layers[:-1], classes, widths=(4, 6, 8)))


def resnet_model(seed=0):
    torch.manual_seed(seed)
    backbone = ResNet((1, 2, 1), width=4)
    exits = [f"stages.{stage}.{block}" for stage, block in ((0, 0), (1, 0), (1, 1))]
    return apart(EarlyExitModel(backbone, exits, 10, widths=(4, 8, 8)))


class ThroughAll(nn.Module):
    """Calls its layers in another order than an exit model may expect."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.first(self.second(x)))
