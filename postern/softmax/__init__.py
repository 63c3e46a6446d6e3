"""Normalisers: functions ``(logits, dim=-1, ...) -> probabilities``, and what goes wrong with them."""

from postern.softmax.clipped import clipped_softmax, softmax_off_by_one
from postern.softmax.collapse import collapse_gap, softmax_collapse_fraction, zero_loss_fraction
from postern.softmax.stablemax import log_stablemax, stablemax

__all__ = [
    "clipped_softmax",
    "collapse_gap",
    "log_stablemax",
    "softmax_collapse_fraction",
    "softmax_off_by_one",
    "stablemax",
    "zero_loss_fraction",
]
