"""Is it a class that I was trained on? A gate that mixes two classifiers by their confidence."""

from datetime import date

from postern.claims import Paper

PAPER = Paper(
    slug="cosmo",
    title="Adaptive Confidence Smoothing for Generalized Zero-Shot Learning",
    date=date(2018, 12, 24),
    arxiv="1812.09903",
    authors=2,
    family="anomaly",
    summary=(
        "At test time a sample may belong to a class with training images or to one known only by its attributes. "
        "COSMO combines an expert for each kind by total probability. A gate looks only at the sorted confidences "
        "of both, so that it can be trained on held-out classes and moved to others, and each expert's answer is "
        "smoothed towards uniform by as much as the gate doubts that the sample is its own. It merges a supervised "
        "with a zero-shot classifier, or builds a reject option from two models."
    ),
    reported=(
        "Better harmonic accuracy than other methods that generate no features, and close to those that do, on "
        "AWA1, SUN, CUB and FLO (its own numbers not available to us).",
        "A trained confidence gate beats the maximal probability, and adaptive smoothing beats constant or none "
        "(numbers not available to us).",
    ),
    code="yuvalatzmon/COSMO",
)
