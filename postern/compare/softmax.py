"""Normalisers compared: each as the one of a transformer's attention, with everything else the same."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from postern.attention import SelfAttention
from postern.claims.comparison import Member
from postern.compare.problems import CONTEXT, Problem, Rows, Words
from postern.compare.training import CROSS_ENTROPY, make_contest
from postern.compare.transformer import Transformer
from postern.nets import LanguageModel, VectorTransformer
from postern.softmax import (
    clipped_softmax,
    online_softmax,
    softmax_off_by_one,
    stablemax,
    three_pass_softmax,
    two_pass_softmax,
)

WIDTH, HEADS, LAYERS = 64, 4, 2
NORMALISERS: Mapping[str, Callable[[Tensor, int], Tensor]] = {
    "softmax": torch.softmax,
    "two-pass": two_pass_softmax,
    "three-pass": three_pass_softmax,
    "online": online_softmax,
    "clipped": clipped_softmax,
    "off-by-one": softmax_off_by_one,
    "stablemax": stablemax,
}
MEMBERS = (
    Member("softmax", "torch's softmax", "torch.softmax"),
    Member("two-pass", "the same function by two passes", "postern.softmax.two_pass_softmax", "two-pass-softmax"),
    Member("three-pass", "the same by three passes", "postern.softmax.three_pass_softmax", "two-pass-softmax"),
    Member("online", "the same with a running maximum", "postern.softmax.online_softmax", "two-pass-softmax"),
    Member("clipped", "stretched and clipped", "postern.softmax.clipped_softmax", "quantizable-transformers"),
    Member("off-by-one", "one more, empty place", "postern.softmax.softmax_off_by_one"),
    Member("stablemax", "grows linearly", "postern.softmax.stablemax", "grokking-stablemax"),
)


def network(name: str, problem: Problem) -> nn.Module:
    """An untrained transformer for a problem whose inputs are words or tokens."""
    attention = partial(SelfAttention, WIDTH, HEADS, normalise=NORMALISERS[name])
    if isinstance(problem, Words):
        return LanguageModel(
            problem.num_classes, WIDTH, LAYERS, HEADS, CONTEXT, attention=lambda _: attention(is_causal=True)
        )
    tokens, features = problem.shape
    return VectorTransformer(
        features, tokens, problem.num_classes, WIDTH, LAYERS, HEADS, attention=lambda _: attention()
    )


def build(name: str, problem: Problem, rate: float) -> Transformer:
    """An untrained network with a normaliser."""
    return Transformer(network(name, problem))


CONTEST = make_contest(
    family="softmax",
    module=__name__,
    members=MEMBERS,
    task={
        "text": f"A causal transformer of {LAYERS} layers, {WIDTH} wide, tells each word of the text from the "
        f"{CONTEXT} before it; the member normalises its attention.",
        "table": f"A transformer of {LAYERS} layers, {WIDTH} wide, classifies the rows, a token a column; the member "
        "normalises its attention.",
        "images": f"A transformer of {LAYERS} layers, {WIDTH} wide, classifies the images, a token a patch; the "
        "member normalises its attention.",
    },
    text_quality=CROSS_ENTROPY,
    build=build,
    prepare=lambda problem: problem.as_tokens() if isinstance(problem, Rows) else problem,
)
