"""The commands as a user types them: real processes, real exit codes, real files."""

import json
import os
import pty
import select
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def postern(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "postern", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd or ROOT,
        env=os.environ | {"COLUMNS": "200", "PYTHONPATH": str(ROOT)} | environment,
        timeout=110,
        check=False,
    )


def events(output: str) -> list[dict]:
    return [json.loads(line) for line in output.splitlines()]


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """One real smoke run of a paper, from an empty working directory."""
    folder = tmp_path_factory.mktemp("checked")
    return folder, postern("check", "cnn-svm", "--json", "--out", "run", cwd=folder)


def test_help_is_quick_and_names_every_command() -> None:
    started = time.perf_counter()
    finished = postern("--help")
    assert time.perf_counter() - started < 3
    assert finished.returncode == 0
    for command in ("papers", "check", "compare", "report", "results", "data", "doctor"):
        assert command in finished.stdout
    assert "Exit codes" in finished.stdout


def test_papers_lists_searches_and_shows() -> None:
    everything = json.loads(postern("papers", "--json").stdout)
    found = [paper["paper"] for paper in json.loads(postern("papers", "softmax", "--json").stdout)]
    assert len(everything) >= 47
    assert "two-pass-softmax" in found
    assert len(found) < len(everything)
    shown = postern("papers", "soft-nms")
    assert "Claims: postern check soft-nms" in " ".join(shown.stdout.split())
    assert postern("papers", "no such thing at all").returncode == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["check", "soft-nsm"], "soft-nms"),
        (["check", "soft-nms/no-such-claim"], "no claim 'no-such-claim'"),
        (["check"], "--all"),
        (["check", "--family", "boxen"], "boxes"),
        (["check", "--all", "soft-nms"], "--all"),
        (["check", "soft-nms", "--publish"], "smoke run is no evidence"),
        (["check", "soft-nms", "--seeds", "0"], "--seeds"),
        (["check", "soft-nms", "--scale", "tiny"], "tiny"),
        (["check", "soft-nms", "--device", "gpu"], "cuda"),
        (["check", "soft-nms", "--address", "here"], "--engine ray"),
        (["data", "fetch", "mnist"], "ylecun/mnist"),
    ],
)
def test_a_wrong_command_line_exits_with_2_and_says_what_would_be_right(arguments: list[str], told: str) -> None:
    finished = postern(*arguments)
    assert finished.returncode == 2
    assert told in " ".join(finished.stderr.replace("│", " ").split())


