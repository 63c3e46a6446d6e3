"""What a temperature in the gate does to the statistics of a mixture of experts."""

from datetime import date

from postern.claims import Paper

PAPER = Paper(
    slug="temperature-gmoe",
    title="Is Temperature Sample Efficient for Softmax Gaussian Mixture of Experts?",
    date=date(2024, 1, 24),
    arxiv="2401.13875",
    authors=3,
    family="experts",
    summary=(
        "Gates that go from dense to sparse divide their scores by a temperature, large at first and small later. "
        "In a Gaussian mixture of experts that temperature is entangled with the slopes of the gate, so that "
        "parameters may be learnt slower than any power of the sample size although the density is learnt fast. "
        "Passing the score through a non-linear activation before the temperature breaks the tie. Users get a gate "
        "whose temperature can be identified, and a diagnostic that tells which activations work."
    ),
    reported=(
        "Dense-to-sparse gate with linear scores: parameter estimates may converge as slowly as 1/log n (theorem).",
        "With an activation that meets the independence conditions, rates are polynomial, n^-1/2 when the number "
        "of experts is right (theorem).",
        "The density is learnt at n^-1/2 with either gate (theorem).",
    ),
)
