"""Small trained networks and inputs that the detectors' tests share."""

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from postern.data import load
from postern.nets import ConvNet


@cache
def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels, test images and labels; pixels in [0, 1]."""
    train, test = load("digits", "train"), load("digits", "test")
    return train.scaled(), train.labels, test.scaled(), test.labels


@cache
def trained() -> nn.Module:
    """A small convolutional network on the digits, better than 95 % after two seconds."""
    images, labels, _, _ = digits()
    torch.manual_seed(0)
    network = ConvNet(1, 10, widths=(8, 16, 16))
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    for _ in range(8):
        for batch in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(network(images[batch]), labels[batch]).backward()
            optimizer.step()
    return network.eval()


def noise(count: int, seed: int = 0) -> Tensor:
    """Uniform noise of the digits' shape."""
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
