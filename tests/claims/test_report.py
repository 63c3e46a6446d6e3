"""The report as files: numbers, drawings, pages, and how they are put in place."""

import base64
import hashlib
import html
import io
import itertools
import math
import os
import re
from collections import Counter
from dataclasses import replace
from datetime import date
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urldefrag
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from postern.claims import AtLeast, Verdict, ledger
from postern.claims.comparison import Place, rank
from postern.claims.outcome import conclude
from postern.claims.report import charts, colours, figures, highlight, site, text, views, write_report
from tests.claims import report_papers
from tests.claims.contest import CONTEST, setting
from tests.claims.report_papers import (
    COMPARED,
    HOSTILE,
    MEDIANS,
    PAPERS,
    PLANNED,
    TOYS,
    TROUBLES,
    compare,
    compare_all,
    run,
    run_all,
)

LAPLACE = MEDIANS.claims["helps-with-laplace"]
COIN = MEDIANS.claims["coin-is-lucky"]
STYLE = (Path(site.__file__).parent / "style.css").read_text()
VOID = {"meta", "link", "input", "br"}
finite = st.floats(-1e300, 1e300)


class Page(HTMLParser):
    """What the tests ask of a page; reading it fails where tags do not nest."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.scripts: list[str] = []
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), f"{tag} has an attribute twice: {attrs}"
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        elif not self.open or self.open[-1] != "style":
            self.text += data

    def values(self, attribute):
        return [attributes[attribute] for _, attributes in self.tags if attribute in attributes]


@pytest.fixture(scope="module")
def outcomes():
    return run_all()


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """The ledger's documents of three claims, the coin's published twice."""
    results = tmp_path_factory.mktemp("results")
    coins = [run(COIN, seeds=range(1000, 1006)), run(COIN, seeds=range(1006, 1012))]
    ledger.publish(results, [run(LAPLACE, seeds=range(1000, 1005)), coins[0]], "a" * 40)
    ledger.publish(results, [coins[1], run(MEDIANS.claims["error-falls"], seeds=range(1000, 1004))], "b" * 40)
    return ledger.read_all(results)


@pytest.fixture(scope="module")
def rankings():
    return compare_all()


@pytest.fixture(scope="module")
def report(tmp_path_factory, outcomes, documents, rankings):
    folder = tmp_path_factory.mktemp("report")
    write_report(folder, PAPERS, outcomes, documents, {"processor": "One & Only", "torch": "2"}, rankings)
    return folder


@pytest.fixture(scope="module")
def pages(report):
    return {path.relative_to(report).as_posix(): Page(path.read_text()) for path in report.rglob("*.html")}


# Numbers and text


@pytest.mark.parametrize(
    "value, expected",
    [
        (0.0, "0"),
        (5.0, "5"),
        (0.5, "0.500"),
        (-0.01234, "−0.0123"),
        (9.996, "10.0"),
        (12345.6, "12\u202f346"),
        (1234.0, "1234"),
        (1e6, "1\u202f000\u202f000"),
        (1234567.8, "1.23 × 10⁶"),
        (0.0000456, "4.56 × 10⁻⁵"),
        (-1e300, "−1.00 × 10³⁰⁰"),
        (math.inf, "∞"),
        (-math.inf, "−∞"),
        (math.nan, "not a number"),
    ],
)
def test_numbers_have_three_significant_digits(value, expected):
    assert text.number(value) == expected


@given(finite)
def test_a_written_number_is_the_number(value):
    written = text.number(value).replace("−", "-").replace("\u202f", "")
    mantissa, _, power = written.partition(" × 10")
    exponent = power.translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")) or "0"
    assert float(f"{mantissa}e{exponent}") == pytest.approx(value, rel=5.01e-3, abs=1e-320)


@pytest.mark.parametrize(
    "value, expected", [(0.005, "0.005"), (-0.6, "−0.6"), (1e-7, "10⁻⁷"), (2.5e8, "2.5 × 10⁸"), (1e6, "10⁶"), (0, "0")]
)
def test_bounds_are_written_as_they_were_given(value, expected):
    assert text.plain(value) == expected


@given(st.floats(-1e3, 1e3), st.floats(1e-3, 1e3))
def test_the_ends_of_an_interval_are_told_apart(estimate, half):
    low, high = estimate - half, estimate + half
    decimals = text.shared_decimals(estimate, low, high)
    assert text.number(low, decimals) != text.number(high, decimals)


def test_an_interval_that_one_seed_leaves_open_is_unknown():
    assert text.interval(-math.inf, math.inf, 2) == text.interval(0.0, math.inf, 2) == "unknown with one seed"
    assert text.interval(-0.5, 0.25, 2) == "−0.50 to 0.25"


def test_seconds_seeds_and_criteria_read_well():
    assert [text.duration(s) for s in (0.25, 4.21, 59.7, 125, 11400)] == [
        "0.25 s", "4.2 s", "1 min 00 s", "2 min 05 s", "3 h 10 min"
    ]  # fmt: skip
    assert [text.seed_list(seeds) for seeds in ([3, 1, 2], [1, 2], [5, 1, 9])] == ["1 to 3", "1, 2", "1, 5, 9"]
    assert text.in_words("-0.6 <= a - b_c-1 <= -0.4") == "−0.6 ≤ a − b_c-1 ≤ −0.4"


def test_terminal_output_is_what_a_terminal_would_show():
    assert (
        text.terminal_output("\x1b[1;31mred\x1b[0m\r\n 10%\r 50%\r100%\n\x1b]0;title\x07end\x00\n") == "red\n100%\nend"
    )
    assert text.terminal_output("\n".join(map(str, range(100))) + "\n", lines=3) == "97\n98\n99"
    assert text.terminal_output("") == ""


@given(
    st.one_of(
        st.text(), st.sampled_from([LAPLACE.source(), 'f"{x!r:>{w}} {{}}" # é\n', "if True:\n x = '''", "\t1\n 2"])
    )
)
def test_highlighting_changes_no_character(source):
    marked = str(highlight.python(source))
    assert html.unescape(re.sub(r"</?span[^>]*>", "", marked)) == source.replace("\r\n", "\n")


def test_highlighting_marks_the_kinds():
    marked = str(highlight.python('def f(x):  # why\n    return len("<b>") + 1.5\n'))
    for kind, words in {"k": "def", "c": "# why", "b": "len", "s": "&#34;&lt;b&gt;&#34;", "n": "1.5"}.items():
        assert f'<span class="{kind}">{words}</span>' in marked


# Colours and figures


def test_contrast_is_that_of_the_guidelines():
    assert colours.contrast("#000000", "#ffffff") == pytest.approx(21)
    assert colours.contrast("#777777", "#fff") == pytest.approx(4.48, abs=0.005)  # a value everybody knows


@given(st.integers(0, 2**24 - 1).map("#{:06x}".format))
def test_no_colour_of_a_figure_is_lost_in_the_dark(colour):
    dark = colours.in_the_dark(colour)
    channels = colours.channels(colour)
    is_grey = max(channels) - min(channels) <= 20
    if is_grey and sum(channels) < 3 * 0x60:
        assert colours.contrast(dark, colours.DARK_SURFACE) >= 4.5
    elif is_grey and min(channels) > 0xF0:
        assert colours.contrast(dark, colours.DARK_SURFACE) < 1.3
    elif not is_grey and colours.contrast(colour, "#ffffff") >= 1.5:
        assert colours.contrast(dark, colours.DARK_SURFACE) >= 4.5


def test_the_colours_of_the_dark_theme_are_the_style_sheets():
    dark = STYLE.split(':root[data-theme="dark"]')[1].split("}")[0]
    assert f"--surface: {colours.DARK_SURFACE};" in dark
    assert f"--ink: {colours.DARK_INK};" in dark


def test_both_dark_themes_are_one():
    blocks = re.findall(r':root(?:\[data-theme="dark"\]|:not\(\[data-theme="light"\]\)) \{(.*?)\}', STYLE, re.DOTALL)
    assert len(blocks) == 2
    assert blocks[0] == blocks[1]


@pytest.mark.parametrize("colour", ["red", "#12", "123456", "#1234567"])
def test_a_colour_that_is_none_is_refused(colour):
    with pytest.raises(ValueError, match=re.escape(repr(colour))):
        colours.channels(colour)


def drawn(draw):
    figure = Figure(figsize=(4, 3))
    draw(figure.subplots())
    stream = io.StringIO()
    figure.savefig(stream, format="svg")
    return stream.getvalue()


def lines_with_hatches(axes):
    axes.plot([1, 2], [3, 5], color="#000000", marker="o", label="one")
    axes.bar([1, 2], [2, 3], hatch="//")
    axes.legend()


def test_inlined_figures_share_no_identifier_and_miss_none():
    svg = drawn(lines_with_hatches)
    shown = [figures.inline(svg, prefix, "caption") for prefix in ("a", "b")]
    identifiers = [re.findall(r' id="([^"]+)"', figure.markup) for figure in shown]
    for figure, names in zip(shown, identifiers, strict=True):
        assert len(names) == len(set(names)) > 10
        assert set(re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', figure.markup)) <= {
            pair for name in names for pair in ((name, ""), ("", name))
        }
    assert not set(identifiers[0]) & set(identifiers[1])
    assert shown[0].markup.count("url(#") == svg.count("url(#") > 0


def test_an_inlined_figure_draws_the_same():
    svg = drawn(lines_with_hatches)
    shapes = re.findall(r"<(path|use|rect)\b", svg)
    inlined = figures.inline(svg, "a", "caption").markup
    assert Counter(re.findall(r"<(path|use|rect)\b", inlined)) == Counter(shapes)
    original = [node.get("d") for node in ElementTree.fromstring(svg).iter(f"{figures.SVG}path")]
    assert [node.get("d") for node in ElementTree.fromstring(inlined).iter("path")] == original


def test_a_figures_colours_follow_the_theme_unless_they_are_its_data():
    plot = figures.inline(drawn(lines_with_hatches), "a", "caption")
    assert plot.adapts
    assert {"#000000", "#ffffff", "#1f77b4"} <= plot.colours
    assert "stroke: var(--on-1f77b4, #1f77b4)" in plot.markup or "fill: var(--on-1f77b4, #1f77b4)" in plot.markup
    for draw in (
        lambda axes: axes.imshow(np.eye(3)),
        lambda axes: axes.pcolormesh(np.eye(3)),
        lambda axes: axes.scatter(range(50), range(50), c=range(50)),
        lambda axes: axes.contourf(np.random.default_rng(0).random((5, 5))),
    ):
        heat_map = figures.inline(drawn(draw), "a", "caption")
        assert not heat_map.adapts
        assert not heat_map.colours
        assert "var(" not in heat_map.markup


def test_only_the_drawing_of_a_figure_reaches_the_page():
    svg = """<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" onload="alert(1)"
      width="72pt" height="1in" viewBox="0 0 72 72"><script>alert(2)</script><style>* {display: none}</style>
      <foreignObject><p xmlns="http://www.w3.org/1999/xhtml">alert(3)</p></foreignObject><!-- alert(4) -->
      <a xlink:href="javascript:alert(5)"><circle r="1"/></a>
      <path d="M0 0" onclick="alert(6)" style="fill: url(http://x.test/alert7); stroke: #123; behavior: url(alert8)"/>
      <use xlink:href="http://x.test/alert.svg#9"/><image href="http://x.test/alert10.png"/>
      <animate attributeName="href" values="javascript:alert(11)"/>
      <text x="1" fill="#ABCDEF">seen &lt;script&gt;alert&lt;/script&gt;<tspan>, too</tspan> &amp; here</text></svg>"""
    shown = figures.inline(svg, "a", "caption").markup
    Page(shown)
    assert "alert" not in shown.replace("seen &lt;script&gt;alert&lt;/script&gt;", "")
    assert not re.search(r"script:|http|onload|onclick|<style|<a\b|<animate", shown)
    assert 'width="96"' in shown
    assert "<tspan>, too</tspan> &amp; here</text>" in shown


@pytest.mark.parametrize("document", ["", "no XML <", "<html/>", "<svg/>"])
def test_what_is_no_svg_is_refused(document):
    with pytest.raises(ValueError, match="expected an SVG document"):
        figures.inline(document, "a", "caption")


# Charts


def positions(markup, kind, attribute):
    return [
        float(node.get(attribute).rstrip("%"))
        for node in ElementTree.fromstring(str(markup)).iter()
        if kind in (node.get("class") or "").split()
    ]


@given(
    st.floats(-1e6, 1e6),
    st.floats(1e-6, 1e6),
    st.floats(-1e6, 1e6),
)
def test_an_interval_lies_where_its_numbers_say(estimate, half, bound):
    reading = charts.Reading("m ≥ b", estimate, estimate - half, estimate + half, bound, math.inf)
    plot = charts.interval_plot(reading)
    [low], [high] = positions(plot, "interval", "x1"), positions(plot, "interval", "x2")
    [here], [at_bound] = positions(plot, "estimate", "cx"), positions(plot, "bound", "x1")
    assert 0 <= low <= here <= high <= 100
    assert here == pytest.approx((low + high) / 2, abs=0.02)
    scale = (high - low) / (2 * half)
    assert at_bound - here == pytest.approx((bound - estimate) * scale, abs=0.02 + 0.02 * abs(bound - estimate) / half)
    [start], [width] = positions(plot, "passes", "x"), positions(plot, "passes", "width")
    assert start == at_bound
    assert start + width == pytest.approx(100, abs=0.02)


def test_an_interval_plot_says_what_it_shows():
    reading = charts.Reading("0.9 ≤ m ≤ 1.1", 1.0, 0.95, 1.05, 0.9, 1.1)
    assert charts.describe_reading(reading) == (
        "Estimate 1.000, 95 % interval 0.950 to 1.050. The claim holds from 0.9 to 1.1."
    )
    unknown = charts.interval_plot(replace(reading, low=0.0, high=math.inf, floor=-math.inf))
    assert "unknown with one seed" in unknown
    assert "holds up to 1.1" in unknown
    assert not positions(unknown, "cap", "x1")


def test_curves_are_means_and_ranges_over_the_seeds():
    logs = {
        seed: [
            {"step": step, "loss": step + seed, "once": 1.0} if step else {"step": 0, "loss": seed} for step in range(3)
        ]
        for seed in (1, 3)
    }
    loss, once = charts.curves_of(logs)
    assert (loss.name, loss.steps, loss.seeds) == ("loss", (0, 1, 2), 2)
    assert (loss.mean, loss.low, loss.high) == ((2, 3, 4), (1, 2, 3), (3, 4, 5))
    assert once.steps == (1, 2)


def test_seeds_that_share_no_steps_are_not_averaged():
    [curve] = charts.curves_of({0: [{"step": s, "m": 1.0} for s in (0, 2)], 1: [{"step": s, "m": 9.0} for s in (1, 3)]})
    assert (curve.seeds, curve.mean) == (1, (1.0, 1.0))


def test_curves_leave_out_what_is_not_finite_and_single_points():
    logs = {0: [{"step": 0, "a": math.nan, "b": 1.0}, {"step": 1, "a": 2.0}, {"step": 2, "a": 3.0}]}
    [curve] = charts.curves_of(logs)
    assert (curve.name, curve.steps) == ("a", (1, 2))


def test_curves_share_a_chart_only_where_each_can_be_read():
    logs = {0: [{"step": s, "loss_a": 2 - s / 10, "loss_b": 2.2 - s / 9, "points": 100.0 * s} for s in range(10)]}
    assert [[curve.name for curve in chart.curves] for chart in charts.curve_charts(logs)] == [
        ["loss_a", "loss_b"],
        ["points"],
    ]
    flat = {0: [{"step": s, "test_a": s / 9, "test_b": s / 900, "test_rate": s / 1e6, "still": 0.5} for s in range(10)]}
    assert [[curve.name for curve in chart.curves] for chart in charts.curve_charts(flat)] == [
        ["test_a", "test_b", "still"],
        ["test_rate"],
    ]
    many = {0: [{"step": s, **{f"m{i}": float(s) for i in range(8)}} for s in range(3)]}
    assert [len(chart.curves) for chart in charts.curve_charts(many)] == [charts.MAX_LINES, 2]


def test_long_curves_are_thinned_but_keep_their_peaks():
    values = np.sin(np.arange(20_000) / 300)
    values[7_777] = 5.0
    [chart] = charts.curve_charts({0: [{"step": i, "m": value} for i, value in enumerate(values)]})
    [line] = list(ElementTree.fromstring(str(chart.markup)).iter("polyline"))
    points = [tuple(map(float, pair.split(","))) for pair in line.get("points").split()]
    assert len(points) <= charts.MAX_POINTS
    peak = min(points, key=lambda point: point[1])
    assert peak[0] == pytest.approx(1000 * 7_777 / 19_999, abs=0.1)
    assert [point[0] for point in points] == sorted(point[0] for point in points)
    assert len(chart.rows) == 12
    assert "from 0 at step 0" in chart.description
    assert "highest 5" in chart.description


def test_a_curve_over_decades_has_a_logarithmic_axis():
    [chart] = charts.curve_charts({0: [{"step": s, "error": 10.0**-s} for s in range(5)]})
    [line] = list(ElementTree.fromstring(str(chart.markup)).iter("polyline"))
    heights = [float(pair.split(",")[1]) for pair in line.get("points").split()]
    assert chart.is_logarithmic
    assert np.diff(heights) == pytest.approx([250] * 4, abs=0.2)


@given(st.lists(st.one_of(st.floats(), st.floats(-1e9, 1e9)), min_size=2, max_size=20))
def test_every_curve_lies_inside_its_chart(values):
    drawable = sum(abs(value) <= 1e100 for value in values)
    shown = charts.curve_charts({0: [{"step": i, "m": value} for i, value in enumerate(values)]})
    assert len(shown) == (drawable >= 2)
    if not shown:
        return
    [chart] = shown
    [line] = list(ElementTree.fromstring(str(chart.markup)).iter("polyline"))
    points = [tuple(map(float, pair.split(","))) for pair in line.get("points").split()]
    assert len(points) == drawable
    assert all(-0.1 <= x <= 1000.1 and -0.1 <= y <= 1000.1 for x, y in points)


def mark(name, place, quality, half=0.0, time=None):
    readings = [charts.Reading("", value, value - half, value + half) for value in (quality, time) if value is not None]
    return charts.Mark(name, place, *readings)


@given(st.lists(st.tuples(st.floats(-1e6, 1e6), st.floats(0, 1e6)), min_size=1, max_size=6))
def test_intervals_of_members_lie_on_one_axis(members):
    marks = [mark(f"m{i}", "behind", quality, half) for i, (quality, half) in enumerate(members)]
    lanes = charts.quality_lanes(marks, "quality")
    lows, highs = positions(lanes, "interval", "x1"), positions(lanes, "interval", "x2")
    heres, ticks = positions(lanes, "mark", "x"), positions(lanes, "grid", "x1")
    assert len(heres) == len(members)
    assert all(0 <= low <= here <= high <= 100 for low, here, high in zip(lows, heres, highs, strict=True))
    assert ticks == sorted(ticks)
    order = sorted(range(len(members)), key=lambda i: members[i][0])
    assert [heres[i] for i in order] == sorted(heres)
    is_linear = min(q for q, _ in members) <= 0 or max(q for q, _ in members) < 100 * min(q for q, _ in members)
    if is_linear:
        (quality, half), width = members[0], highs[0] - lows[0]
        for (other, other_half), low, high in zip(members, lows, highs, strict=True):
            assert (high - low) * half == pytest.approx(width * other_half, abs=0.03 * max(half, other_half))
            assert (high + low - highs[0] - lows[0]) * half == pytest.approx(
                width * (other - quality), abs=0.05 * max(half, abs(other - quality))
            )


def test_charts_of_members_say_what_they_show():
    marks = [mark("one", "best", 0.5, 0.01, 2.0), mark("two", "behind", 0.4, 0.02, 4.0)]
    lanes = charts.quality_lanes(marks, "accuracy (higher is better)")
    words = "accuracy (higher is better): one 0.500 (0.490 to 0.510), best; two 0.400 (0.380 to 0.420), behind."
    assert f'aria-label="{words}"' in lanes
    scatter = charts.quality_by_time(marks, "accuracy", "step time")
    assert "one 0.500 (0.490 to 0.510), best, 2.000 times; two" in scatter
    assert charts.SHAPES["best"] in lanes
    assert charts.SHAPES["behind"] in scatter
    hostile = [mark("<b>", "best", 1.0, time=1.0)]
    for chart in (charts.quality_lanes(hostile, "<b>"), charts.quality_by_time(hostile, "<b>", "<b>")):
        assert "b" not in [tag for tag, _ in Page(chart).tags]


def test_one_seed_has_no_interval_in_the_charts_of_members():
    lone = charts.Reading("", 0.5, -math.inf, math.inf)
    lanes = charts.quality_lanes([charts.Mark("one", "best", lone, lone)], "accuracy")
    assert positions(lanes, "mark", "x") == [50]
    assert not positions(lanes, "interval", "x1")
    assert "unknown with one seed" in lanes
    assert not positions(charts.quality_by_time([charts.Mark("one", "best", lone, lone)], "a", "t"), "interval", "x1")


def test_members_that_are_worlds_apart_share_a_logarithmic_axis():
    marks = [mark(f"m{i}", "behind", 10.0**i, time=2.0**i) for i in range(5)]
    assert np.diff(positions(charts.quality_lanes(marks, "loss"), "mark", "x")) == pytest.approx([25] * 4, abs=0.02)
    scatter = charts.quality_by_time(marks, "loss", "time")
    assert np.diff(positions(scatter, "mark", "x")) == pytest.approx([25] * 4, abs=0.02)
    wide = charts.quality_lanes([mark("a", "best", 1.0, 5.0), mark("b", "behind", 1e4, 9e9)], "loss")
    assert all(0 <= x <= 100 for x in positions(wide, "interval", "x1") + positions(wide, "interval", "x2"))


def test_members_without_times_are_not_drawn_against_time():
    timed = mark("timed", "best", 1.0, 0.1, 2.0)
    assert charts.quality_by_time([mark("untimed", "behind", 2.0)], "q", "t") == ""
    assert "untimed" not in charts.quality_by_time([timed, mark("untimed", "behind", 2.0)], "q", "t")
    assert charts.quality_lanes([mark("huge", "best", 1e200)], "q") == ""


# Pages


def test_every_paper_has_a_page_and_every_link_an_end(report, pages):
    assert set(pages) == {"index.html", *COMPARED} | {f"papers/{paper.slug}.html" for paper in PAPERS}
    for name, page in pages.items():
        for href in page.values("href"):
            if href.startswith(("https://arxiv.org/", "https://github.com/", "data:")):
                continue
            address, fragment = urldefrag(href)
            target = os.path.normpath(os.path.join(os.path.dirname(name), address)) if address else name
            assert target in pages
            if fragment and "=" not in fragment:
                assert fragment in pages[target].values("id")


def test_identifiers_and_references_agree(pages):
    for page in pages.values():
        identifiers = page.values("id")
        assert len(identifiers) == len(set(identifiers))
        for attribute in ("aria-labelledby", "for"):
            assert set(page.values(attribute)) <= set(identifiers)


def test_headings_leave_out_no_level(pages):
    for page in pages.values():
        levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(deeper <= level + 1 for level, deeper in itertools.pairwise(levels))


def test_text_of_a_paper_is_text(pages, report):
    own = set(pages["papers/planned.html"].scripts)
    for page in pages.values():
        assert set(page.scripts) == own
        assert "i" not in [tag for tag, _ in page.tags]
    shown = pages["papers/troubles.html"].text
    assert shown.count(HOSTILE) > 15
    assert HOSTILE not in (report / "papers/troubles.html").read_text()


def test_a_page_may_run_its_own_scripts_and_fetch_nothing(pages):
    for page in pages.values():
        [policy] = [a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
        digests = {f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in page.scripts}
        assert "default-src 'none'" in policy
        assert set(re.search(r"script-src ([^;]*)", policy)[1].split()) == digests
        assert not page.values("src")
        assert not [tag for tag, _ in page.tags if tag in ("base", "iframe", "object", "form action")]


def card(page_source, name):
    return Page(re.search(rf'<article class="claim [^>]*id="claim-{name}".*?</article>', page_source, re.DOTALL)[0])


def test_a_claims_card_sets_claim_against_measurement(report, outcomes):
    source = (report / "papers/robust-location.html").read_text()
    page = card(source, "helps-with-laplace")
    words = " ".join(page.text.split())
    judgement = outcomes[0].judgement
    for expected in (
        "Holds in this run, small scale",
        LAPLACE.statement,
        "half the variance",
        "variance_median / variance_mean ≤ 0.8",
        f"{judgement.estimate:.3f} 95 % interval {judgement.interval[0]:.3f} to {judgement.interval[1]:.3f}",
        "Published evidence, small scale",
        "1000 to 1004",
        "aaaaaaaaaaaa",
        "samples = 400, values = 25",
        "seed 3seed 4",
        "Histograms of both estimates: the wider one varies more.",
        "Mean of 5 seeds",
        "is robust",
        "def helps_with_laplace(config: Samples, run: Run)",
    ):
        assert expected in words
    exact = {repr(value) for metrics in outcomes[0].metrics.values() for value in metrics.values()}
    assert exact <= set(page.values("title"))
    assert [a["aria-labelledby"] for tag, a in page.tags if tag == "svg" and "aria-labelledby" in a]


def test_all_parts_of_a_criterion_are_shown(report):
    page = card((report / "papers/robust-location.html").read_text(), "error-falls")
    plots = [a["aria-label"] for tag, a in page.tags if a.get("class") == "interval-plot"]
    assert len(plots) == 4  # two parts, in this run and in the published evidence
    assert sum("holds from −0.6 to −0.4" in label for label in plots) == 2
    assert sum("holds from 0.05 to 0.12" in label for label in plots) == 2
    assert "Full4 seeds: samples = 100000, values = 25 (needs a GPU)" in re.sub(r"\n\s*", "", page.text)


def test_an_error_shows_its_message_and_the_end_of_the_output(report):
    words = card((report / "papers/troubles.html").read_text(), "raises").text
    assert "A seed ended in an error, so there is no verdict." in words
    assert "Seeds 0, 1:" in words
    assert f"colour\nlast state\n{HOSTILE}\nKeyError:" in words
    assert "\x1b" not in words


def test_what_has_not_run_says_why(report, pages):
    troubles = (report / "papers/troubles.html").read_text()
    assert f"needs a device that nobody has {HOSTILE}" in card(troubles, "lacks").text
    waiting = card((report / "papers/robust-location.html").read_text(), "waits").text
    assert "Not run yet" in waiting
    assert "postern check robust-location" in waiting
    assert "Planned: no claim" in pages["papers/planned.html"].text


def test_a_paper_is_used_as_its_page_says(pages):
    assert views.import_lines(["a.b.c", "a.b.d", "e.f"]) == "from a.b import c, d\nfrom e import f"
    long = views.import_lines([f"package.module.a_rather_long_name_{i}" for i in range(4)])
    assert long.startswith("from package.module import (\n    a_rather_long_name_0,\n")
    compile(long, "imports", "exec")
    shown = pages["papers/robust-location.html"].text
    assert "from statistics import median, fmean\nfrom numpy import percentile" in shown
    assert MEDIANS.example.strip() in shown
    assert "With an even number of values, median returns" in shown
    assert "The original uses tables" in shown
    assert "One & Only" in shown


# Comparisons


def rows_of(source):
    """The cells of a comparison's table, row by row, the first cell being the whole head of the row."""
    table = re.search(r'<table class="ranks">.*?</table>', source, re.DOTALL)[0]
    rows = re.findall(r"<tr>.*?</tr>", table, re.DOTALL)
    return [
        [" ".join(Page(cell).text.split()) for cell in re.findall(r"<t[hd].*?</t[hd]>", r, re.DOTALL)] for r in rows
    ]


