"""Downloads, against a small server that speaks the Hub's protocol."""

import hashlib
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import pytest

from postern.data import DataUnavailable, fetch, load, locate

Writer = Callable[[Path], Path]
MNIST = "ylecun/mnist"
COMMIT = "89abcdef0123456789abcdef0123456789abcdef"


class Hub(http.server.ThreadingHTTPServer):
    """One repository, whose files lie in a folder.

    Attributes:
        folder: the repository's files.
        bytes_before_cut: end every file's transfer after so many bytes.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder = folder
        self.bytes_before_cut: int | None = None
        self.downloads: list[str] = []


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        prefix = f"/api/datasets/{MNIST}/"
        if path.startswith(f"{prefix}revision/"):
            self._answer(json.dumps({"id": MNIST, "sha": COMMIT, "siblings": []}).encode())
        elif path.startswith(f"{prefix}tree/"):
            files = [file for file in self.server.folder.rglob("*") if file.is_file()]
            entries = [
                {
                    "type": "file",
                    "path": file.relative_to(self.server.folder).as_posix(),
                    "size": file.stat().st_size,
                    "oid": hashlib.sha1(file.read_bytes()).hexdigest(),
                }
                for file in files
            ]
            self._answer(json.dumps(entries).encode())
        elif path.startswith(f"/datasets/{MNIST}/resolve/{COMMIT}/"):
            name = path.split(f"{COMMIT}/")[1]
            if self.command == "GET":
                self.server.downloads.append(name)
            self._answer((self.server.folder / name).read_bytes(), cut=self.server.bytes_before_cut)
        else:
            self.send_error(404)

    def _answer(self, content: bytes, cut: int | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[:cut])
            self.close_connection = True


@pytest.fixture
def hub(root: Path, tmp_path: Path, write_mnist_test: Writer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    folder = tmp_path / "repository"
    write_mnist_test(folder)
    (folder / "README.md").write_text("not asked for")
    server = Hub(folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(
        huggingface_hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        f"http://127.0.0.1:{server.server_port}/{{repo_id}}/resolve/{{revision}}/{{filename}}",
    )
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield server
    server.shutdown()
    server.server_close()


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
