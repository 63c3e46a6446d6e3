"""The few small reference networks that the experiments share."""

from postern.nets.agarap import AgarapCNN, initialize_truncated
from postern.nets.convnet import ConvNet
from postern.nets.detector import GridDetector
from postern.nets.evaluation import evaluating
from postern.nets.mlp import MLP
from postern.nets.normalize import Normalize
from postern.nets.resnet import ResNet, resnet18, resnet34
from postern.nets.token_transformer import TokenTransformer

__all__ = [
    "MLP",
    "AgarapCNN",
    "ConvNet",
    "GridDetector",
    "Normalize",
    "ResNet",
    "TokenTransformer",
    "evaluating",
    "initialize_truncated",
    "resnet18",
    "resnet34",
]