def test_a_comparison_shows_every_member_with_its_place_and_numbers(report):
    source = (report / COMPARED[0]).read_text()
    heading, best, level, behind, error = rows_of(source)
    assert heading == [
        "Member",
        "Place",
        "Test accuracy, % higher is better",
        "Difference to the best paired by seed; below 0 is worse",
        "Test loss, nats lower is better",
        "Memory, MiB lower is better",
        "Step time multiple of leader’s; lower is better",
        "Time of a game multiple of leader’s; lower is better",
        "Learning rate chosen on validation data",
    ]
    assert best[:4] == ["leader wins from torch import softmax", "Best", "90.8 89.2 to 92.3", "–"]
    assert best[6:] == ["1.00", "1.00", "0.001"]
    assert level[7] == "–"
    assert behind[7] == "3.00"
    assert level[1:4] == ["Level", "90.5 87.2 to 93.8", "−0.3 −2.6 to 2.1"]
    assert behind[1:5] == ["Behind", "81.2 79.7 to 82.8", "−9.50 −10.42 to −8.58", "–"]  # it has no loss
    assert behind[6] == "0.500"
    assert error[1:] == ["Error", f"seed 0: ArithmeticError: diverged {HOSTILE}"]
    page = Page(source)
    assert [" ".join(words.split()) for words in re.findall(r"<dd>([a-z]+)</dd>", source)][:4] == [
        "leader", "rival", "loser", "broken"
    ]  # fmt: skip
    words = " ".join(page.text.split())
    for expected in (
        "A toy is trained. 4 members with the same data",
        "Budget100 steps a training",
        "Learning rates to choose from0.001, 0.003",
        "Seeds0 to 3",
        "Devicecpu, 1 thread",
        "Device of the timescpu, 2 threads",
        "Date2026-03-04",
        "Time of all jobs8.0 s",
        f"Label columnkind {HOSTILE}",
        f"step 1 {HOSTILE}",
        "the highest mean over the seeds (test accuracy, %). It was chosen by the very seeds that are shown",
        "One seed tells nothing",
        "for leader, rival, loser: a wider grid may bring more",
    ):
        assert expected in words
    assert {"91.0", "90.0", "80.0"} <= set(page.values("title"))


