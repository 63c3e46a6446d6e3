"""Normalisers: functions ``(logits, dim=-1, ...) -> probabilities``, and what goes wrong with them."""

from postern.softmax.clipped import clipped_softmax, softmax_off_by_one
from postern.softmax.collapse import collapse_gap, softmax_collapse_fraction, zero_loss_fraction
from postern.softmax.extended import ext_add, ext_exp, ext_logsumexp, ext_sum
from postern.softmax.online import online_softmax
from postern.softmax.stablemax import log_stablemax, stablemax
from postern.softmax.three_pass import three_pass_softmax
from postern.softmax.two_pass import TwoPassSoftmax, softmax_traffic, two_pass_log_softmax, two_pass_softmax

__all__ = [
    "TwoPassSoftmax",
    "clipped_softmax",
    "collapse_gap",
    "ext_add",
    "ext_exp",
    "ext_logsumexp",
    "ext_sum",
    "log_stablemax",
    "online_softmax",
    "softmax_collapse_fraction",
    "softmax_off_by_one",
    "softmax_traffic",
    "stablemax",
    "three_pass_softmax",
    "two_pass_log_softmax",
    "two_pass_softmax",
    "zero_loss_fraction",
]
