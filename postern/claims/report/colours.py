"""Colours of figures in the dark theme.

A figure is drawn for white paper. In the dark theme its greys swap ends (black text becomes light, a white legend box
becomes the page), and its hues keep their name but are lightened until they stand out from the dark surface, or
darkened where they are pastel backgrounds.
Contrast is that of the Web Content Accessibility Guidelines: (L1 + 0.05) / (L2 + 0.05) of the relative luminances.
"""

from __future__ import annotations

DARK_SURFACE = "#1b1e23"  # equal to --surface of the dark theme in style.css
DARK_INK = "#e8e6e1"  # equal to its --ink
LOWEST_CONTRAST = 4.5

_GREY_SPREAD = 20  # of 255: channels closer than this make a grey
_PASTEL_CONTRAST = 1.5  # against white


def channels(colour: str) -> tuple[int, int, int]:
    """Return red, green and blue (0..255) of ``#rrggbb`` or ``#rgb``.

    Raises:
        ValueError: it is neither.
    """
    digits = colour.removeprefix("#")
    if len(digits) == 3:
        digits = "".join(2 * digit for digit in digits)
    if len(digits) != 6 or not colour.startswith("#"):
        raise ValueError(f"expected a colour such as #1f77b4, got {colour!r}")
    return int(digits[0:2], 16), int(digits[2:4], 16), int(digits[4:6], 16)


def luminance(colour: str) -> float:
    """Return the relative luminance, 0 for black to 1 for white."""
    linear = [c / 3294.6 if c <= 10.31475 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in channels(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(first: str, second: str) -> float:
    """Return the contrast of two colours, 1 (the same) to 21 (black on white)."""
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def mix(first: str, second: str, share: float) -> str:
    """Return the colour that is ``share`` of the way from the first to the second."""
    mixed = (round(a + share * (b - a)) for a, b in zip(channels(first), channels(second), strict=True))
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def in_the_dark(colour: str) -> str:
    """Return what stands for ``colour`` in the dark theme."""
    red_green_blue = channels(colour)
    if max(red_green_blue) - min(red_green_blue) <= _GREY_SPREAD:
        return mix(DARK_INK, DARK_SURFACE, sum(red_green_blue) / 765)
    if contrast(colour, "#ffffff") < _PASTEL_CONTRAST:
        return mix(DARK_SURFACE, colour, 0.22)
    for step in range(101):
        lightened = mix(colour, "#ffffff", step / 100)
        if contrast(lightened, DARK_SURFACE) >= LOWEST_CONTRAST:
            return lightened
    raise AssertionError("white has enough contrast with the dark surface")