def test_a_comparisons_charts_and_badges_tell_places_apart_by_shape(report):
    page = Page((report / COMPARED[0]).read_text())
    lanes, scatter = (
        next(a for tag, a in page.tags if a.get("class") == kind and a["role"] == "img")
        for kind in ("lanes", "scatter")
    )
    assert "leader 90.8 (89.2 to 92.3), best; rival 90.5 (87.2 to 93.8), level; loser" in lanes["aria-label"]
    assert "loser 81.2 (79.7 to 82.8), behind, 0.500 times" in scatter["aria-label"]
    assert "broken" not in lanes["aria-label"]
    shapes = Counter(a["d"] for tag, a in page.tags if tag == "path" and "d" in a)
    assert all(shapes[shape] >= 4 for shape in charts.SHAPES.values())  # in both charts and in two badges
    assert len(set(charts.SHAPES.values())) == len(charts.SHAPES) == 3


def test_what_the_timing_drew_and_tabulated_is_shown(report):
    source = (report / COMPARED[0]).read_text()
    section = Page(re.search(r'<section aria-labelledby="timing">.*?</section>', source, re.DOTALL)[0])
    words = " ".join(section.text.split())
    assert "Memory by length. What the toys keep of their past, by its length." in words
    assert "What the toys keep toyKiB leader2.50" in words
    assert "<svg" in source


