"""A container registry in memory: the part of the OCI distribution API that a push needs."""

from __future__ import annotations

import hashlib
import json
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit


class Registry(ThreadingHTTPServer):
    """Keeps blobs and manifests by digest, and tags; `address` is what an image's name starts with."""

    daemon_threads = True

    def __init__(self, *, denies: bool) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.denies = denies
        self.address = f"127.0.0.1:{self.server_address[1]}"
        self.blobs: dict[str, bytes] = {}
        self.uploads: dict[str, bytes] = {}
        self.tags: dict[str, str] = {}

    def keep(self, content: bytes) -> str:
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        self.blobs[digest] = content
        return digest


class _Handler(BaseHTTPRequestHandler):
    server: Registry
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(200 if self.path == "/v2/" else 404)

    def do_HEAD(self) -> None:
        blob = self.server.blobs.get(self.path.rpartition("/")[2])
        self._answer(404 if blob is None else 200, {"Content-Length": str(len(blob or b""))})

    def do_POST(self) -> None:
        self._body()
        if self.server.denies:
            self._answer(403, body={"errors": [{"code": "DENIED", "message": "you may not write here"}]})
            return
        upload = uuid.uuid4().hex
        self.server.uploads[upload] = b""
        self._answer(202, {"Location": f"{urlsplit(self.path).path}{upload}"})

    def do_PATCH(self) -> None:
        upload = urlsplit(self.path).path.rpartition("/")[2]
        self.server.uploads[upload] += self._body()
        self._answer(202, {"Location": self.path, "Range": f"0-{len(self.server.uploads[upload]) - 1}"})

    def do_PUT(self) -> None:
        address, body = urlsplit(self.path), self._body()
        name, _, last = address.path.rpartition("/")
        if name.endswith("/manifests"):
            digest = self.server.tags[f"{name.removeprefix('/v2/').removesuffix('/manifests')}:{last}"] = self.server.keep(body)
        else:
            digest = self.server.keep(self.server.uploads.pop(last) + body)
            assert digest == parse_qs(address.query)["digest"][0]
        self._answer(201, {"Location": address.path, "Docker-Content-Digest": digest})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, status: int, headers: dict[str, str] | None = None, body: object = None) -> None:
        content = b"" if body is None else json.dumps(body).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content)), "Content-Type": "application/json"} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def small_registry(*, denies: bool = False) -> Iterator[Registry]:
    """A registry on a free port of this machine, which Docker trusts without TLS."""
    registry = Registry(denies=denies)
    threading.Thread(target=registry.serve_forever, daemon=True).start()
    try:
        yield registry
    finally:
        registry.shutdown()
        registry.server_close()
