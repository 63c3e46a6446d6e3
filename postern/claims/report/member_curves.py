"""Drawings of a comparison with one curve a member."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure

from postern.claims.comparison import Curves, Ranking
from postern.claims.report import text
from postern.claims.run import Picture

Points = tuple[tuple[float, float], ...]


def curve_pictures(ranking: Ranking) -> dict[str, Picture]:
    """Draw the curves that a contest declares, of the members that have them.

    Args:
        ranking: of the members.
    """
    pictures = {}
    for name, drawn in ranking.contest.curves.items():
        curves = {each.member.name: each.curves[name] for each in ranking.standings if name in each.curves}
        if curves:
            pictures[name] = Picture.of(_figure(drawn, curves), _in_words(drawn, curves))
    return pictures


def _figure(drawn: Curves, curves: Mapping[str, Points]) -> Figure:
    figure = Figure(figsize=(6, 3.8))
    axes = figure.add_subplot()
    for place, (name, points) in enumerate(curves.items()):
        style = ("-", "--", ":")[place // 10 % 3]  # matplotlib has ten colours
        axes.plot(*zip(*points, strict=True), style, marker="o", markersize=3, label=name)
    axes.set(xlabel=drawn.across, ylabel=drawn.up, title=drawn.title)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def _in_words(drawn: Curves, curves: Mapping[str, Points]) -> str:
    told = "; ".join(
        f"{name}: "
        + ", ".join(
            f"{text.plain(float(f'{up:.3g}'))} at {text.plain(float(f'{across:.3g}'))}" for across, up in points
        )
        for name, points in curves.items()
    )
    return f"{drawn.title}; {drawn.up} at {drawn.across}. {told}."