def test_names_of_data_are_text(report):
    for name in ("index.html", *COMPARED):
        source = (report / name).read_text()
        assert "<b>x" not in source
        assert HOSTILE not in source
    assert f"<title>Toys on {html.escape(TOYS.data)}" in (report / COMPARED[0]).read_text().replace("&#34;", "&quot;")


def test_the_index_lists_comparisons_only_where_there_are_any(report, tmp_path, rankings):
    index = (report / "index.html").read_text()
    section = Page(re.search(r'<section id="comparisons".*?</section>', index, re.DOTALL)[0])
    assert section.values("href") == list(COMPARED)
    words = " ".join(section.text.split())
    assert f"Toys on {TOYS.data} Best leader 1 level, 1 behind, 1 without a result, 4 seeds · 4 March 2026" in words
    assert "Toys on wine Best rival 1 level, 1 seed" in words
    assert "comparisons" not in re.sub(r"<style>.*?</style>", "", write(tmp_path).read_text(), flags=re.DOTALL)
    nobody = rank(CONTEST, setting("leader", "loser"), [])
    assert "Nobody came through" in Page(write(tmp_path, nobody).read_text()).text
    [path] = (tmp_path / "comparisons").iterdir()
    assert [row[1:] for row in rows_of(path.read_text())[1:]] == [["Error", "was not run"]] * 2
    assert "Charts" not in Page(path.read_text()).text


