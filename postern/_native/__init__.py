"""The compiled kernels: a shared library of plain C functions, built from the C++ sources of this folder.

The library knows nothing of torch or Python, so it is loaded with `ctypes`, which releases the interpreter's lock
while a kernel runs. Building it is optional: without a C++ compiler postern installs all the same, `status` says so,
and every method that has a kernel runs through torch instead.

To add a kernel, add a source file here, name it in ``setup.py``, and bind its functions where they are used, with
`library`. The environment variable ``POSTERN_INSTRUCTION_SET`` (avx512, avx2, portable or none) overrides the choice
of instructions; "none" leaves the kernels out.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from postern.errors import Unavailable

InstructionSet = Literal["portable", "avx2", "avx512"]

# The codes of the C interface.
INSTRUCTION_SETS: tuple[InstructionSet, ...] = ("portable", "avx2", "avx512")
_VARIABLE = "POSTERN_INSTRUCTION_SET"
_BASENAME = "_kernels"


@dataclass(frozen=True)
class Status:
    """Whether the compiled kernels can be used.

    Attributes:
        available: whether they are loaded.
        instruction_set: what they run with: "avx512", "avx2" or "portable"; None where they are not available.
        reason: one sentence for the user, which says what to do where something is missing.
    """

    available: bool
    instruction_set: InstructionSet | None
    reason: str


def status() -> Status:
    """Say whether the compiled kernels are in use, and why not where they are not."""
    loaded, reason = _load()
    if loaded is None:
        return Status(False, None, reason)
    chosen = INSTRUCTION_SETS[loaded.postern_instruction_set()]
    if chosen == "portable":
        return Status(
            True, chosen, f"The processor ({platform.machine()}) has no AVX2: compiled kernels are slow on it."
        )
    return Status(True, chosen, f"Compiled kernels with {'AVX-512' if chosen == 'avx512' else 'AVX2'} instructions.")


def library() -> ctypes.CDLL:
    """Return the loaded library.

    Raises:
        Unavailable: it was not built or does not load; the text says why and what to do.
    """
    loaded, reason = _load()
    if loaded is None:
        raise Unavailable(reason)
    return loaded


def instruction_sets() -> tuple[InstructionSet, ...]:
    """Return the instruction sets that the library can use on this processor; none where it is not available."""
    loaded, _ = _load()
    if loaded is None:
        return ()
    before = loaded.postern_instruction_set()
    try:
        return tuple(
            name for code, name in enumerate(INSTRUCTION_SETS) if loaded.postern_choose_instruction_set(code) == 1
        )
    finally:
        loaded.postern_choose_instruction_set(before)


@contextmanager
def using(instruction_set: InstructionSet) -> Iterator[None]:
    """Run the kernels with a given instruction set, in all threads, until the block ends.

    Args:
        instruction_set: "avx512", "avx2" or "portable".

    Raises:
        Unavailable: the library is missing or the processor lacks these instructions.
        ValueError: an unknown name.
    """
    if instruction_set not in INSTRUCTION_SETS:
        raise ValueError(f"instruction_set is one of {', '.join(INSTRUCTION_SETS)}; got {instruction_set!r}")
    loaded = library()
    before = loaded.postern_instruction_set()
    if not loaded.postern_choose_instruction_set(INSTRUCTION_SETS.index(instruction_set)):
        raise Unavailable(f"This processor has no {instruction_set} instructions.")
    try:
        yield
    finally:
        loaded.postern_choose_instruction_set(before)


def share_threads(shared: bool = True) -> bool:
    """Run the kernels' loops on the threads of the OpenMP runtime that is loaded already, torch's, or on their own.

    The kernels do so from the start where torch has been imported before them. Its threads are there and awake; a
    second set would compete with them for the processors. Where other programs keep the processors busy, threads of
    their own do better: an OpenMP team waits for its last thread even when there is nothing left for it to do.

    Args:
        shared: False for threads of their own.

    Returns:
        Whether the threads are shared now: not where there is no such runtime, or its entry point is not visible.
    """
    loaded, _ = _load()
    return loaded is not None and _share_threads(loaded, shared)


def _share_threads(loaded: ctypes.CDLL, shared: bool) -> bool:
    entry = None
    if shared and os.name == "posix":
        # torch loads its OpenMP runtime with global visibility. GCC's and LLVM's runtimes both have this function.
        entry = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    loaded.postern_share_threads(None if entry is None else ctypes.cast(entry, ctypes.c_void_p))
    return entry is not None


@functools.cache
def cache_bytes(level: Literal["second", "last"]) -> int:
    """Size of the second-level cache of a core, or of the last cache before memory, as the system reports it.

    Linux is asked; elsewhere, and where it does not say, 1 MiB and 32 MiB are assumed, as server processors have.

    Returns:
        Bytes.
    """
    sizes: dict[int, int] = {}
    for folder in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            kind = (folder / "type").read_text().strip()
            depth = int((folder / "level").read_text())
            size = re.fullmatch(r"(\d+)K", (folder / "size").read_text().strip())
        except (OSError, ValueError):
            continue
        if size is not None and kind in ("Data", "Unified"):
            sizes[depth] = max(sizes.get(depth, 0), int(size[1]) * 1024)
    if level == "second":
        return sizes.get(2, 1 << 20)
    return sizes[max(sizes)] if sizes and max(sizes) >= 2 else 1 << 25


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and the reason."""
    wanted = os.environ.get(_VARIABLE, "").strip().lower()
    if wanted not in ("", "none", *INSTRUCTION_SETS):
        raise ValueError(f"{_VARIABLE} is one of {', '.join(INSTRUCTION_SETS)} or none; got {wanted!r}")
    if wanted == "none":
        return (
            None,
            f"Compiled kernels are switched off ({_VARIABLE}=none): postern uses the slower path through torch.",
        )
    folder = Path(__file__).parent
    files = [folder / (_BASENAME + suffix) for suffix in importlib.machinery.EXTENSION_SUFFIXES]
    path = next((file for file in files if file.exists()), None)
    if path is None:
        return None, (
            "The compiled kernels are missing: no working C++ compiler was there when postern was installed. "
            "postern uses the slower path through torch. To have the kernels, install a C++17 compiler (g++ or "
            "clang++) and install postern again, with pip install --force-reinstall --no-deps."
        )
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        return None, f"The compiled kernels do not load ({error}): postern uses the slower path through torch."
    if wanted and not loaded.postern_choose_instruction_set(INSTRUCTION_SETS.index(wanted)):
        raise ValueError(f"{_VARIABLE}={wanted}, but this processor has no such instructions")
    loaded.postern_share_threads.argtypes = [ctypes.c_void_p]
    loaded.postern_share_threads.restype = None
    _share_threads(loaded, True)
    return loaded, ""
