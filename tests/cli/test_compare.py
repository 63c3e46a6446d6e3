"""`postern compare` as a user types it."""

from pathlib import Path

import pytest

from .test_commands import events, postern


@pytest.fixture
def table(tmp_path: Path) -> Path:
    rows = [f"{k % 3},{(k * 7) % 11},{'yes' if (k * 7) % 11 > 4 else 'no'}" for k in range(60)]
    path = tmp_path / "mine.csv"
    path.write_text("a,b,bought\n" + "\n".join(rows))
    return path


def test_compares_on_a_table_of_the_users_own(table: Path, tmp_path: Path) -> None:
    asked = ["compare", "heads", "--data", str(table), "--label", "bought", "--members", "svm, softmax"]
    asked += ["--budget", "30", "--seeds", "2", "--learning-rates", "0.01", "--out", "run"]
    finished = postern(*asked, "--json", cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    told = events(finished.stdout)
    assert told[0]["subject"].startswith("2 members of heads on ")
    ranked = next(each for each in told if each["event"] == "ranked")
    assert ranked["setting"]["members"] == ["softmax", "svm"]
    assert {each["place"] for each in ranked["standings"]} <= {"best", "level", "behind"}
    for each in ranked["standings"]:
        assert 0 <= each["accuracy"]["mean"] <= 1
        assert each["step_time"]["mean"] > 0
    assert (tmp_path / "run" / "index.html").exists()
    [page] = (tmp_path / "run" / "comparisons").glob("*.html")
    assert page.name == f"heads-{told[0]['scale']}.html"

    again = postern(*asked, "--resume", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "0 jobs, 6 known already" in again.stdout
    for word in ("softmax", "svm", "best", "test accuracy, %", "step time", "Report: file://"):
        assert word in again.stdout

    table.write_text(table.read_text() + "\n2,3,no")
    changed = postern(*asked, "--resume", cwd=tmp_path)
    assert "6 jobs" in changed.stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["boxes"], "no comparison of 'boxes'"),
        (["haeds"], "did you mean heads"),
        (["heads", "--members", "softmax,svn"], "no member 'svn'; did you mean svm"),
        (["heads", "--members", "softmax"], "two members or more"),
        (["heads", "--data", "no-such-file.txt"], "no-such-file.txt"),
        (["heads", "--data", "diabetes"], "regress"),
        (["experts", "--data", "wine"], "members of experts need a text; wine is a table"),
        (["heads", "--budget", "0"], "--budget"),
        (["heads", "--seeds", "0"], "--seeds"),
        (["heads", "--learning-rates", "fast"], "0.001,0.003"),
        (["heads", "--learning-rates", "-1"], "positive"),
        (["heads", "--device", "gpu"], "cuda"),
        (["heads", "--address", "here"], "--engine ray"),
    ],
)
def test_misuse_says_what_to_do_and_runs_nothing(arguments: list[str], told: str, tmp_path: Path) -> None:
    finished = postern("compare", *arguments, cwd=tmp_path)
    assert finished.returncode in (2, 3)
    assert told in " ".join(finished.stderr.replace("│", " ").split())
    assert not (tmp_path / "postern-report").exists()


def test_a_table_without_its_label_lists_the_columns(table: Path, tmp_path: Path) -> None:
    finished = postern("compare", "heads", "--data", str(table), cwd=tmp_path)
    assert finished.returncode in (2, 3)
    assert "bought" in finished.stderr
    assert "label" in finished.stderr


def test_help_names_the_options() -> None:
    finished = postern("compare", "--help")
    for option in ("--data", "--label", "--members", "--budget", "--seeds", "--learning-rates", "--resume"):
        assert option in finished.stdout
    assert finished.returncode == 0
