"""A classification loss whose cost does not grow with the number of classes."""

from datetime import date

from postern.claims import Paper

PAPER = Paper(
    slug="z-loss",
    title="The Z-loss: a shift and scale invariant classification loss belonging to the Spherical Family",
    date=date(2016, 4, 29),
    arxiv="1604.08859",
    authors=2,
    family="heads",
    summary=(
        "If a loss depends only on the sum of the scores, the sum of their squares and the score of the target, "
        "its output layer can be trained exactly at a cost that does not depend on the number of classes, without "
        "ever computing the scores. The Z-loss is such a loss, built on the z-score of the target, so that "
        "shifting or scaling all scores changes nothing; two parameters move it towards ranking. It suits very "
        "wide outputs where the rank matters more than a probability. It is not the penalty on log Z that later "
        "work gave the same name."
    ),
    reported=(
        "One Billion Word with 793 471 classes, whole model on one GPU: 40 times faster than log-softmax and more "
        "than 4 times faster than a hierarchical softmax (abstract).",
        "Penn Treebank: significantly better than earlier spherical losses, and better than log-softmax in some "
        "top-k scores (numbers not available to us).",
    ),
    code="pascal20100/factored_output_layer",
)