def write(folder, *comparisons, papers=PAPERS):
    return write_report(folder, papers, [], comparisons=comparisons)


def test_one_seed_and_less_is_better_are_said(report):
    source = (report / COMPARED[1]).read_text()
    words = " ".join(Page(source).text.split())
    assert "One seed gives no interval, so it tells nobody apart" in words
    assert "the lowest mean over the seeds (test loss, nats)" in words
    assert rows_of(source)[2][1:4] == ["Level", "0.100 no interval", "−0.0100 no interval"]
    assert "Label column" not in words
    assert "interval of each member" not in words


def test_members_link_to_their_papers_where_the_catalogue_has_them(tmp_path):
    family = replace(CONTEST, members=(CONTEST.members[0], replace(CONTEST.members[2], paper="robust-location")))
    known = compare(setting("leader", "loser"), family=family)
    write(tmp_path, known)
    [path] = (tmp_path / "comparisons").iterdir()
    assert "../papers/robust-location.html" in Page(path.read_text()).values("href")
    assert "robust-location" in rows_of(path.read_text())[2][0]
    write(tmp_path, known, papers=[PLANNED])
    assert "Medians" not in Page(path.read_text()).text


def test_without_times_there_is_no_chart_against_time(tmp_path):
    def breaks(setting, run):
        raise ArithmeticError("no clock")

    write(tmp_path, compare(setting("leader", "loser"), family=replace(CONTEST, time=breaks)))
    [path] = (tmp_path / "comparisons").iterdir()
    page = Page(path.read_text())
    assert "Steps were not timed with 4 seeds: ArithmeticError: no clock" in page.text
    assert "lanes" in page.values("class")
    assert "scatter" not in page.values("class")
    assert "Step time" not in page.text


