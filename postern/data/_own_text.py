"""Read a user's own text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from postern.data.errors import InvalidData

_IMAGES = (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"RIFF")
_ARCHIVES = (b"PK\x03\x04", b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!")
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")


def read_utf8(path: Path, remedy: str = "Save it as UTF-8.") -> str:
    r"""The characters of a text file; each end of a line is "\n", a byte order mark at the start is dropped.

    Raises:
        InvalidData: nothing to read, or no UTF-8.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InvalidData(
            path, f"cannot be read ({error.strerror})", "a file that you may read", "Check its permissions."
        ) from error
    try:
        if b"\0" in content:
            raise ValueError("it holds zero bytes")
        text = content.decode("utf-8-sig")
    except ValueError as error:
        raise InvalidData(path, f"not a text ({error})", "UTF-8", _remedy(content) or remedy) from error
    if not text.strip():
        found = "only white space" if text else "an empty file"
        raise InvalidData(path, found, "a text, a table or images", "Give a file that holds something.")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def join_texts(pieces: Sequence[str]) -> str:
    """The pieces one after the other, each beginning a line."""
    return "".join(piece if piece.endswith("\n") else f"{piece}\n" for piece in pieces)


def _remedy(content: bytes) -> str:
    """What to do with a file that is no text, judged by how it begins; empty where that says nothing."""
    if content.startswith(_IMAGES):
        return "Images are given as a folder with one sub-folder a class."
    if content.startswith(_ARCHIVES):
        return "Unpack it and give what is inside; save a spreadsheet as CSV."
    if content.startswith(b"PAR1"):
        return "It looks like a parquet file: name it .parquet."
    if content.startswith(_UTF_16):
        return "It looks like UTF-16: save it as UTF-8."
    return ""
