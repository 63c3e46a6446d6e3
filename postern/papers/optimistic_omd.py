"""One online learner for streams between random and hostile."""

from datetime import date

from postern.claims import Paper

PAPER = Paper(
    slug="optimistic-omd",
    title="Optimistic Online Mirror Descent for Bridging Stochastic and Adversarial Online Convex Optimization",
    date=date(2023, 2, 9),
    arxiv="2302.04552",
    authors=4,
    family="optim",
    summary=(
        "Real streams are neither independent draws nor worst cases. In the model studied here nature picks a "
        "distribution each round and shows one sample of it, and difficulty splits into variance and drift. Mirror "
        "descent that takes the last gradient as a hint for the next has regret bounded by these two instead of by "
        "the number of rounds, so it is fast on easy streams and safe on hard ones; an ensemble on top follows a "
        "moving comparator. It is for forecasting and calibration under drift."
    ),
    reported=(
        "Convex and smooth: regret of the order of the root of the cumulative variance plus the root of the "
        "cumulative drift, without convexity of each loss (theorem).",
        "Strongly convex: better than the maximal variance and drift times log T (theorem).",
        "Exp-concave: of the order of d log of variance plus drift, the first such bound (theorem).",
    ),
)
