import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from postern import _native
from postern.errors import Unavailable
from postern.softmax import two_pass_softmax

ROOT = Path(__file__).parents[2]
needs_kernels = pytest.mark.skipif(not _native.status().available, reason="no compiled kernels")


def run_python(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@needs_kernels
def test_status_names_the_best_instructions() -> None:
    status = _native.status()
    assert status.instruction_set == _native.instruction_sets()[-1]
    assert _native.instruction_sets()[0] == "portable"


@needs_kernels
def test_choosing_instructions_for_a_while() -> None:
    before = _native.status().instruction_set
    with _native.using("portable"):
        assert _native.status().instruction_set == "portable"
        assert "slow" in _native.status().reason
    assert _native.status().instruction_set == before
    with pytest.raises(ValueError, match="'sse9'"), _native.using("sse9"):  # type: ignore[arg-type]
        pass


def test_kernels_can_be_left_out() -> None:
    printed = run_python(
        "import torch; from postern import _native; from postern.softmax import two_pass_softmax\n"
        "x = torch.randn(2, 200_000); y = two_pass_softmax(x); assert torch.allclose(y, torch.softmax(x, -1))\n"
        "print(_native.status(), _native.instruction_sets())",
        POSTERN_INSTRUCTION_SET="none",
    )
    assert "available=False, instruction_set=None" in printed
    assert "slower path" in printed
    assert printed.endswith("()")


@needs_kernels
def test_instructions_from_the_environment() -> None:
    code = "from postern._native import status; print(status().instruction_set)"
    assert run_python(code, POSTERN_INSTRUCTION_SET="portable") == "portable"
    code = "from postern._native import status\ntry: status()\nexcept ValueError as error: print(error)"
    assert "got 'mmx'" in run_python(code, POSTERN_INSTRUCTION_SET="mmx")


@pytest.fixture
def fresh_loader(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A loader that looks into an empty folder."""
    monkeypatch.setattr(_native, "__file__", str(tmp_path / "__init__.py"))
    _native._load.cache_clear()
    yield tmp_path
    _native._load.cache_clear()


def test_a_missing_library_says_what_to_do(fresh_loader: Path) -> None:
    status = _native.status()
    assert not status.available
    assert "C++17 compiler" in status.reason
    with pytest.raises(Unavailable, match=r"C\+\+17 compiler"):
        _native.library()
    assert _native.instruction_sets() == ()


def test_a_broken_library_says_so(fresh_loader: Path) -> None:
    suffix = ".so" if os.name == "posix" else ".pyd"
    (fresh_loader / f"_kernels{suffix}").write_bytes(b"no library")
    assert "do not load" in _native.status().reason


def test_cache_sizes_are_plausible() -> None:
    assert 1 << 16 <= _native.cache_bytes("second") <= _native.cache_bytes("last") <= 1 << 32


@pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not in a source tree")
def test_building_without_a_compiler_succeeds_and_says_so(tmp_path: Path) -> None:
    shutil.copy(ROOT / "setup.py", tmp_path)
    sources = tmp_path / "postern" / "_native"
    shutil.copytree(ROOT / "postern" / "_native", sources, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=tmp_path,
        env=os.environ | {"CC": "/bin/false", "CXX": "/bin/false"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "NOT built" in result.stdout + result.stderr
    assert not list(sources.glob("*.so"))


@needs_kernels
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("shares", [True, False])
def test_a_forked_process_can_use_threads(shares: bool) -> None:
    # In a process of its own: a fork of the test runner would take its other threads' locks along.
    printed = run_python(
        "import os, torch; from postern import _native; from postern.softmax import two_pass_softmax\n"
        f"_native.share_threads({shares})\n"
        "torch.set_num_threads(3); x = torch.randn(1, 300_000)\n"
        "def softmax(): return two_pass_softmax(x, backend='native').numpy().tobytes()\n"
        "expected = softmax(); child = os.fork()\n"
        "if child == 0:\n"
        "    os._exit(0 if all(softmax() == expected for _ in range(20)) else 3)\n"
        "assert softmax() == expected\n"
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))"
    )
    assert printed == "0"


@needs_kernels
@pytest.mark.parametrize("shares", [True, False])
def test_callers_in_many_threads(shares: bool) -> None:
    before = torch.get_num_threads()
    _native.share_threads(shares)
    logits = [torch.randn(shape) for shape in ((1, 150_000), (300, 500), (2, 80_000), (7, 20_000))]
    expected = [two_pass_softmax(x, backend="native") for x in logits]
    failures = []

    def call(index: int) -> None:
        torch.set_num_threads(3)
        results = [two_pass_softmax(logits[index], backend="native") for _ in range(40)]
        failures.extend(index for result in results if not torch.equal(result, expected[index]))

    callers = [threading.Thread(target=call, args=(k % 4,)) for k in range(8)]
    try:
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    finally:
        torch.set_num_threads(before)
        _native.share_threads()
    assert failures == []


@needs_kernels
@pytest.mark.skipif(sys.platform != "linux", reason="torch's OpenMP runtime is visible on Linux alone")
def test_threads_are_shared_with_torch() -> None:
    # Two sets of threads would be counted: torch's one worker, and one of our own if they are not shared.
    code = (
        "import os, torch; from postern import _native; from postern.softmax import two_pass_softmax\n"
        "torch.set_num_threads(2); _native.share_threads({shares})\n"
        "x = torch.randn(64, 20_000); torch.softmax(x, -1); before = len(os.listdir('/proc/self/task'))\n"
        "two_pass_softmax(x, backend='native'); print(len(os.listdir('/proc/self/task')) - before)"
    )
    assert run_python(code.format(shares=True)) == "0"
    assert run_python(code.format(shares=False)) == "1"
