"""A small server that speaks the Hub's protocol."""

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import pytest

COMMIT = "89abcdef0123456789abcdef0123456789abcdef"


class Hub(http.server.ThreadingHTTPServer):
    """A Hub with one repository, whose files lie in a folder.

    Attributes:
        repository: its id.
        folder: the repository's files.
        bytes_before_cut: end every file's transfer after so many bytes.
    """

    def __init__(self, folder: Path, repository: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repository = repository
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
        repository = self.server.repository
        prefix = f"/api/datasets/{repository}/"
        files = [file for file in self.server.folder.rglob("*") if file.is_file()]
        if path.startswith(f"{prefix}revision/"):
            siblings = [
                {"rfilename": file.relative_to(self.server.folder).as_posix(), "size": file.stat().st_size}
                for file in files
            ]
            self._answer(json.dumps({"id": repository, "sha": COMMIT, "siblings": siblings}).encode())
        elif path.startswith(f"{prefix}tree/"):
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
        elif path.startswith(f"/datasets/{repository}/resolve/{COMMIT}/"):
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


@contextmanager
def serve(folder: Path, repository: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Let the Hub's client speak to a server with this repository."""
    server = Hub(folder, repository)
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
