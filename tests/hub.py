"""A stand-in for the Hugging Face Hub on this machine, to be asked by the real client."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any


class Hub(ThreadingHTTPServer):
    """Serves files as the Hub does; `cut` files break off once, after so many bytes."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.files: dict[str, bytes] = {}
        self.hashes: dict[str, str] = {}
        self.cut: dict[str, int] = {}
        self.gated: set[str] = set()  # repositories whose licence is to be accepted first
        self.requests: list[tuple[str, str, str | None]] = []

    def add(self, repository: str, name: str, content: bytes, sha256: str | None = None) -> None:
        path = f"/{repository}/resolve/main/{name}"
        self.files[path] = content
        self.hashes[path] = sha256 or hashlib.sha256(content).hexdigest()

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # the client may hang up


class HubHandler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        """What an upload asks for: a repository, how each file is to be sent, and a commit of files in base64."""
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append((self.command, self.path, self.headers.get("Authorization")))
        reply: dict[str, Any] = {}
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            if (name := f"{asked.get('organization') or 'me'}/{asked['name']}").startswith("forbidden/"):
                self.send_json(403, {"error": "you may not write there"})
                return
            reply = {"url": f"http://{self.headers['Host']}/{name}", "name": name}
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            reply = {
                "files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
            }
        elif "/commit/" in self.path:
            repository = self.path.removeprefix("/api/models/").partition("/commit/")[0]
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.add(repository, line["value"]["path"], base64.b64decode(line["value"]["content"]))
            reply = {
                "commitUrl": f"http://{self.headers['Host']}/{repository}/commit/{'c' * 40}",
                "commitOid": "c" * 40,
            }
        self.send_json(200, reply)

    def send_json(self, status: int, content: dict[str, Any]) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def answer(self) -> None:
        span = self.headers.get("Range")
        self.server.requests.append((self.command, self.path, span))
        content = self.server.files.get(self.path)
        if self.path[1:].partition("/resolve/")[0] in self.server.gated:
            self.send_response(403)
            self.send_header("X-Error-Code", "GatedRepo")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if content is None:
            known = any(path.startswith(self.path.rsplit("/", 1)[0]) for path in self.server.files)
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
            self.send_header("X-Repo-Commit", "c" * 40)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = int(re.fullmatch(r"bytes=(\d+)-", span)[1]) if span else 0  # type: ignore[index]
        self.send_response(206 if span else 200)
        self.send_header("ETag", f'"{self.server.hashes[self.path]}"')
        self.send_header("X-Repo-Commit", "c" * 40)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - start))
        if span:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "GET":
            end = self.server.cut.pop(self.path, len(content))
            self.wfile.write(content[start:end])
            self.close_connection = end < len(content)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serving(hub: Hub) -> Iterator[None]:
    thread = Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


def client_environment(hub: Hub, home: Path, **settings: str) -> dict[str, str]:
    """For a fresh process, since the client reads its settings when it is imported."""
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))},
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
        "HF_HOME": str(home),
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "127.0.0.1",
        **settings,
    }
