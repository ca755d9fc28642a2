"""A served model folder, the service in this process, and the service as a command: parts that the serve tests share."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from components.common.chat import ChatFormat
from components.common.storage import store_model
from components.serve.app import create_app
from components.serve.config import ServeSettings
from components.serve.logs import open_log
from components.serve.runtime import Runtime
from components.serve.server import Server, bind
from tests.conftest import PROJECT

FACTS = {"adapter_digest": "a" * 64, "data_digest": "d" * 64}
LONG = {"question": "讲讲高血压", "max_length": 400, "temperature": 2.0}  # so hot that it hardly ever ends by itself


def store_served_model(tiny_model: Path, root: Path, note: str = "") -> str:
    """The tiny model as the merge step would store it; another `note` makes another digest. Returns its address."""
    from transformers import AutoTokenizer

    work = root / f"work{note}"
    shutil.copytree(tiny_model, work)
    ChatFormat.of_tokenizer(AutoTokenizer.from_pretrained(tiny_model)).save(work)
    (work / "README.md").write_text(note, encoding="utf-8")
    return store_model(work, str(root / "store"), FACTS)[0]


class LocalService:
    """The service on a real port, in a thread of this process, so that a test can look inside."""

    def __init__(self, settings: ServeSettings) -> None:
        listener = bind(settings.host, settings.port)
        app = create_app(settings)
        self.runtime: Runtime = app.state.runtime
        self.address = ("127.0.0.1", listener.getsockname()[1])
        self.url = f"http://127.0.0.1:{self.address[1]}"
        self.server = Server(app, settings)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]}, daemon=True)
        self.thread.start()

    def wait_until_ready(self) -> None:
        wait_until(lambda: read_health(self.url)[0] == 200, 60)

    def client(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=60, trust_env=False)

    def ask(self, **question: Any) -> httpx.Response:
        with self.client() as client:
            return client.post("/ask", json=question)

    def active(self) -> int:
        """Requests inside the generation engine itself."""
        assert self.runtime.model is not None
        scheduler = self.runtime.model.engine._manager.batch_processor.scheduler
        return len(scheduler.active_requests) + len(scheduler.waiting_requests)

    def stop(self) -> None:
        self.server.stop()
        self.thread.join(30)
        assert not self.thread.is_alive()


@contextmanager
def local_service(model_uri: str, folder: Path, **settings: Any) -> Iterator[LocalService]:
    defaults: dict[str, Any] = {"precision": "fp32", "max_new_tokens": 448, "max_concurrency": 4, "drain_s": 1, "port": 0}
    values = defaults | {"model_uri": model_uri, "log_file": folder / "service.log"} | settings
    open_log(Path(values["log_file"]))
    service = LocalService(ServeSettings(**values))
    try:
        service.wait_until_ready()
        yield service
    finally:
        service.stop()


class ServiceCommand:
    """`python -m components.serve` as a process of its own."""

    def __init__(self, model_uri: str, folder: Path, *flags: str) -> None:
        self.folder = folder
        self.output = folder / "stdout.txt"
        command = [sys.executable, "-m", "components.serve", "--model_path", model_uri, "--port", "0"]
        command += ["--precision", "fp32", "--max_new_tokens", "448", "--log_file", str(folder / "api_server.log"), *flags]
        with self.output.open("w") as output:
            self.process = subprocess.Popen(command, cwd=PROJECT, stdout=output, stderr=subprocess.STDOUT)
        wait_until(lambda: "listening on " in self.text() or self.process.poll() is not None, 60)
        self.url = self.text().partition("listening on ")[2].partition(",")[0]

    def text(self) -> str:
        return self.output.read_text(encoding="utf-8")

    def log_lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "api_server.log").read_text(encoding="utf-8").splitlines()]

    def wait_until_ready(self) -> None:
        wait_until(lambda: read_health(self.url)[0] == 200 or self.process.poll() is not None, 120)
        assert self.process.poll() is None, self.text()

    def terminate(self) -> None:
        os.kill(self.process.pid, signal.SIGTERM)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(30)


def wait_until(condition: Callable[[], bool], timeout_s: float = 15.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def read_health(url: str) -> tuple[int, dict[str, Any]]:
    """Status and body of GET /health; (0, {}) while nobody listens. Not by httpx, which builds a TLS context for every call."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=5)
    try:
        connection.request("GET", "/health")
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    except (OSError, http.client.HTTPException):
        return 0, {}
    finally:
        connection.close()


def assert_problem(response: httpx.Response, status: int, kind: str) -> dict[str, Any]:
    """The response is a complete problem+json of this kind, and shows no trace."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = response.json()
    assert problem["type"] == f"/problems/{kind}"
    assert problem["status"] == status
    assert problem["title"] and problem["title_zh"] and problem["detail"] and problem["detail_zh"]
    assert problem["request_id"] == response.headers["x-request-id"]
    assert "Traceback" not in response.text
    return problem
