"""The report in headless Chromium: what a reader sees and does."""

import re
import shutil
import time

import pytest

from postern.claims import ledger
from postern.claims.report import write_report
from tests.claims.report_papers import COMPARED, MEDIANS, PAPERS, compare_all, crowd, run, run_all

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser, google-chrome or chrome on the PATH"),
]
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
CROWD = crowd(9)
CROWDED = f"comparisons/crowd-{CROWD.setting.identity}.html"
PAGES = ("index.html", *(f"papers/{paper.slug}.html" for paper in PAPERS), *COMPARED, CROWDED)
ALL = ["Medians for Heavy Tails", "Experiments in Trouble", "A Paper Still to Come"]

# Text that is drawn, with its colour and what lies behind it: every background from the page down, blended.
CONTRASTS = """() => {
  const parse = colour => { const [r, g, b, a = 1] = colour.match(/[\\d.]+/g).map(Number); return [r, g, b, a]; };
  const over = (top, below) => [0, 1, 2].map(i => top[3] * top[i] + (1 - top[3]) * below[i]).concat(1);
  const light = c => { const [r, g, b] = c.map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement, words = walker.currentNode.data.trim();
    if (!words || element.closest("script, style, .unseen, option") || !element.checkVisibility()) continue;
    let behind = [255, 255, 255, 1];
    for (const ancestor of [...function* (e) { for (; e; e = e.parentElement) yield e; }(element)].reverse())
      behind = over(parse(getComputedStyle(ancestor).backgroundColor), behind);
    const style = getComputedStyle(element);
    const colour = over(parse(element instanceof SVGElement ? style.fill : style.color), behind);
    const [a, b] = [light(colour), light(behind)].sort((x, y) => y - x);
    const size = parseFloat(style.fontSize), isLarge = size >= 24 || (size >= 18.66 && style.fontWeight >= 700);
    found.push({ words: words.slice(0, 40), contrast: (a + 0.05) / (b + 0.05), needed: isLarge ? 3 : 4.5 });
  }
  return found;
}"""


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    results = tmp_path_factory.mktemp("results")
    published = [run(MEDIANS.claims[name], seeds=range(1000, 1006)) for name in ("helps-with-laplace", "coin-is-lucky")]
    ledger.publish(results, published, "a" * 40)
    folder = tmp_path_factory.mktemp("report")
    environment = {"processor": "a processor", "torch": "2"}
    write_report(folder, PAPERS, run_all(), ledger.read_all(results), environment, [*compare_all(), CROWD])
    return folder


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def reader(browser, report):
    """Open pages as a reader with a screen, a theme and habits; complaints of the browser fail the test."""
    contexts, complaints = [], []

    def open_page(name="index.html", width=1280, theme="light", init="", **habits):
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=theme, **habits)
        contexts.append(context)
        if init:
            context.add_init_script(init)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(f"uncaught: {error}"))
        page.on("request", lambda request: complaints.append(request.url) if is_foreign(request.url) else None)
        page.goto((report / name.split("#")[0]).as_uri() + ("#" + name.split("#")[1] if "#" in name else ""))
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not complaints


def is_foreign(url):
    return not url.startswith(("file:///", "data:"))


def unfold(page):
    page.evaluate("document.querySelectorAll('details').forEach(details => { details.open = true; })")


def until(page, condition):
    """Wait for a condition; the page's own policy forbids `wait_for_function`, which evaluates text."""
    deadline = time.monotonic() + 10
    while not page.evaluate(condition):
        assert time.monotonic() < deadline, f"waited in vain for: {condition}"
        page.wait_for_timeout(20)


def titles(page):
    return [title.split(" <")[0] for title in page.locator("#papers h3:visible").all_inner_texts()]


def fragment(page):
    return page.evaluate("location.hash")


# Every page


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_no_page_complains_or_is_wider_than_the_screen(reader, name, theme):
    page = reader(name, theme=theme)
    for _ in range(2):
        for width in (1280, 768, 390, 360, 320):
            page.set_viewport_size({"width": width, "height": 900})
            assert page.evaluate("document.documentElement.scrollWidth") <= width
        unfold(page)
    assert page.title() != "taken over"


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_text_stands_out_from_what_is_behind_it(reader, name, theme):
    page = reader(name, theme=theme)
    unfold(page)
    texts = page.evaluate(CONTRASTS)
    assert len(texts) > 15
    assert [text for text in texts if text["contrast"] < text["needed"]] == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_badges_bounds_and_curves_stand_out(reader, theme):
    """What is no text needs a contrast of three."""
    page = reader("papers/robust-location.html", theme=theme)
    contrasts = page.evaluate(
        """() => {
      const light = colour => { const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map(Number)
        .map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
      const surface = light(getComputedStyle(document.querySelector(".claim")).backgroundColor);
      return [...document.querySelectorAll(".claim polyline.line, .interval, .bound, .sign .solid, .sign .dashed")]
        .filter(e => e.checkVisibility()).map(e => {
          const style = getComputedStyle(e), colour = light(style.stroke === "none" ? style.fill : style.stroke);
          const [a, b] = [colour, surface].sort((x, y) => y - x);
          return (a + 0.05) / (b + 0.05);
        });
    }"""
    )
    assert len(contrasts) > 20
    assert min(contrasts) >= 3


