"""Statistics of top-K gates: how fast a sparse Gaussian mixture of experts is learnt."""

from datetime import date

from postern.claims import Paper

PAPER = Paper(
    slug="topk-gating-gmoe",
    title="Statistical Perspective of Top-K Sparse Softmax Gating Mixture of Experts",
    date=date(2023, 9, 24),
    arxiv="2309.13850",
    authors=4,
    family="experts",
    summary=(
        "How many samples does it take to recover the experts of a mixture whose softmax gate keeps only the K "
        "largest scores? With the right number of experts, maximum likelihood finds density and parameters at the "
        "parametric rate. With spare experts the density is still learnt that fast, but only if K is raised enough "
        "to hold every duplicate, and the duplicated experts themselves converge very slowly. The result is a "
        "laboratory with known truth, and a rule for practice: raise K by as many experts as you add."
    ),
    reported=(
        "Right number of experts: density and all parameters converge at n^-1/2 up to logarithms (theorem; "
        "synthetic EM study).",
        "Too many experts: the density keeps n^-1/2 if the fitted K reaches the total size of the Voronoi cells of "
        "the kept experts, and stays away from the truth if it does not (theorem).",
        "A true expert fitted by two copies is recovered only at n^-1/8 (gate slope, intercept) and n^-1/4 (slope, "
        "variance) (theorem).",
    ),
)