def test_pages_of_comparisons_that_are_gone_are_removed(tmp_path, rankings):
    write(tmp_path, *rankings)
    (tmp_path / "comparisons/mine.html").write_text("<p>mine</p>")
    write(tmp_path, rankings[1])
    assert {path.name for path in (tmp_path / "comparisons").iterdir()} == {Path(COMPARED[1]).name, "mine.html"}
    write(tmp_path)
    assert {path.name for path in (tmp_path / "comparisons").iterdir()} == {"mine.html"}


def test_a_comparison_given_twice_is_refused_before_anything_is_written(tmp_path, rankings):
    with pytest.raises(ValueError, match="expected every comparison once, got comparisons/toys-"):
        write(tmp_path / "report", rankings[0], rankings[0])
    assert not (tmp_path / "report").exists()


def test_every_place_has_a_name():
    assert set(site.rankings.PLACE_NAMES) == set(Place)


# Verdicts


def view_of(claim, outcomes=(), published=()):
    [view] = views.paper_views([MEDIANS], outcomes, published)
    return next(each for each in view.claims if each.claim is claim)


def test_a_smoke_run_is_never_evidence(documents):
    smoke = run(LAPLACE, "smoke")
    claimed = replace(smoke, verdict=Verdict.HOLDS)
    document = documents_of(documents, LAPLACE) | {"scale": "smoke", "verdict": "holds"}
    for outcomes, published in (([smoke], []), ([claimed], []), ([], [claimed]), ([], [document])):
        view = view_of(LAPLACE, outcomes, published)
        assert {each.verdict for each in view.measurements} == {Verdict.SMOKE}
        assert view.verdict is (Verdict.SMOKE if outcomes else Verdict.NOT_RUN)


