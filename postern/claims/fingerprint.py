"""Fingerprints: which code and configuration a job's result depends on."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

from postern.claims.paper import Claim

_NATIVE_SUFFIXES = {".cpp", ".h"}


def fingerprint(claim: Claim, scale: str) -> str:
    """Hash the claim's configuration at a scale, and the source of its module and of all it imports from its package.

    A result that was stored under another fingerprint was measured by other code, so that a resumed run measures
    again. Modules outside the paper's own top-level package (torch, NumPy) do not count: the ledger records their
    versions.

    Args:
        claim: the claim.
        scale: one of its scales.

    Returns:
        16 hexadecimal digits.
    """
    return hash_of(claim.experiment.__module__, (claim.key, scale, claim.scales[scale]))


def hash_of(module: str, identity: object) -> str:
    """Hash what a result is of, and the source of a module and of all that it imports from its package.

    Args:
        module: dotted name.
        identity: its ``repr`` counts.

    Returns:
        16 hexadecimal digits.
    """
    return hashlib.sha256(repr(identity).encode() + _code(module)).hexdigest()[:16]


@functools.cache
def _code(module: str) -> bytes:
    """Hash the files that `_sources` finds; a process runs the code that it began with, so that once is enough."""
    digest = hashlib.sha256()
    for path in _sources(module):
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.digest()


def _sources(module: str) -> tuple[Path, ...]:
    """The files of a module and of everything that it imports, at any depth, from the same top-level package."""
    package = module.partition(".")[0]
    found: dict[str, Path] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        path = _file_of(name)
        if path is None:
            continue
        found[name] = path
        parents = name.split(".")[:-1]
        waiting += [".".join(parents[:depth]) for depth in range(2, len(parents) + 1)]
        waiting += [target for target in _imports(path, name) if target.partition(".")[0] == package]
    native = [
        extra
        for path in found.values()
        if path.name == "__init__.py"
        for extra in path.parent.iterdir()
        if extra.suffix in _NATIVE_SUFFIXES
    ]
    return tuple(sorted({*found.values(), *native}))


def _file_of(module: str) -> Path | None:
    loaded = sys.modules.get(module)
    origin = getattr(loaded, "__file__", None)
    if origin is None:
        try:
            spec = importlib.util.find_spec(module)
        except (ImportError, AttributeError, ValueError):
            return None
        origin = spec.origin if spec is not None else None
    return Path(origin) if origin is not None and origin.endswith(".py") else None


@functools.cache
def _imports(path: Path, module: str) -> tuple[str, ...]:
    """Names that a file imports; ``from a import b`` gives both ``a`` and ``a.b``, as ``b`` may be a module."""
    return tuple(_imported(path, module))


def _imported(path: Path, module: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                is_package = path.name == "__init__.py"
                above = module.split(".")[: len(module.split(".")) - node.level + is_package]
                base = ".".join([*above, base] if base else above)
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)
