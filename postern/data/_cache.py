"""Decoded images kept on disk, so that the next process need not decode them again."""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from postern.machine import cache_folder

_FORMAT = "1"  # changes when the same file decodes to something else
_ABANDONED_AFTER_S = 3600.0  # a writer that takes longer was killed


def cached_path(name: str, split: str, paths: Sequence[Path]) -> Path:
    """Where the decoded images of these files are kept: a changed size or time of change gives another name."""
    places, states = hashlib.sha256(), hashlib.sha256(_FORMAT.encode())
    for path in paths:
        state = path.stat()
        places.update(os.fsencode(path.resolve()) + b"\0")
        states.update(f"{state.st_size} {state.st_mtime_ns}\0".encode())
    stem = f"{name.replace('/', '--')}-{split}-{places.hexdigest()[:12]}"
    return cache_folder() / f"{stem}-{states.hexdigest()[:12]}.safetensors"


def read_cached(path: Path) -> tuple[Tensor, Tensor] | None:
    """Pixels and labels, or None where the cache has none or its file is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            pixels, labels = file.get_tensor("pixels"), file.get_tensor("labels")
            checksum = (file.metadata() or {}).get("crc32")
    except (OSError, SafetensorError):
        return None
    return (pixels, labels) if checksum == _checksum(pixels, labels) else None


def write_cached(path: Path, pixels: Tensor, labels: Tensor) -> None:
    """Keep the images, and drop what was kept of earlier versions of the same files, or begun by a killed process.

    The file appears whole or not at all. A folder that cannot be written costs time at the next load, nothing else.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".part")
        os.close(handle)
        save_file({"pixels": pixels, "labels": labels}, temporary, metadata={"crc32": _checksum(pixels, labels)})
        os.replace(temporary, path)
        for other in path.parent.glob(f"{path.stem.rpartition('-')[0]}-*"):
            is_abandoned = other.suffix == ".part" and time.time() - other.stat().st_mtime > _ABANDONED_AFTER_S
            if is_abandoned or (other.suffix == ".safetensors" and other != path):
                other.unlink(missing_ok=True)
    except (OSError, SafetensorError):
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


def _checksum(pixels: Tensor, labels: Tensor) -> str:
    return str(zlib.crc32(labels.numpy().data, zlib.crc32(pixels.numpy().data)))
