"""The engine: what a claim is, how it is run, judged, stored and reported. It knows no paper."""

from postern.claims.criteria import (
    AllOf,
    AtLeast,
    AtMost,
    Criterion,
    Difference,
    Given,
    Judgement,
    Metrics,
    Ratio,
    Slope,
    Verdict,
    Within,
)
from postern.claims.paper import SCALES, Claim, Paper
from postern.claims.run import Measurement, Picture, Run
from postern.errors import Unavailable

__all__ = [
    "SCALES",
    "AllOf",
    "AtLeast",
    "AtMost",
    "Claim",
    "Criterion",
    "Difference",
    "Given",
    "Judgement",
    "Measurement",
    "Metrics",
    "Paper",
    "Picture",
    "Ratio",
    "Run",
    "Slope",
    "Unavailable",
    "Verdict",
    "Within",
]
