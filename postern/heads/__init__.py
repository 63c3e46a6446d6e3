"""Output layers: modules with ``logits(hidden)`` and ``loss(hidden, target)``."""

from postern.heads.protocol import Head
from postern.heads.softmax import SoftmaxHead

__all__ = ["Head", "SoftmaxHead"]
