"""A stand-in for the Hugging Face Hub on 127.0.0.1: the few requests that huggingface_hub makes, and misbehaviour as told."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"
RESOLVE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")
API = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(/(?:tree|revision)/(?P<revision>[^/?]+))?")


class Hub(ThreadingHTTPServer):
    """Repositories by name: their files by name."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()  # need the token
        self.token = "hf_good"
        self.cut_after: list[int] = []  # bytes after which the next downloads of weights break
        self.statuses: list[int] = []  # what the next requests are answered with
        self.other_content = False  # weights that differ from their hash
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, Range

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        hub, path = self.server, unquote(self.path)
        hub.requests.append((self.command, path, self.headers.get("Range")))
        if hub.statuses:
            return self.refuse(hub.statuses.pop(0))
        match = RESOLVE.fullmatch(path) or API.match(path)
        if match is None or match["repo"] not in hub.repositories:
            return self.refuse(401, "RepoNotFound")  # as the Hub answers those who may not know whether it is there
        if match["repo"] in hub.gated and self.headers.get("Authorization") != f"Bearer {hub.token}":
            return self.refuse(401, "GatedRepo")
        if match["revision"] not in (None, "main", COMMIT):
            return self.refuse(404, "RevisionNotFound")
        files = hub.repositories[match["repo"]]
        if match.re is API:
            return self.listing(files)
        if match["file"] not in files:
            return self.refuse(404, "EntryNotFound")
        return self.file(match["file"], files[match["file"]], with_body)

    def refuse(self, status: int, code: str = "") -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def listing(self, files: dict[str, bytes]) -> None:
        rows = [{"type": "file", "path": name, "size": len(data), "oid": "0" * 40} for name, data in files.items()]
        body = json.dumps(rows).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def file(self, name: str, content: bytes, with_body: bool) -> None:
        hub, is_large = self.server, name.endswith(".safetensors")
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        digest = hashlib.sha256(content).hexdigest()
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{digest if is_large else digest[:40]}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("X-Linked-Size", str(len(content)))
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if not with_body:
            return
        if hub.other_content and is_large:
            content = content[:-1] + bytes([content[-1] ^ 1])
        end = start + hub.cut_after.pop(0) if hub.cut_after and is_large else None
        self.wfile.write(content[start:end])
        if end is not None:
            self.close_connection = True

    def log_message(self, *arguments: Any) -> None:
        """Nothing on stderr."""


@contextmanager
def running_hub() -> Iterator[Hub]:
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()
