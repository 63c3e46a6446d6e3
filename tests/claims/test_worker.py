"""What a worker does with a job, in this process where that is enough."""

import json
import os
from pathlib import Path

import pytest
import torch

from postern.claims import worker
from postern.claims.outcome import Job, Status
from postern.claims.worker import find_experiment, perform, perform_apart, read_output


def job(claim: str, **means) -> Job:
    return Job("tests.claims.papers", "hostile", claim, "smoke", 0, "fingerprint", **means)


def test_a_claim_is_found_by_module_and_name() -> None:
    assert find_experiment(job("behaves")).statement == "A random number is above minus ten."
    with pytest.raises(ValueError, match="has no claim 'lost'; it has: behaves, is-slow"):
        find_experiment(job("lost"))


def test_a_job_runs_and_tells_of_its_progress() -> None:
    news: list[tuple[str, int, int | None]] = []
    result = perform(job("behaves"), lambda *progress: news.append(progress))
    assert result.status is Status.DONE
    assert result.measurement.metrics["threads"] == 1.0
    assert news == [("steps", done, 4) for done in range(5)]


@pytest.mark.parametrize("claim", ["raises", "exits", "returns-nan", "forgets"])
def test_whatever_a_claim_raises_becomes_the_result(claim: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = perform(job(claim))
    assert result.status is Status.ERROR
    assert result.message.split(":")[0] in capsys.readouterr().err


def test_a_module_that_is_not_there_becomes_the_result() -> None:
    lost = Job("tests.claims.no_such_module", "hostile", "behaves", "smoke", 0, "fingerprint")
    assert perform(lost).message.startswith("ModuleNotFoundError: No module named 'tests.claims.no_such_module'")


def test_memory_that_cannot_be_had_at_all_is_told_as_such(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Job) -> None:
        raise MemoryError("Unable to allocate 9 EiB")

    monkeypatch.setattr(worker, "find_experiment", refuse)
    assert perform(job("behaves")).message == "ran out of memory: Unable to allocate 9 EiB"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_a_missing_device_is_no_error() -> None:
    result = perform(job("behaves", device="cuda"))
    assert (result.status, result.message) == (Status.NOT_RUN, "needs a CUDA device, and this machine has none")


def test_output_and_progress_are_left_in_the_folder(tmp_path: Path) -> None:
    """What Python prints goes by way of pytest here; `test_engine` sees it from a process without pytest."""
    result = perform_apart(job("prints"), str(tmp_path))
    assert "from C\n" in result.output
    assert (tmp_path / "output").read_text() == result.output
    perform_apart(job("behaves"), str(tmp_path))
    told = json.loads((tmp_path / "progress").read_text())
    assert (told["label"], told["done"], told["total"]) == ("steps", 4, 4)


def test_kernels_get_torchs_threads_back_after_a_fork(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(worker._native, "share_threads", lambda: order.append("threads"))
    monkeypatch.setattr(worker, "perform", lambda job, report: order.append("job") or perform(job, report))
    perform_apart(job("behaves"), str(tmp_path))
    assert order == ["threads", "job"]


def test_standard_output_is_given_back(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    perform_apart(job("prints"), str(tmp_path))
    os.write(1, b"mine again\n")
    heard = capfd.readouterr().out
    assert "mine again\n" in heard
    assert "from C" not in heard


def test_only_the_end_of_long_output_is_read_whatever_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / "output"
    assert read_output(path) == ""
    path.write_bytes(b"start" + b"x" * worker.OUTPUT_LIMIT + b"\xff end")
    output = read_output(path)
    assert output.endswith("\N{REPLACEMENT CHARACTER} end")
    assert len(output) == worker.OUTPUT_LIMIT
