"""Downloads, against a small server that speaks the Hub's protocol."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from postern.data import DataUnavailable, fetch, load, locate
from tests.data.hub import Hub, serve

Writer = Callable[[Path], Path]
MNIST = "ylecun/mnist"


@pytest.fixture
def hub(root: Path, tmp_path: Path, write_mnist_test: Writer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    folder = tmp_path / "repository"
    write_mnist_test(folder)
    (folder / "README.md").write_text("not asked for")
    with serve(folder, MNIST, monkeypatch) as server:
        yield server


def test_load_downloads_only_the_splits_files_once(hub: Hub, root: Path) -> None:
    assert len(load(MNIST, "test")) == 10_000
    assert len(load(MNIST, "test", limit=3)) == 3
    assert hub.downloads == ["mnist/test-00000-of-00001.parquet"]
    assert locate(MNIST).splits["test"] == "hub cache"
    assert list(root.iterdir()) == []


def test_fetch_puts_the_files_below_postern_data(hub: Hub, root: Path) -> None:
    assert fetch(MNIST, "test") == root / MNIST
    assert (root / MNIST / "mnist/test-00000-of-00001.parquet").is_file()
    assert locate(MNIST).splits["test"] == "local"
    fetch(MNIST, "test")
    assert hub.downloads == ["mnist/test-00000-of-00001.parquet"]


def test_fetch_without_postern_data_fills_the_hubs_cache(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POSTERN_DATA")
    folder = fetch(MNIST, "test")
    assert (folder / "mnist/test-00000-of-00001.parquet").is_file()
    assert locate(MNIST).path == folder


def test_a_broken_download_is_told_and_can_be_repeated(hub: Hub) -> None:
    hub.bytes_before_cut = 5000
    with pytest.raises(DataUnavailable, match="the split 'test' of 'ylecun/mnist' is not available"):
        fetch(MNIST, "test")
    assert locate(MNIST).where == "missing"
    hub.bytes_before_cut = None
    fetch(MNIST, "test")
    assert len(load(MNIST, "test")) == 10_000


def test_files_that_the_hub_lacks_are_told(hub: Hub) -> None:
    with pytest.raises(DataUnavailable, match=r"\(3\) the Hub, .*: it has no mnist/train-\*.parquet"):
        fetch(MNIST, "train")


def test_a_hub_that_is_down_is_told(hub: Hub, root: Path) -> None:
    (root / MNIST).mkdir(parents=True)
    (root / MNIST / "README.md").write_text("so that the folder is not empty")
    hub.shutdown()
    hub.server_close()
    for attempt in (lambda: fetch(MNIST), lambda: load(MNIST, "test")):
        with pytest.raises(DataUnavailable, match=r"\(3\) the Hub, .*: Connect"):
            attempt()


def test_a_folder_that_cannot_be_written_is_told(hub: Hub, root: Path) -> None:
    (root / "ylecun").write_text("in the way")
    with pytest.raises(DataUnavailable, match="Error"):
        fetch(MNIST, "test")
