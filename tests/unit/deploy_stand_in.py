"""A stand-in for the service, for the tests of deploy: the same command line and endpoints, no model, and bad manners on demand.

It needs nothing but Python, starts in a tenth of a second, and drains as the real one does: after SIGTERM it takes no new connection
and answers on those it has with `Connection: close`. Its model folder's `behaviour.json` says how it misbehaves.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

DISCLAIMER = {"zh": "仅供参考，不能替代医生。", "en": "For information only; it does not replace a doctor."}


class StandIn(ThreadingHTTPServer):
    """Knows its model's digest and behaviour, how many connections are open, and whether it drains."""

    daemon_threads = True
    request_queue_size = 512

    def __init__(self, folder: Path, address: tuple[str, int]) -> None:
        self.digest = json.loads((folder / "manifest.json").read_text())["digest"]
        behaviour = folder / "behaviour.json"
        self.behaviour: dict[str, Any] = json.loads(behaviour.read_text()) if behaviour.exists() else {}
        self.draining = threading.Event()
        self.open, self.answers, self.lock = 0, 0, threading.Lock()
        super().__init__(address, Handler)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: StandIn

    def setup(self) -> None:
        super().setup()
        with self.server.lock:
            self.server.open += 1

    def finish(self) -> None:
        super().finish()
        with self.server.lock:
            self.server.open -= 1

    def log_message(self, format: str, *args: Any) -> None:
        return

    def do_GET(self) -> None:
        behaviour = self.server.behaviour
        broken = self.server.answers >= behaviour.get("unhealthy_after_answers", 10**9)
        if behaviour.get("never_ready") or broken:
            self._send(503, {"status": "loading"})
        else:
            self._send(200, {"model_digest": "0" * 64 if behaviour.get("wrong_digest") else self.server.digest})

    def do_POST(self) -> None:
        question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["question"]
        behaviour = self.server.behaviour
        language = "zh" if any("\u4e00" <= character <= "\u9fff" for character in question) else "en"
        if behaviour.get("wrong_language"):
            language = {"zh": "en", "en": "zh"}[language]
        time.sleep(behaviour.get("answer_s", 0.02))
        self.server.answers += 1
        if self.server.answers >= behaviour.get("dies_at_answer", 10**9):
            os._exit(1)
        if behaviour.get("error_500"):
            self._send(500, {"title": "The service failed"})
            return
        disclaimer = "" if behaviour.get("no_disclaimer") else DISCLAIMER[language]
        answer = " " if behaviour.get("empty_answer") else f"{self.server.digest[:12]}: {question}"
        answered_by = "f" * 64 if behaviour.get("other_model_answers") else self.server.digest
        self._send(200, {"answer": answer, "model_digest": answered_by, "disclaimer": disclaimer})

    def _send(self, status: int, value: dict[str, Any]) -> None:
        body = json.dumps(value, ensure_ascii=False).encode()
        self.close_connection = self.close_connection or self.server.draining.is_set()
        head = f"HTTP/1.1 {status} x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        self.wfile.write(f"{head}Connection: {'close' if self.close_connection else 'keep-alive'}\r\n\r\n".encode() + body)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model_uri", required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", required=True, type=int)
    parser.add_argument("--drain_s", required=True, type=float)
    options, _ = parser.parse_known_args()
    folder = Path(options.model_uri.removeprefix("file://"))
    server = StandIn(folder, (options.host, options.port))
    if server.behaviour.get("exits"):
        sys.exit("the weights are broken: reason 4711")
    signal.signal(signal.SIGTERM, signal.SIG_IGN if server.behaviour.get("ignores_sigterm") else lambda *_: server.draining.set())
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    print(f"stand-in for {server.digest[:12]} on {options.port}", flush=True)
    while not server.draining.wait(0.5):
        continue
    server.shutdown()
    server.socket.shutdown(socket.SHUT_RDWR)
    server.socket.close()
    deadline = time.monotonic() + options.drain_s
    while server.open and time.monotonic() < deadline:
        time.sleep(0.02)
    os._exit(0)


if __name__ == "__main__":
    main()
