"""Python source as HTML with its keywords, strings, numbers and comments marked."""

from __future__ import annotations

import builtins
import io
import keyword
import tokenize

from markupsafe import Markup, escape

_F_STRING = {
    getattr(tokenize, name)
    for name in ("FSTRING_START", "FSTRING_MIDDLE", "FSTRING_END", "TSTRING_START", "TSTRING_MIDDLE", "TSTRING_END")
    if hasattr(tokenize, name)  # Python 3.12 and 3.14 brought them; before, an f-string is one STRING
}
_BUILTINS = frozenset(dir(builtins)) - frozenset(keyword.kwlist)


def python(source: str) -> Markup:
    """Mark up Python source; text that Python cannot read is returned as it is, escaped.

    Args:
        source: the source, any text.

    Returns:
        The source, escaped, with ``<span class="k|s|n|c|b">`` around keywords, strings, numbers, comments, builtins.
    """
    source = source.replace("\r\n", "\n")
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
    except (tokenize.TokenError, SyntaxError):
        return escape(source)
    starts = [0]
    for line in source.split("\n"):
        starts.append(starts[-1] + len(line) + 1)
    pieces: list[str | Markup] = []
    done = 0
    for token in tokens:
        kind = _kind(token)
        start = starts[token.start[0] - 1] + token.start[1]
        end = starts[token.end[0] - 1] + token.end[1]
        if kind is None or start < done or end <= start:
            continue
        pieces += [source[done:start], Markup('<span class="{}">{}</span>').format(kind, source[start:end])]
        done = end
    return Markup("").join([*pieces, source[done:]])


def _kind(token: tokenize.TokenInfo) -> str | None:
    if token.type == tokenize.COMMENT:
        return "c"
    if token.type == tokenize.STRING or token.type in _F_STRING:
        return "s"
    if token.type == tokenize.NUMBER:
        return "n"
    if token.type == tokenize.NAME:
        if keyword.iskeyword(token.string):
            return "k"
        if token.string in _BUILTINS:
            return "b"
    return None
