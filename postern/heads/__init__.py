"""Output layers: modules with ``logits(hidden)`` and ``loss(hidden, target)``."""

from postern.heads.protocol import Head
from postern.heads.softmax import SoftmaxHead
from postern.heads.stablemax import StableMaxHead, StableMaxLoss, stablemax_cross_entropy

__all__ = ["Head", "SoftmaxHead", "StableMaxHead", "StableMaxLoss", "stablemax_cross_entropy"]