@pytest.mark.parametrize("name", PAGES)
def test_everything_has_a_name_for_who_cannot_see_it(reader, name):
    page = reader(name, width=390)
    unfold(page)
    session = page.context.new_cdp_session(page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    kinds = {"image", "button", "link", "textbox", "searchbox", "combobox", "region", "figure", "table", "navigation"}
    named = [
        (node["role"]["value"], node.get("name", {}).get("value", ""))
        for node in nodes
        if not node["ignored"] and node["role"]["value"] in kinds
    ]
    assert [kind for kind, words in named if not words.strip() and kind not in ("figure", "table")] == []
    landmarks = [node["role"]["value"] for node in nodes if not node["ignored"]]
    for landmark in ("banner", "main", "contentinfo"):
        assert landmarks.count(landmark) == 1
    drawn = page.locator("svg:visible:not([aria-hidden=true]):not(svg svg)").count()
    assert [kind for kind, _ in named].count("image") >= drawn
    expected = {"papers/robust-location.html": 10, "papers/troubles.html": 3} | dict.fromkeys([*COMPARED, CROWDED], 2)
    assert drawn >= expected.get(name, 0)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_figures_are_readable_in_both_themes(reader, theme):
    page = reader("papers/robust-location.html", theme=theme)
    ink, sheet = page.evaluate(
        """() => [
      getComputedStyle(document.querySelector(".canvas:not(.on-paper) use")).fill,
      getComputedStyle(document.querySelector(".canvas.on-paper")).backgroundColor,
    ]"""
    )
    assert ink == ("rgb(0, 0, 0)" if theme == "light" else "rgb(232, 230, 225)")
    assert min(map(int, re.findall(r"\d+", sheet))) > 220


@pytest.mark.parametrize("name", PAGES)
def test_the_keyboard_reaches_everything_and_shows_where_it_is(reader, name):
    page = reader(name, width=390)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    assert page.locator(".skip").bounding_box()["y"] >= 0
    expected = page.evaluate(
        """() => [...document.querySelectorAll("a, button, input, select, summary, [tabindex]")]
      .filter(e => e.checkVisibility()).length"""
    )
    reached = 0
    while page.evaluate("document.activeElement !== document.body"):
        reached += 1
        outline = page.evaluate(
            "(() => { const s = getComputedStyle(document.activeElement); return [s.outlineStyle, s.outlineWidth]; })()"
        )
        assert outline == ["solid", "3px"], page.evaluate("document.activeElement.outerHTML.slice(0, 100)")
        page.keyboard.press("Tab")
    assert reached == expected


def test_what_scrolls_sideways_is_a_named_region(reader):
    page = reader("papers/troubles.html", width=390)
    boxes = page.locator(".scroll[data-scrolls], .canvas[data-scrolls]")
    assert boxes.count() >= 2
    for box in boxes.all():
        assert box.get_attribute("role") == "region"
        assert box.get_attribute("tabindex") == "0"
        assert box.get_attribute("aria-label")
        box.focus()
        page.keyboard.press("End")
        page.keyboard.press("ArrowRight")
        until(page, "document.activeElement.scrollLeft > 0")
    page.set_viewport_size({"width": 2000, "height": 900})
    until(page, "!document.querySelector('.canvas').hasAttribute('tabindex')")


def test_nothing_moves(reader):
    """So nothing has to stop for a reader who asked for less motion."""
    for name in PAGES:
        moving = reader(name).evaluate(
            """[...document.querySelectorAll("*")].map(e => getComputedStyle(e)).filter(style =>
          style.animationName !== "none" || style.transitionDuration !== "0s" || style.scrollBehavior !== "auto"
        ).length"""
        )
        assert moving == 0


def test_badges_keep_their_outline_in_forced_colours(reader):
    page = reader("papers/robust-location.html", forced_colors="active")
    assert page.locator(".badge").first.evaluate("e => getComputedStyle(e).borderTopWidth") == "1px"


def test_verdicts_differ_in_words_and_shape(reader):
    page = reader("index.html")
    shapes = {}
    for item in page.locator(".claims li").all():
        words = item.locator(".verdict").inner_text().removesuffix(" yet")
        shapes.setdefault(words, set()).add(item.locator("svg").inner_html())
    assert set(shapes) == {"Holds", "Refuted", "Inconclusive", "Error", "Not run"}
    assert all(len(drawings) == 1 for drawings in shapes.values())
    assert len(set.union(*shapes.values())) == len(shapes)


# Search, filters, order


def test_search_finds_titles_summaries_and_statements(reader):
    page = reader()
    box = page.get_by_role("searchbox", name="Search")
    for words, found in (
        ("HEAVY tails", ALL[:1]),
        ("coin heads", ALL[:1]),  # in a statement
        ("uberraschung", ALL[2:]),  # in a summary, with its umlaut
        ("troubles", ALL[1:2]),  # a slug
        ("location", [ALL[0], ALL[2]]),  # a family
        ("<script>", ALL[1:2]),
        ("", ALL),
    ):
        box.fill(words)
        assert titles(page) == found
        assert page.locator("#count").inner_text() == (f"{len(found)} of 3 papers" if len(found) < 3 else "3 papers")
    assert not page.locator("#empty").is_visible()
    box.fill("heavy nothing")
    assert titles(page) == []
    assert page.locator("#count").inner_text() == "0 of 3 papers"
    page.get_by_role("button", name="Show all papers").click()
    assert titles(page) == ALL
    assert box.input_value() == ""
    assert fragment(page) == ""


def test_filters_combine(reader):
    page = reader()
    family, verdict, status = (page.get_by_label(name, exact=True) for name in ("Family", "Verdict", "Status"))
    family.select_option("location")
    assert titles(page) == [ALL[0], ALL[2]]
    status.select_option("planned")
    assert titles(page) == ALL[2:]
    status.select_option("written")
    assert titles(page) == ALL[:1]
    family.select_option("")
    verdict.select_option("error")
    assert titles(page) == ALL[1:2]
    assert page.locator(".claims li:visible .verdict").all_inner_texts() == ["Error"]
    verdict.select_option("inconclusive")
    assert titles(page) == ALL[:1]
    verdict.select_option("smoke")
    assert page.locator("#empty").is_visible()


def test_papers_can_be_ordered(reader):
    page = reader()
    order = page.get_by_label("Order")
    for choice, expected in (
        ("newest", [ALL[2], ALL[1], ALL[0]]),
        ("oldest", ALL),
        ("title", [ALL[2], ALL[1], ALL[0]]),
        ("number", ALL),
    ):
        order.select_option(choice)
        assert titles(page) == expected


def test_a_view_can_be_linked_and_survives_reloading(reader):
    page = reader()
    page.get_by_label("Search").fill("a & b=c #d")
    page.get_by_label("Order").select_option("newest")
    assert fragment(page) == "#q=a+%26+b%3Dc+%23d&sort=newest"
    page.reload()
    assert page.get_by_label("Search").input_value() == "a & b=c #d"
    assert page.get_by_label("Order").input_value() == "newest"
    linked = reader("index.html#family=location&status=planned")
    assert titles(linked) == ALL[2:]
    assert linked.get_by_label("Family").input_value() == "location"
    nonsense = reader("index.html#family=nowhere&sort=sideways&unknown=1")
    assert titles(nonsense) == ALL
    assert nonsense.get_by_label("Family").input_value() == ""


def test_counts_and_families_lead_to_their_papers(reader):
    page = reader()
    page.get_by_role("link", name="1 refuted").click()
    playwright.expect(page.locator("#count")).to_have_text("1 of 3 papers")
    assert titles(page) == ALL[:1]
    assert page.get_by_label("Verdict", exact=True).input_value() == "refuted"
    page.get_by_role("link", name="The median of Gaussian samples").click()
    assert page.url.endswith("papers/robust-location.html#claim-helps-with-gauss")
    assert 0 <= page.locator("#claim-helps-with-gauss").bounding_box()["y"] < 900
    page.get_by_role("link", name="location", exact=True).click()
    assert page.url.endswith("index.html#family=location")
    assert titles(page) == [ALL[0], ALL[2]]
    page.go_back()
    page.go_back()
    until(page, "location.hash === '#verdict=refuted'")
    assert titles(page) == ALL[:1]


def test_the_slash_key_begins_a_search(reader):
    page = reader()
    page.keyboard.press("/")
    page.keyboard.type("coin/")
    assert page.get_by_label("Search").input_value() == "coin/"


def test_without_scripts_everything_is_there(reader):
    page = reader(java_script_enabled=False)
    assert page.locator("#papers h3").count() == 3
    assert not page.locator("#filters").is_visible()
    assert not page.locator("#theme").is_visible()
    assert reader("papers/robust-location.html", java_script_enabled=False).locator(".copy").count() == 0


# Theme, copying, printing


def test_the_theme_follows_the_system_until_the_reader_chooses(reader, report):
    ground = "getComputedStyle(document.documentElement).backgroundColor"
    page = reader(theme="dark")
    dark = page.evaluate(ground)
    page.get_by_role("button", name="Light theme").click()
    light = page.evaluate(ground)
    assert light != dark
    page.wait_for_timeout(500)  # another process may load the next page: what is stored takes a moment to reach it
    page.goto((report / PAGES[1]).as_uri())
    assert page.evaluate(ground) == light
    page.emulate_media(color_scheme="light")
    assert page.evaluate(ground) == light
    page.get_by_role("button", name="Dark theme").click()
    assert page.evaluate(ground) == dark
    page.get_by_role("button", name="Light theme").click()  # back to the system's: from here on it follows it again
    page.emulate_media(color_scheme="dark")
    assert page.evaluate(ground) == dark
    page.get_by_role("button", name="Light theme").wait_for()  # its text follows with the next frame


def test_a_browser_that_stores_nothing_still_changes_the_theme(reader):
    page = reader(init="Object.defineProperty(window, 'localStorage', { get() { throw new Error('denied'); } });")
    page.get_by_role("button", name="Dark theme").click()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


@pytest.mark.parametrize("clipboard", ["granted", "missing", "refused"])
def test_code_can_be_copied(reader, report, clipboard):
    init = {
        "granted": "",
        "missing": "Object.defineProperty(navigator, 'clipboard', { value: undefined });",
        "refused": "navigator.clipboard.writeText = () => Promise.reject(new Error('refused'));",
    }[clipboard]
    page = reader("papers/troubles.html", init=init, permissions=["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Copy: Import").click()
    playwright.expect(page.locator("#announcer")).to_have_text("Copied")
    page.goto((report / "index.html").as_uri())
    page.get_by_label("Search").focus()
    page.keyboard.press("Control+V")
    assert page.get_by_label("Search").input_value() == "from postern.claims import Paper"


def test_where_copying_is_impossible_the_code_is_selected(reader):
    init = "Object.defineProperty(navigator, 'clipboard', { value: undefined }); document.execCommand = () => false;"
    page = reader("papers/robust-location.html", init=init)
    page.get_by_role("button", name="Copy: Worked example").click()
    playwright.expect(page.locator("#announcer")).to_have_text("Press Ctrl+C")
    assert page.evaluate("getSelection().toString()").strip() == MEDIANS.example.strip()


def test_print_is_black_on_white_and_unfolded(reader):
    page = reader("papers/robust-location.html", theme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.documentElement).backgroundColor") == "rgb(255, 255, 255)"
    assert page.locator("main h1").evaluate("e => getComputedStyle(e).color") == "rgb(29, 33, 38)"
    assert not page.locator("#theme, .contents, .copy").locator("visible=true").count()
    folded = page.locator("details:not([open])").count()
    assert folded > 3
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details:not([open])").count() == 0
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.locator("details:not([open])").count() == folded


# Claims


def test_a_smoke_run_looks_like_none_of_the_evidence(reader):
    page = reader("papers/robust-location.html")
    smoke = page.locator(".smoke-run")
    assert smoke.count() == 2
    for box in smoke.all():
        assert box.locator(".badge").inner_text() == "Smoke"
        assert box.locator(".interval-plot").count() == 0
        assert "the numbers are no evidence" in box.inner_text()
    standing = page.locator("#claim-coin-is-lucky > .standing")
    assert standing.locator(".badge").inner_text() == "Inconclusive"
    assert "by published evidence, small scale" in standing.inner_text()


def test_an_error_can_be_read_on_a_phone(reader):
    page = reader("papers/troubles.html", width=390)
    claim = page.locator("#claim-raises")
    assert claim.locator(".badge").first.inner_text() == "Error"
    output = claim.locator(".failure pre")
    assert output.is_visible()
    assert output.inner_text().startswith("colour\nlast state\n<script>")
    assert output.evaluate("e => getComputedStyle(e).overflowX") == "auto"


def test_plots_lie_inside_their_cards(reader):
    for width in (360, 1280):
        page = reader("papers/robust-location.html", width)
        outside = page.evaluate(
            """() => [...document.querySelectorAll(".claim .interval-plot text, .claim .curves text")]
          .filter(e => e.checkVisibility()).filter(text => {
            const card = text.closest(".claim").getBoundingClientRect(), box = text.getBoundingClientRect();
            return box.left < card.left || box.right > card.right;
          }).map(text => text.textContent)"""
        )
        assert outside == []


def test_words_in_tables_stay_whole_on_a_phone(reader):
    page = reader("papers/robust-location.html", width=360)
    cell = page.get_by_role("cell", name="arithmetic mean").first
    assert cell.bounding_box()["height"] < 70


def test_the_table_of_contents_leads_to_the_claims(reader):
    page = reader("papers/robust-location.html")
    page.get_by_role("navigation", name="On this page").get_by_role("link", name="Error falls").click()
    until(page, "Math.abs(document.querySelector('#claim-error-falls').getBoundingClientRect().y) < 100")
    assert fragment(page) == "#claim-error-falls"


# Comparisons


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_marks_and_intervals_of_members_stand_out(reader, theme):
    page = reader(COMPARED[0], theme=theme)
    contrasts = page.evaluate(
        """() => {
      const light = colour => { const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map(Number)
        .map(v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
      const surface = light(getComputedStyle(document.querySelector(".card")).backgroundColor);
      return [...document.querySelectorAll(".mark .shape, .card .interval")].map(e => {
        const style = getComputedStyle(e), colour = light(e.matches(".shape") ? style.fill : style.stroke);
        const [a, b] = [colour, surface].sort((x, y) => y - x);
        return (a + 0.05) / (b + 0.05);
      });
    }"""
    )
    assert len(contrasts) == 3 * 2 + 3 + 2 * 3  # marks in both charts, lanes, and both directions
    assert min(contrasts) >= 3


def test_the_best_a_level_one_and_a_loser_differ_in_words_shape_and_colour(reader):
    page = reader(COMPARED[0])
    badges = page.locator(".ranks .badge")
    assert badges.all_inner_texts() == ["Best", "Level", "Behind", "Error"]
    looks = badges.evaluate_all("all => all.map(e => [e.querySelector('svg').innerHTML, getComputedStyle(e).color])")
    assert len({shape for shape, _ in looks}) == len({colour for _, colour in looks}) == 4


@pytest.mark.parametrize("width", [320, 360, 390, 768, 1280, 1920])
def test_labels_in_the_chart_against_time_cover_nothing(reader, width):
    page = reader(CROWDED, width=width)
    covered = page.evaluate(
        """() => {
      const box = e => e.getBoundingClientRect(), marks = [...document.querySelectorAll(".scatter .shape")];
      const names = [...document.querySelectorAll(".scatter .member")];
      const touch = (a, b) => a.left < b.right && b.left < a.right && a.top + 1 < b.bottom && b.top + 1 < a.bottom;
      return names.flatMap(name => [...names, ...marks].filter(other => other !== name && touch(box(name), box(other)))
        .map(other => [name.textContent, other.textContent]));
    }"""
    )
    assert page.locator(".scatter .member").count() == 9
    assert covered == []


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_charts_of_members_lie_inside_their_cards(reader, width):
    for name in (*COMPARED, CROWDED):
        outside = reader(name, width=width).evaluate(
            """() => [...document.querySelectorAll(".card .lanes *, .card .scatter *")].filter(e => {
          const card = e.closest(".card").getBoundingClientRect(), box = e.getBoundingClientRect();
          return box.left < card.left || box.right > card.right || box.top < card.top || box.bottom > card.bottom;
        }).map(e => e.outerHTML)"""
        )
        assert outside == []


def test_a_wide_table_of_members_scrolls_in_its_own_box(reader):
    page = reader(COMPARED[0], width=390)
    box = page.get_by_role("region", name="Members of toys, best first")
    box.focus()
    page.keyboard.press("ArrowRight")
    until(page, "document.activeElement.scrollLeft > 0")
    assert page.evaluate("document.documentElement.scrollWidth") == 390


def test_the_index_leads_to_a_comparison_and_back(reader):
    page = reader()
    page.get_by_role("link", name=re.compile("Crowd on wine|Crowd on <b>x")).click()
    assert page.locator("h1").inner_text().startswith("Crowd on <b>x</b>.csv")
    page.get_by_role("link", name="robust-location").first.click()
    assert page.locator("h1").inner_text() == "Medians for Heavy Tails"
    page.go_back()
    page.get_by_role("link", name="Comparisons").click()
    assert fragment(page) == "#comparisons"
    assert titles(page) == ALL
