"""What the tests of deploy share: stored models for the stand-in, the real command, and clients that never pause."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from components.common.storage import store_model
from tests.conftest import PROJECT

STAND_IN = PROJECT / "tests" / "unit" / "deploy_stand_in.py"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class StoredModel:
    uri: str
    digest: str

    @property
    def folder(self) -> Path:
        return Path(self.uri.removeprefix("file://"))


def stored_model(root: Path, name: str, **behaviour: Any) -> StoredModel:
    """A stored "model"; the stand-in behaves as its `behaviour.json` says."""
    folder = root / "made" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "weights.txt").write_text(name)
    if behaviour:
        (folder / "behaviour.json").write_text(json.dumps(behaviour))
    uri, manifest = store_model(folder, str(root / "store"))
    return StoredModel(uri, manifest.digest)


def project_with_stand_in(root: Path) -> Path:
    """A folder in which `python -m components.deploy` is ours and `python -m components.serve` the stand-in."""
    components = root / "project" / "components"
    (components / "serve").mkdir(parents=True)
    for name in ("__init__.py", "common", "deploy"):
        (components / name).symlink_to(PROJECT / "components" / name)
    (components / "serve" / "__init__.py").touch()
    shutil.copy(STAND_IN, components / "serve" / "__main__.py")
    return components.parent


@dataclass
class Command:
    """`python -m components.deploy` for one service, in a folder of its own."""

    project: Path
    state_dir: Path
    port: int
    service: str = "svc"
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        return self.state_dir / self.service

    @property
    def record(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads((self.state_dir / "rollout.json").read_text())
        return value

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self, *flags: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "components.deploy", "--service_name", self.service, "--service_port", str(self.port)]
        command += ["--state_dir", str(self.state_dir), "--rollout", str(self.state_dir / "rollout.json")]
        command += ["--watch_s", "0.3", "--drain_s", "3", "--ready_timeout_s", "20", *flags]
        environment = os.environ | self.environment
        return subprocess.Popen(command, cwd=self.project, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def run(self, *flags: str) -> subprocess.CompletedProcess[str]:
        process = self.start(*flags)
        output, errors = process.communicate(timeout=120)
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)

    def roll(self, model: StoredModel, *flags: str) -> subprocess.CompletedProcess[str]:
        return self.run("--model_uri", model.uri, *flags)

    def answered_by(self) -> str:
        """The digest of the model that answers a new connection."""
        response = httpx.post(f"{self.url}/ask", json={"question": "你好？", "max_length": 8}, trust_env=False, timeout=30)
        response.raise_for_status()
        return str(response.json()["model_digest"])

    def processes(self) -> dict[int, list[bytes]]:
        """Process id → command line of all that write into the service's folder: found without deploy's own records."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if (process / "fd" / "1").readlink().parent == self.folder:
                    found[int(process.name)] = (process / "cmdline").read_bytes().split(b"\0")
        return found

    def clean_up(self) -> None:
        """End what a test left, also when the command under test is the one that is broken."""
        for process in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


def running_servers(command: Command) -> list[int]:
    """Process ids of the service's servers."""
    return sorted(process for process, arguments in command.processes().items() if b"components.serve" in arguments)


class Load:
    """Clients that ask without a pause, on kept and on fresh connections, with httpx and with plain sockets."""

    def __init__(self, host: str, port: int, threads_per_kind: int = 2) -> None:
        self.host, self.port = host, port
        self.failures: list[str] = []
        self.answers: Counter[str] = Counter()
        self._stop = threading.Event()
        kinds: list[Callable[[], None]] = [self._httpx_kept, self._httpx_fresh, self._raw_kept, self._raw_fresh]
        self._threads = [threading.Thread(target=self._guarded, args=(kind,)) for kind in kinds for _ in range(threads_per_kind)]

    @contextlib.contextmanager
    def running(self) -> Iterator[Load]:
        for thread in self._threads:
            thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            for thread in self._threads:
                thread.join(60)

    def wait_for(self, digest: str, count: int = 20, timeout_s: float = 30) -> None:
        """Until this model has answered so often."""
        deadline = time.monotonic() + timeout_s
        while self.answers[digest] < count:
            assert time.monotonic() < deadline, f"{digest[:12]} answered {self.answers[digest]} times only; failures: {self.failures[:3]}"
            time.sleep(0.05)

    def _guarded(self, kind: Callable[[], None]) -> None:
        while not self._stop.is_set():
            try:
                kind()
            except Exception as error:
                self.failures.append(f"{kind.__name__}: {type(error).__name__}: {error}")

    def _count(self, status: int, body: bytes, kind: str) -> None:
        if status != 200:
            self.failures.append(f"{kind}: status {status}: {body[:200]!r}")
        else:
            self.answers[json.loads(body)["model_digest"]] += 1

    def _httpx_kept(self) -> None:
        with httpx.Client(trust_env=False, timeout=60) as client:
            while not self._stop.is_set():
                response = client.post(f"http://{self.host}:{self.port}/ask", json={"question": "发烧怎么办？", "max_length": 4})
                self._count(response.status_code, response.content, "httpx kept")

    def _httpx_fresh(self) -> None:
        response = httpx.post(
            f"http://{self.host}:{self.port}/ask", json={"question": "发烧怎么办？", "max_length": 4}, trust_env=False, timeout=60
        )
        self._count(response.status_code, response.content, "httpx fresh")

    def _raw_kept(self) -> None:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        connection.connect()
        # No reconnecting behind our back: a connection is left only when the server says so.
        connection.auto_open = 0
        closed = False
        while not self._stop.is_set() and not closed:
            closed = self._ask_raw(connection, "raw kept", {})
        connection.close()

    def _raw_fresh(self) -> None:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        self._ask_raw(connection, "raw fresh", {"Connection": "close"})
        connection.close()

    def _ask_raw(self, connection: http.client.HTTPConnection, kind: str, headers: dict[str, str]) -> bool:
        body = json.dumps({"question": "What helps against fever?", "max_length": 4}).encode()
        connection.request("POST", "/ask", body, {"Content-Type": "application/json", **headers})
        response = connection.getresponse()
        self._count(response.status, response.read(), kind)
        return response.will_close
