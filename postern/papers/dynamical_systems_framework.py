"""Attention, state-space models and recurrent networks as one recurrence."""

from datetime import date

from postern.claims import Paper

PAPER = Paper(
    slug="dynamical-systems-framework",
    title=(
        "Understanding the differences in Foundation Models: Attention, State Space Models, and Recurrent Neural "
        "Networks"
    ),
    date=date(2024, 5, 24),
    arxiv="2405.15731",
    authors=5,
    family="dynamics",
    summary=(
        "Softmax attention, linear attention, selective state-space models and gated recurrent networks are "
        "written as one linear recurrence whose coefficients vary with time. Side by side it shows that linear "
        "attention approaches softmax only by enlarging its state, that it differs from a state-space model only "
        "in how transition and input scale are tied, and that the normaliser may be any positive function of the "
        "input. For those who compare or convert sequence mixers it is a converter and a test oracle."
    ),
    reported=(
        "Linear attention approaches softmax as the state expansion grows from 32 to 256 on multi-query "
        "associative recall (curves; numbers not available to us).",
        "A learnt normaliser closes part of the gap between linear and softmax attention, and S6 and SSD come near "
        "softmax (numbers not available to us).",
        "Giving the qLSTM the gate of S6 helps it, most on the longer tasks (numbers not available to us).",
    ),
    code="IntelligentControlSystems/dsf-mqar",
)
