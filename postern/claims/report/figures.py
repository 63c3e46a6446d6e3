"""Stored figures as part of a page: harmless, with identifiers of their own, readable in both themes.

A figure comes as a stand-alone SVG document. Several of them on one page would share identifiers (matplotlib names its
glyphs alike in every file) and style rules that reach the whole page. So the drawing is rebuilt from a list of known
elements, attributes and style properties: what is not drawing (scripts, links, style sheets, foreign content) is left
out, every identifier is renumbered under the figure's prefix, and every colour becomes a custom property that the dark
theme sets anew.

Figures that show data as colours (images, heat maps, filled contours, or more colours than anybody picks by hand)
keep theirs, and stay on white paper.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from xml.etree import ElementTree

from markupsafe import Markup, escape

SVG = "{http://www.w3.org/2000/svg}"
XLINK = "{http://www.w3.org/1999/xlink}"
PIXELS_A_POINT = 4 / 3
MOST_INKS = 24


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_ELEMENTS = _words(
    "svg g defs symbol use path rect circle ellipse line polyline polygon text tspan clipPath mask pattern image "
    "linearGradient radialGradient stop marker"
)
_ATTRIBUTES = _words(
    "d x y x1 y1 x2 y2 dx dy cx cy fx fy r rx ry width height points transform rotate viewBox preserveAspectRatio "
    "offset clipPathUnits maskUnits maskContentUnits patternUnits patternContentUnits patternTransform gradientUnits "
    "gradientTransform spreadMethod markerUnits markerWidth markerHeight refX refY orient"
)
_PROPERTIES = _words(
    "fill fill-opacity fill-rule stroke stroke-dasharray stroke-dashoffset stroke-linecap stroke-linejoin "
    "stroke-miterlimit stroke-opacity stroke-width opacity clip-path clip-rule mask marker-start marker-mid marker-end "
    "stop-color stop-opacity font font-family font-size font-style font-weight font-stretch font-variant text-anchor "
    "dominant-baseline writing-mode image-rendering shape-rendering mix-blend-mode display visibility"
)
_DATA_AS_COLOURS = ("QuadMesh", "PolyQuadMesh", "QuadContourSet", "TriContourSet", "TriMesh")
_COLOUR = re.compile(r"#[0-9a-fA-F]{6}\b|#[0-9a-fA-F]{3}\b")
_VALUE = re.compile(r"[\w\s#.,%+'\"()-]*")
_REFERENCE = re.compile(r"url\(\s*['\"]?#([^)'\"]+)['\"]?\s*\)")
_PICTURE = re.compile(r"data:image/(?:png|jpeg);base64,[A-Za-z0-9+/=\s]*")
_LENGTH = re.compile(r"\s*([0-9.]+)\s*(px|pt|)\s*")


@dataclass(frozen=True)
class InlineFigure:
    """A figure to put into a page.

    Attributes:
        markup: the ``<svg>`` element.
        adapts: whether its colours follow the theme; else it needs white paper behind it.
        colours: the colours, lower-case ``#rrggbb``, that the dark theme has to set anew.
    """

    markup: Markup
    adapts: bool
    colours: frozenset[str]


def inline(svg: str, prefix: str, labelled_by: str) -> InlineFigure:
    """Rebuild a stored SVG document as an element of a page.

    Args:
        svg: the document.
        prefix: starts every identifier of the figure, unique in the page.
        labelled_by: identifier of the element that describes the figure.

    Raises:
        ValueError: the text is no SVG document.
    """
    try:
        root = ElementTree.fromstring(svg)
    except ElementTree.ParseError as error:
        raise ValueError(f"expected an SVG document, got text that is no XML: {error}") from None
    if root.tag != f"{SVG}svg":
        raise ValueError(f"expected an SVG document, got one whose root is {root.tag!r}")
    has_few_inks = len(set(_COLOUR.findall(svg))) <= MOST_INKS
    return _Rebuilder(root, prefix, labelled_by, has_few_inks).rebuild()


def colour_property(colour: str) -> str:
    """Return the custom property that stands for a figure's colour, e.g. ``--on-1f77b4``."""
    return f"--on-{colour.removeprefix('#')}"


