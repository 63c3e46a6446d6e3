"""One offloading policy for every preference between delay and energy."""

from datetime import date

from postern.claims import Paper

PAPER = Paper(
    slug="gmorl-mec",
    title="Generalizable Pareto-Optimal Offloading with Reinforcement Learning in Mobile Edge Computing",
    date=date(2025, 8, 27),
    arxiv="2509.10474",
    authors=4,
    family="rl",
    summary=(
        "Tasks arrive and go either to a fast, hungry cloud server or to one of several frugal edge servers; delay "
        "and energy conflict, and their weights, the number of servers and their speeds are unknown at design "
        "time. One policy is trained over random systems and preferences with discrete soft actor-critic, reading "
        "the servers one by one through shared weights. Sweeping the preference at test time traces a Pareto "
        "front. For others it is a clean multi-objective environment with a context."
    ),
    reported=(
        "Hypervolume with six edge servers: 64.1, against 64.3 for one policy a preference, 57.9 for LinUCB, 30.2 "
        "for simulated annealing and 29.0 for random choice.",
        "On servers of other speeds: 80.29, against 81.69 for a policy trained on them.",
        "A moderate gap with nine edge servers after training on at most eight (number not available to us).",
    ),
)
