"""What a program needs to know of the machine and its user: the processor's name, a place for caches."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

__all__ = ["cache_folder", "processor"]


def cache_folder() -> Path:
    """``$POSTERN_CACHE``, or the system's folder for caches."""
    if chosen := os.environ.get("POSTERN_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "postern" / "Cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "postern"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "postern"


def processor() -> str:
    """The processor's name, with family and model where the system tells: one name may stand for several."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    known = dict(line.partition(":")[::2] for line in lines if ":" in line)
    fields = {key.strip(): value.strip() for key, value in known.items()}
    name = fields.get("model name", platform.machine())
    family, model = fields.get("cpu family"), fields.get("model")
    return f"{name} (family {family}, model {model})" if family and model else name