def documents_of(documents, claim):
    return next(document for document in documents if document["claim"] == claim.name)


def test_the_largest_scale_that_was_decided_speaks_for_a_claim(documents):
    small, smoke, document = run(LAPLACE), run(LAPLACE, "smoke"), documents_of(documents, LAPLACE)
    refuted = replace(small, scale="full", verdict=Verdict.REFUTED)
    unavailable = replace(small, scale="full", verdict=Verdict.NOT_RUN, judgement=None, results=())
    for outcomes, published, standing, verdict, scale in (
        ([], [], "", Verdict.NOT_RUN, ""),
        ([smoke], [], "this run", Verdict.SMOKE, "smoke"),
        ([smoke, small], [document], "this run", Verdict.HOLDS, "small"),
        ([small, refuted], [], "this run", Verdict.REFUTED, "full"),
        ([small, unavailable], [], "this run", Verdict.HOLDS, "small"),
        ([smoke], [document], "published", Verdict.HOLDS, "small"),
        ([unavailable], [document], "published", Verdict.HOLDS, "small"),
        ([unavailable], [], "this run", Verdict.NOT_RUN, "full"),
        ([], [document, replace(small, scale="full", verdict=Verdict.REFUTED)], "published", Verdict.REFUTED, "full"),
        ([replace(smoke, verdict=Verdict.ERROR)], [document], "this run", Verdict.ERROR, "smoke"),
    ):
        view = view_of(LAPLACE, outcomes, published)
        assert (view.standing, view.verdict, view.scale) == (standing, verdict, scale)
    assert view_of(LAPLACE).label == "not run yet"
    assert view_of(LAPLACE, [unavailable]).label == "not run"


def test_a_document_of_the_ledger_says_what_its_outcome_said(documents):
    document = documents_of(documents, MEDIANS.claims["error-falls"])
    outcome = run(MEDIANS.claims["error-falls"], seeds=range(1000, 1004))
    [read] = view_of(MEDIANS.claims["error-falls"], (), [document]).published
    [direct] = view_of(MEDIANS.claims["error-falls"], (), [outcome]).published
    assert (read.verdict, read.readings, read.metrics, read.tables) == (
        direct.verdict, direct.readings, direct.metrics, direct.tables
    )  # fmt: skip
    assert len(read.readings) == 2
    assert read.readings[0].passing == (-0.6, -0.4)


def test_a_document_is_shown_with_its_history_and_what_has_changed(documents):
    document = documents_of(documents, COIN)
    [read] = view_of(COIN, (), [document]).published
    assert read.remarks == ("Earlier publications of this claim, newest first: inconclusive",)
    changed = document | {
        "statement": "Coins are lucky.",
        "criterion": "heads >= 0.6",
        "history": [],
        "interval": [None, None],
    }
    [read] = view_of(COIN, (), [changed]).published
    assert read.remarks == (
        "It was measured for an earlier wording: “Coins are lucky.”",
        "It was judged by an earlier criterion: heads ≥ 0.6",
    )
    [reading] = read.readings
    assert reading.passing is None
    assert not reading.is_known
    assert "unknown with one seed" in charts.interval_plot(reading)


def test_counts_are_those_of_the_claims(outcomes, documents):
    shown = views.paper_views(PAPERS, outcomes, documents)
    counted = {str(tally.verdict): (tally.claims, tally.published) for tally in views.tallies(shown)}
    assert counted == {"holds": (3, 0), "refuted": (1, 0), "inconclusive": (1, 1), "error": (1, 0), "not run": (2, 0)}
    assert sum(claims for claims, _ in counted.values()) == sum(len(paper.claims) for paper in PAPERS)


def test_what_contradicts_itself_is_refused_before_anything_is_written(tmp_path, documents):
    small, document = run(LAPLACE), documents_of(documents, LAPLACE)
    for papers, outcomes, published, words in (
        ([MEDIANS, MEDIANS], [], [], "'robust-location' 2 times"),
        ([PLANNED], [small], [], "robust-location/helps-with-laplace, whose paper is not among"),
        ([MEDIANS], [small, small], [], "two of robust-location/helps-with-laplace at small"),
        ([MEDIANS], [], [document | {"verdict": "true"}], "unknown verdict 'true'"),
        ([MEDIANS], [], [document | {"scale": "huge"}], "unknown scale 'huge'"),
        ([MEDIANS], [], [document | {"metrics": {"1000": 3}}], "expected metrics by seed"),
        ([MEDIANS], [], [document | {"interval": ["a", "b"]}], "interval is unreadable"),
        ([MEDIANS], [], [{"paper": "robust-location"}], "'claim' is missing"),
    ):
        with pytest.raises(ValueError, match=words):
            write_report(tmp_path / "report", papers, outcomes, published)
    assert not (tmp_path / "report").exists()