class _Rebuilder:
    def __init__(self, root: ElementTree.Element, prefix: str, labelled_by: str, has_few_inks: bool) -> None:
        self.root = root
        self.prefix = prefix
        self.labelled_by = labelled_by
        self.identifiers: dict[str, str] = {}
        self.colours: set[str] = set()
        self.adapts = has_few_inks and not any(
            _local(node.tag) == "image" or node.get("id", "").startswith(_DATA_AS_COLOURS) for node in root.iter()
        )

    def rebuild(self) -> InlineFigure:
        attributes = {
            "role": "img",
            "aria-labelledby": self.labelled_by,
            "viewBox": self.root.get("viewBox", ""),
            "width": _pixels(self.root.get("width", "")),
            "height": _pixels(self.root.get("height", "")),
            "style": f"fill: {self._paint('#000000')}",
        }
        markup = self._element("svg", attributes, self.root)
        return InlineFigure(markup, self.adapts, frozenset(self.colours))

    def _node(self, node: ElementTree.Element) -> Markup:
        name = _local(node.tag)
        if name not in _ELEMENTS:
            return Markup("")
        attributes: dict[str, str] = {}
        style: dict[str, str] = {}
        for raw, value in node.attrib.items():
            attribute = _local(raw)
            if attribute == "id":
                attributes["id"] = self._identifier(value)
            elif attribute == "href":
                attributes |= self._link(name, value)
            elif attribute in _PROPERTIES:
                style = {attribute: value} | style
            elif attribute == "style":
                style |= dict(_declarations(value))
            elif attribute in _ATTRIBUTES and raw == attribute:
                attributes[attribute] = value
        kept = [f"{key}: {self._value(value)}" for key, value in style.items() if _is_harmless(key, value)]
        if kept:
            attributes["style"] = "; ".join(kept)
        return self._element(name, attributes, node)

    def _element(self, name: str, attributes: dict[str, str], node: ElementTree.Element) -> Markup:
        written = Markup("").join(Markup(' {}="{}"').format(key, value) for key, value in attributes.items() if value)
        holds_text = name in ("text", "tspan")
        content = [escape(node.text or "")] if holds_text else []
        for child in node:
            content.append(self._node(child))
            if holds_text:
                content.append(escape(child.tail or ""))
        return Markup("<{0}{1}>{2}</{0}>").format(name, written, Markup("").join(content))

    def _identifier(self, name: str) -> str:
        return self.identifiers.setdefault(name, f"{self.prefix}-{len(self.identifiers)}")

    def _link(self, element: str, target: str) -> dict[str, str]:
        if target.startswith("#"):
            return {"href": f"#{self._identifier(target[1:])}"}
        if element == "image" and _PICTURE.fullmatch(target):
            return {"href": re.sub(r"\s", "", target)}
        return {}

    def _value(self, value: str) -> str:
        value = _REFERENCE.sub(lambda match: f"url(#{self._identifier(match[1])})", value.strip())
        return _COLOUR.sub(lambda match: self._paint(match[0]), value) if "url(" not in value else value

    def _paint(self, colour: str) -> str:
        colour = colour.lower()
        if len(colour) == 4:
            colour = "#" + "".join(2 * digit for digit in colour[1:])
        if not self.adapts:
            return colour
        self.colours.add(colour)
        return f"var({colour_property(colour)}, {colour})"


def _local(name: object) -> str:
    """Return an element's or attribute's name without its namespace; "" for comments and foreign elements."""
    if not isinstance(name, str):
        return ""
    if name.startswith((SVG, XLINK)):
        return name.split("}", 1)[1]
    return "" if name.startswith("{") else name


def _declarations(style: str) -> list[tuple[str, str]]:
    pairs = (declaration.split(":", 1) for declaration in style.split(";") if ":" in declaration)
    return [(name.strip().lower(), value.strip()) for name, value in pairs]


def _is_harmless(name: str, value: str) -> bool:
    return name in _PROPERTIES and bool(_VALUE.fullmatch(value)) and "url(" not in _REFERENCE.sub("", value)


def _pixels(length: str) -> str:
    match = _LENGTH.fullmatch(length)
    if match is None:
        return ""
    return f"{float(match[1]) * (PIXELS_A_POINT if match[2] == 'pt' else 1):.0f}"