def test_check_runs_every_claim_and_writes_a_report(checked: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, finished = checked
    assert finished.returncode == 0, finished.stderr
    told = events(finished.stdout)
    begin, report = told[0], told[-1]
    concluded = {event["claim"]: event for event in told if event["event"] == "concluded"}
    assert begin["event"] == "begin"
    assert len(concluded) == len(begin["claims"]) > 0
    assert all(event["verdict"] == "smoke" for event in concluded.values())
    assert (folder / report["path"]).read_text().startswith("<!DOCTYPE html>")


def test_resume_runs_nothing_again_and_a_new_run_keeps_the_old_one(
    checked: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    folder, first = checked
    resumed = events(postern("check", "cnn-svm", "--json", "--out", "run", "--resume", cwd=folder).stdout)
    assert resumed[0]["jobs"] == 0
    assert resumed[0]["known"] == events(first.stdout)[0]["jobs"]
    with sqlite3.connect(folder / "run" / "run.sqlite") as connection:
        assert (
            connection.execute("SELECT count(*) FROM job WHERE status = 'done'").fetchone()[0] == (resumed[0]["known"])
        )


def test_report_is_written_again_from_a_run_folder(checked: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, _ = checked
    page = folder / "run" / "index.html"
    page.unlink()
    assert postern("report", "--out", "run", cwd=folder).returncode == 0
    assert page.exists()


def test_report_of_no_run_says_what_to_do(tmp_path: Path) -> None:
    finished = postern("report", "--out", str(tmp_path))
    assert finished.returncode == 3
    assert "postern check" in finished.stderr


def test_a_run_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    finished = postern("check", "cnn-svm", "--out", str(tmp_path / "file"))
    assert finished.returncode == 2
    assert (tmp_path / "file").read_text() == "mine"


def test_publishing_outside_a_checkout_is_refused_before_anything_runs(tmp_path: Path) -> None:
    finished = postern("check", "cnn-svm", "--scale", "small", "--publish", cwd=tmp_path)
    assert finished.returncode == 3
    assert "git checkout" in finished.stderr
    assert not (tmp_path / "postern-report").exists()


def test_results_page_is_in_step_with_the_ledger(tmp_path: Path) -> None:
    assert postern("results", "--check").returncode == 0
    (tmp_path / "results").mkdir()
    (tmp_path / "RESULTS.md").write_text("edited by hand")
    finished = postern("results", "--check", cwd=tmp_path)
    assert finished.returncode == 1
    assert "postern results" in finished.stderr


def test_doctor_names_a_remedy_for_all_that_is_missing() -> None:
    found = json.loads(postern("doctor", "--json", POSTERN_DATA="/nowhere", HF_HUB_OFFLINE="1").stdout)
    assert {finding["topic"] for finding in found} == {"kernel", "device", "extra", "data"}
    assert all(finding["remedy"] for finding in found if not finding["is_there"])
    digits = next(finding for finding in found if finding["name"] == "digits")
    assert digits["is_there"]


def test_data_list_tells_where_each_set_is() -> None:
    found = {entry["name"]: entry for entry in json.loads(postern("data", "list", "--json").stdout)}
    assert found["digits"]["where"] == "embedded"
    assert {"ylecun/mnist", "uoft-cs/cifar10", "Salesforce/wikitext"} <= found.keys()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_suggests_papers(shell: str) -> None:
    words = {"COMP_WORDS": "postern check soft", "COMP_CWORD": "2", "_TYPER_COMPLETE_ARGS": "postern check soft"}
    program = [sys.executable, "-c", "import sys; sys.argv[0] = 'postern'; from postern.cli import main; main()"]
    finished = subprocess.run(
        program,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | words | {"_POSTERN_COMPLETE": f"complete_{shell}", "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
        timeout=60,
        check=False,
    )
    assert "soft-nms" in finished.stdout


def read_terminal(descriptor: int, process: subprocess.Popen[bytes], timeout_s: float) -> str:
    seen, deadline = b"", time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        ready, _, _ = select.select([descriptor], [], [], 0.2)
        if ready:
            try:
                chunk = os.read(descriptor, 65536)
            except OSError:
                break
            if not chunk:
                break
            seen += chunk
        elif process.poll() is not None:
            break
    return seen.decode(errors="replace")


def test_a_terminal_sees_bars_and_a_pipe_sees_lines(tmp_path: Path) -> None:
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "postern", "check", "cnn-svm", "--out", str(tmp_path / "terminal")],
        stdout=slave,
        stderr=slave,
        cwd=ROOT,
        env=os.environ | {"TERM": "xterm-256color", "COLUMNS": "120"},
    )
    os.close(slave)
    seen = read_terminal(master, process, 100)
    assert process.wait(timeout=10) == 0
    assert "━" in seen
    assert "seed 0" in seen
    assert "\x1b[" in seen

    piped = postern("check", "cnn-svm", "--resume", "--out", str(tmp_path / "terminal")).stdout
    assert "\x1b[" not in piped
    assert "SMOKE cnn-svm/" in piped
    assert "Report: file://" in piped


def test_ctrl_c_keeps_what_is_finished_and_says_how_to_go_on(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "postern", "check", "cnn-svm", "--out", str(tmp_path), "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if json.loads(line)["event"] == "finished":
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "--resume" in errors
    with sqlite3.connect(tmp_path / "run.sqlite") as connection:
        assert connection.execute("SELECT count(*) FROM job").fetchone()[0] >= 1
