"""Numbers, durations and terminal output as a reader wants to see them."""

from __future__ import annotations

import math
import re

SIGNIFICANT_DIGITS = 3
GROUP_SEPARATOR = "\N{NARROW NO-BREAK SPACE}"
MINUS = "\N{MINUS SIGN}"
UNKNOWN = "unknown with one seed"

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_ESCAPE_SEQUENCE = re.compile(r"\x1b(?:\[[0-9;?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-_])")
_NEGATIVE = re.compile(r"(?<!\S)-(?=\d)")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")


def decimals_of(value: float, significant: int = SIGNIFICANT_DIGITS) -> int:
    """Return how many decimals show ``significant`` digits of ``value``; negative for numbers that are larger."""
    if value == 0 or not math.isfinite(value):
        return 0
    exponent = int(f"{value:.{significant - 1}e}".split("e")[1])  # of the rounded number: 9.996 is 10.0 in three digits
    return significant - 1 - exponent


def number(value: float, decimals: int | None = None) -> str:
    """Write a number with three significant digits, or with the given decimals.

    Digits before the decimal point are never dropped below one million: 12345.6 is "12 346". Whole numbers are written
    as such, and very large or small ones as a power of ten.

    Args:
        value: any number.
        decimals: decimals to show, e.g. those that an interval is known to; by default three significant digits.
    """
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "∞" if value > 0 else f"{MINUS}∞"
    magnitude = abs(value)
    if magnitude >= 1e6 or 0 < magnitude < 1e-4:
        whole = magnitude < 1e15 and float(value).is_integer()
        return _grouped(f"{value:.0f}") if whole else _power_of_ten(value)
    if decimals is None:
        decimals = 0 if float(value).is_integer() else decimals_of(value)
    text = f"{value:.{max(decimals, 0)}f}"
    return _grouped(text if float(text) else text.removeprefix("-"))


def plain(value: float) -> str:
    """Write a number that somebody chose, such as a bound or an axis label, with no more digits than it has."""
    magnitude = abs(value)
    if magnitude == 0 or 1e-4 <= magnitude < 1e6:
        return _grouped(f"{value:.6f}".rstrip("0").rstrip("."))
    mantissa, exponent = f"{value:g}".split("e") if "e" in f"{value:g}" else f"{value:e}".split("e")
    power = f"10{str(int(exponent)).translate(_SUPERSCRIPTS)}"
    return power if mantissa == "1" else f"{mantissa.replace('-', MINUS)} × {power}"


def shared_decimals(estimate: float, low: float, high: float) -> int:
    """Return the decimals that an estimate and its interval are written with: two digits of its half width.

    Where the interval is unknown or has no width, three significant digits of the estimate.
    """
    half = (high - low) / 2
    known = math.isfinite(half) and half > 0
    decimals = decimals_of(half, 2) if known else decimals_of(estimate)
    return min(max(decimals, 0), max(decimals_of(estimate), 0) + 4)


def interval(low: float, high: float, decimals: int) -> str:
    """Write an interval as "0.012 to 0.018", or say that it is unknown where an end is infinite."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return UNKNOWN
    return f"{number(low, decimals)} to {number(high, decimals)}"


def duration(seconds: float) -> str:
    """Write a time span: "0.42 s", "4.2 s", "12 s", "2 min 05 s", "3 h 10 min"."""
    if seconds < 10:
        return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds:.2g} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min"


def count(size: int, noun: str, plural: str = "") -> str:
    """Write a count with its noun: "1 seed", "5 seeds", "2 entries"."""
    return f"{size} {noun if size == 1 else plural or noun + 's'}"


def seed_list(seeds: list[int]) -> str:
    """Write seeds as "1000 to 1004" where they are consecutive, else one by one."""
    ordered = sorted(seeds)
    if len(ordered) > 2 and ordered == list(range(ordered[0], ordered[-1] + 1)):
        return f"{ordered[0]} to {ordered[-1]}"
    return ", ".join(map(str, ordered))


def in_words(criterion: str) -> str:
    """Set the operators of a criterion's description as a mathematician would: ``>=`` as "≥"."""
    signs = criterion.replace(">=", "≥").replace("<=", "≤").replace(" - ", f" {MINUS} ").replace(" .. ", " … ")
    return _NEGATIVE.sub(MINUS, signs)


def terminal_output(output: str, lines: int = 40) -> str:
    """Return the last lines of what a program printed, as a terminal would show them.

    Colours and other escape sequences are dropped, and a line that a progress bar wrote over itself many times is
    shown in its last state.
    """
    cleaned = _ESCAPE_SEQUENCE.sub("", output).replace("\r\n", "\n")
    shown = [_CONTROL.sub("", line.rstrip("\r").rsplit("\r", 1)[-1]).rstrip() for line in cleaned.split("\n")]
    return "\n".join(shown[-lines:] if shown[-1] else shown[-lines - 1 : -1]).strip("\n")


def _grouped(text: str) -> str:
    """Group the digits before the point by three from five digits on, and use the minus sign."""
    sign, digits = (MINUS, text[1:]) if text.startswith("-") else ("", text)
    whole, point, decimals = digits.partition(".")
    if len(whole) > 4:
        whole = f"{int(whole):,}".replace(",", GROUP_SEPARATOR)
    return f"{sign}{whole}{point}{decimals}"


def _power_of_ten(value: float) -> str:
    mantissa, exponent = f"{value:.{SIGNIFICANT_DIGITS - 1}e}".split("e")
    return f"{mantissa.replace('-', MINUS)} × 10{str(int(exponent)).translate(_SUPERSCRIPTS)}"
