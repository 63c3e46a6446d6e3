"""Reading a trained softmax as a utility rather than as a probability."""

from datetime import date

from postern.claims import Paper

PAPER = Paper(
    slug="utility-probability-duality",
    title="Utility-Probability Duality of Neural Networks",
    date=date(2023, 5, 24),
    arxiv="2305.14859",
    authors=2,
    family="heads",
    summary=(
        "Larger beams make generated text worse, the likeliest output is poor or empty, and sampling from the "
        "learnt distribution is poor although its best outputs are good. The paper resolves these puzzles by "
        "reading a trained softmax network as an ordinal utility that ranks outputs by the preferences in the "
        "data, and training as learning that utility. A map from utilities to new probabilities then makes "
        "sampling and expected-utility decoding work better. It concerns research on decoding and calibration."
    ),
    reported=(
        "Maximum-likelihood training is an iteration towards an optimal utility, for every softmax network "
        "(theorem; exact statement not available to us).",
        "Decision rules that need probabilities gain by double digits with the transformed ones (numbers not "
        "available to us; a later text no longer states it).",
    ),
)