def test_evidence_of_what_is_gone_is_left_out(tmp_path, documents):
    gone = [documents[0] | {"paper": "gone"}, documents[0] | {"claim": "gone"}]
    index = write_report(tmp_path, PAPERS, [], gone)
    assert "published" not in Page(index.read_text()).text.split("Order")[0]


def test_a_criterion_of_a_users_own_needs_no_bounds(tmp_path):
    class Odd:
        def judge(self, seeds):
            return replace(AtLeast("heads", 0.4).judge(seeds), criterion=self.describe())

        def describe(self):
            return "heads look fair"

        def metrics(self):
            return frozenset({"heads"})

    claim = replace(COIN, holds_when=Odd())
    paper = replace(MEDIANS, claims={claim.name: claim})
    outcome = conclude(claim, "small", run(COIN).results)
    write_report(tmp_path, [paper], [outcome])
    page = card((tmp_path / "papers/robust-location.html").read_text(), "coin-is-lucky")
    assert "heads look fair" in page.text
    assert [a["aria-label"] for _, a in page.tags if a.get("class") == "interval-plot"] == [
        charts.describe_reading(view_of_paper(paper, outcome).readings[0])
    ]


def view_of_paper(paper, outcome):
    [view] = views.paper_views([paper], [outcome], [])
    return view.claims[0].measured[0]


def test_a_figure_that_cannot_be_read_does_not_cost_the_report(tmp_path):
    outcome = run(LAPLACE, "smoke")
    [result] = outcome.results
    broken = {"distribution": replace(result.measurement.figures["distribution"], svg="<svg")}
    damaged = replace(result, measurement=replace(result.measurement, figures=broken))
    write_report(tmp_path, [MEDIANS], [replace(outcome, results=(damaged,))])
    page = card((tmp_path / "papers/robust-location.html").read_text(), "helps-with-laplace")
    assert "This figure could not be read." in page.text
    assert "Histograms of both estimates" in page.text


# Putting it in place


def snapshot(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_report_is_written_the_same_and_only_once(tmp_path, report, outcomes, documents, rankings):
    environment = {"processor": "One & Only", "torch": "2"}
    index = write_report(tmp_path, PAPERS, outcomes, documents, environment, rankings)
    assert index == tmp_path / "index.html"
    assert snapshot(tmp_path) == snapshot(report)
    for path in tmp_path.rglob("*.html"):
        os.utime(path, (1, 1))
    write_report(tmp_path, PAPERS, outcomes, documents, environment, rankings)
    assert {path.stat().st_mtime for path in tmp_path.rglob("*.html")} == {1}


def test_a_second_report_updates_the_first(tmp_path, outcomes):
    write_report(tmp_path, PAPERS, [])
    (tmp_path / "papers/mine.html").write_text("<p>mine</p>")
    (tmp_path / "notes.txt").write_text("mine")
    write_report(tmp_path, [MEDIANS, PLANNED], outcomes[:1])
    assert set(snapshot(tmp_path)) == {
        "index.html", "notes.txt", "papers/mine.html", "papers/planned.html", "papers/robust-location.html"
    }  # fmt: skip
    assert "Holds" in card((tmp_path / "papers/robust-location.html").read_text(), "helps-with-laplace").text
    assert 'data-verdicts="holds|not run"' in (tmp_path / "index.html").read_text()


@pytest.mark.parametrize("survivors", range(5))
def test_an_interrupted_update_leaves_a_whole_site(tmp_path, monkeypatch, outcomes, rankings, survivors):
    added = replace(PLANNED, slug="added", title="Added")
    removed = PLANNED
    write_report(tmp_path, [*PAPERS], [])
    before = snapshot(tmp_path)
    rename, calls = os.replace, []

    def interrupted(source, target):
        if len(calls) == survivors:
            raise KeyboardInterrupt
        calls.append(target)
        rename(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_report(tmp_path, [MEDIANS, TROUBLES, added], outcomes, comparisons=rankings[:1])
    after = snapshot(tmp_path)
    assert after["index.html"] == before["index.html"]
    assert f"papers/{removed.slug}.html" in after
    assert set(after) - set(before) <= {"papers/added.html", COMPARED[0]}
    for href in Page(after["index.html"].decode()).values("href"):
        address, fragment = urldefrag(href)
        if address.endswith(".html"):
            assert address in after
            assert not fragment or fragment in Page(after[address].decode()).values("id")
    monkeypatch.undo()
    write_report(tmp_path, [MEDIANS, TROUBLES, added], outcomes)
    assert 'href="papers/added.html"' in (tmp_path / "index.html").read_text()
    assert not (tmp_path / f"papers/{removed.slug}.html").exists()


def test_nothing_is_left_behind_when_the_disk_is_full(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_report(tmp_path, PAPERS, [])
    assert snapshot(tmp_path) == {}


def test_a_catalogue_without_claims_or_papers_can_be_reported(tmp_path):
    assert "0 papers" in Page(write_report(tmp_path / "none", [], []).read_text()).text
    page = Page(write_report(tmp_path / "planned", [PLANNED], []).read_text())
    assert "1 paper, 0 claims" in page.text
    assert "29 February 2024" in page.text


def test_the_papers_for_these_tests_measure_what_is_known(outcomes):
    """The ratio of variances of median and mean: below 1 for Laplace, near pi / 2 for Gaussian samples."""
    laplace, gauss = outcomes[0].judgement, outcomes[2].judgement
    assert (outcomes[0].verdict, outcomes[2].verdict) == (Verdict.HOLDS, Verdict.REFUTED)
    assert 0.5 < laplace.estimate < 0.75
    assert gauss.estimate == pytest.approx(math.pi / 2, abs=0.2)
    assert report_papers.FINISHED.date() == date(2026, 3, 4)
