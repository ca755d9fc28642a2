"""The process target: servers and front are processes of this machine that outlive the deploy step."""

from __future__ import annotations

import os
import socket
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from components.common.errors import ServiceError
from components.common.files import read_json, write_atomically, write_json
from components.deploy.detached import DetachedProcess, signals_deferred
from components.deploy.folder import ServiceFolder
from components.deploy.front import Forward, join_address, split_address
from components.deploy.model import Model
from components.deploy.target import LOG_LINES, Server, new_server_name, reachable_host

SERVE = (sys.executable, "-m", "components.serve")
PROJECT = Path(__file__).absolute().parents[2]  # where `python -m components.…` works
STOP_MARGIN_S = 5.0  # a drained server still closes its engine
FRONT_START_TIMEOUT_S = 20.0


class ProcessTarget:
    """Runs under `folder`: `front.json` says what is live, `servers/` and `front.process.json` which processes are ours."""

    def __init__(self, folder: ServiceFolder, host: str, port: int, drain_s: float) -> None:
        self.listen = join_address(host, port)
        self.front_address = join_address(reachable_host(host), port)
        self.url = f"http://{self.front_address}"
        self._folder, self._drain_s = folder.path, drain_s
        self._state = folder.path / "front.json"
        self._front_record = folder.path / "front.process.json"

    def open_front(self) -> bool:
        front, listen = self._front()
        if front and front.is_running() and listen == self.listen:
            return False
        _refuse_taken_port(self.listen)
        if self.live() is None:
            self._state.unlink(missing_ok=True)  # the port that it names may belong to another program by now
        command = [sys.executable, "-m", "components.deploy.front", "--listen", self.listen, "--state", str(self._state)]
        log = self._folder / "front.log"
        opened = DetachedProcess.start([*command, "--drain_s", str(self._drain_s)], log=log, cwd=PROJECT)
        write_json(self._front_record, {**asdict(opened), "listen": self.listen})
        if front:
            front.terminate()  # it listened at another address
        self._wait_for_front(opened, log)
        print(f"front: process {opened.pid} listens on {self.listen}, log {log}", flush=True)
        return True

    def servers(self) -> list[Server]:
        return [server for server, process in self._records() if process.is_running()]

    def live(self) -> Server | None:
        try:
            forward = Forward.from_json(self._state.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except ValueError as error:
            print(f"{self._state} is broken, so nothing counts as live: {error}", flush=True)
            return None
        return next((server for server in self.servers() if (server.backend, server.digest) == forward), None)

    def start(self, model: Model) -> Server:
        for server, process in self._records():
            if not process.is_running():
                self._record(server).unlink()
        name, address = new_server_name(model.digest), f"127.0.0.1:{_free_port()}"
        log = self._folder / f"{name}.log"
        _, port = split_address(address)
        flags = {
            "model_uri": model.uri,
            "host": "127.0.0.1",
            "port": port,
            "drain_s": self._drain_s,
            "log_file": os.devnull,  # its output is in our log already
        }
        command = [*SERVE, *(str(part) for flag, value in flags.items() for part in (f"--{flag}", value))]
        with signals_deferred():  # a server without a record would outlive an interrupted rollout
            process = DetachedProcess.start(command, log=log, cwd=PROJECT)
            server = Server(name, model.uri, model.digest, address, address, f"process {process.pid}", str(log))
            write_json(self._record(server), {"server": asdict(server), "process": asdict(process)})
        return server

    def is_running(self, server: Server) -> bool:
        process = self._process(server)
        return process is not None and process.is_running()

    def last_lines(self, server: Server) -> str:
        path = Path(server.log)
        return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]) if path.exists() else ""

    def shift(self, server: Server) -> None:
        write_atomically(self._state, Forward(server.backend, server.digest).to_json())

    def stop(self, server: Server) -> None:
        process = self._process(server)
        if process:
            process.stop(self._drain_s + STOP_MARGIN_S)
        self._record(server).unlink(missing_ok=True)

    def stop_all(self) -> None:
        front, _ = self._front()
        if front:
            front.terminate()  # it closes the port now and ends with its last connection
        for server, _ in self._records():
            self.stop(server)
        if front:
            front.stop(STOP_MARGIN_S)
        self._front_record.unlink(missing_ok=True)
        self._state.unlink(missing_ok=True)

    def _front(self) -> tuple[DetachedProcess | None, str]:
        if not self._front_record.exists():
            return None, ""
        value = read_json(self._front_record, kind="record of the front's process")
        return _process_of(value, self._front_record), str(value.get("listen"))

    def _wait_for_front(self, front: DetachedProcess, log: Path) -> None:
        deadline = time.monotonic() + FRONT_START_TIMEOUT_S
        while front.is_running() and time.monotonic() < deadline:
            try:
                socket.create_connection(split_address(self.front_address), timeout=1).close()
                return
            except OSError:
                time.sleep(0.05)
        front.stop(0)
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:]
        raise ServiceError(
            "the front did not start", where="\n".join([str(log), *lines]), fix="choose another --service_host or --service_port"
        )

    def _record(self, server: Server) -> Path:
        return self._folder / "servers" / f"{server.name}.json"

    def _records(self) -> list[tuple[Server, DetachedProcess]]:
        return [self._read_record(path) for path in sorted((self._folder / "servers").glob("*.json"))]

    def _process(self, server: Server) -> DetachedProcess | None:
        path = self._record(server)
        return self._read_record(path)[1] if path.exists() else None

    def _read_record(self, path: Path) -> tuple[Server, DetachedProcess]:
        value = read_json(path, kind="record of a server's process")
        try:
            return Server(**value["server"]), _process_of(value["process"], path)
        except (KeyError, TypeError):
            raise _broken(path) from None


def _process_of(value: Any, path: Path) -> DetachedProcess:
    try:
        return DetachedProcess(int(value["pid"]), str(value["started"]))
    except (KeyError, TypeError, ValueError):
        raise _broken(path) from None


def _broken(path: Path) -> ServiceError:
    return ServiceError("the record of a process is broken", where=str(path), fix="delete it; end the process by hand if it still runs")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _refuse_taken_port(listen: str) -> None:
    """Raise ServiceError where the front could not listen."""
    host, port = split_address(listen)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen()
    except OSError as error:
        raise ServiceError(
            f"the service can't listen on {listen}: {error.strerror}",
            where="--service_host, --service_port",
            fix=f"stop the program that listens there (find it: ss -ltnp 'sport = :{port}'), or choose another port",
        ) from None
