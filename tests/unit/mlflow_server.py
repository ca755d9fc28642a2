"""The few REST calls of an MLflow tracking server that a training makes, over real HTTP, with everything in memory."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

API = "/api/2.0/mlflow/"
ARTIFACTS = "/api/2.0/mlflow-artifacts/artifacts/"


class MlflowServer:
    """What the server was told; `down` makes every answer a 503."""

    def __init__(self) -> None:
        self.down = False
        self.calls: list[str] = []
        self.experiments: dict[str, str] = {}
        self.runs: dict[str, dict[str, Any]] = {}
        self.metrics: dict[str, list[dict[str, Any]]] = {}
        self.params: dict[str, dict[str, str]] = {}
        self.artifacts: dict[str, str] = {}
        self.uri = ""

    def answer(self, call: str, given: dict[str, Any]) -> dict[str, Any] | None:
        """The answer to a call; None: no such thing."""
        self.calls.append(call)
        run_id = given.get("run_id", "")
        found: dict[str, Any] | None = None
        match call:
            case "experiments/get-by-name":
                name = given["experiment_name"]
                found = {"experiment": {"experiment_id": self.experiments[name], "name": name}} if name in self.experiments else None
            case "experiments/create":
                self.experiments[given["name"]] = str(len(self.experiments) + 1)
                found = {"experiment_id": self.experiments[given["name"]]}
            case "runs/create":
                run_id = f"run{len(self.runs) + 1}"
                info = {"run_id": run_id, "run_uuid": run_id, "experiment_id": given["experiment_id"], "status": "RUNNING"}
                info |= {"run_name": given["run_name"], "artifact_uri": f"mlflow-artifacts:/{run_id}", "start_time": given["start_time"]}
                self.runs[run_id] = {"info": info, "data": {"tags": given["tags"]}}
                found = {"run": self.runs[run_id]}
            case "runs/get":
                found = {"run": self.runs[run_id]}
            case "runs/search":
                tagged = [run for run in self.runs.values() if any(f"'{tag['value']}'" in given["filter"] for tag in run["data"]["tags"])]
                found = {"runs": tagged[::-1][: given["max_results"]]}
            case "runs/update":
                self.runs[run_id]["info"] |= {"status": given["status"]}
                found = {"run_info": self.runs[run_id]["info"]}
            case "runs/log-batch":
                self.metrics.setdefault(run_id, []).extend(given.get("metrics", []))
                self.params.setdefault(run_id, {}).update({param["key"]: param["value"] for param in given.get("params", [])})
                found = {}
        return found


@contextmanager
def mlflow_server() -> Iterator[MlflowServer]:
    """A server on a free port of this machine."""
    state = MlflowServer()

    class Handler(BaseHTTPRequestHandler):
        def _body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def _reply(self, status: int, value: dict[str, Any]) -> None:
            content = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def _call(self, given: dict[str, Any]) -> None:
            if state.down:
                self._reply(503, {"error_code": "TEMPORARILY_UNAVAILABLE", "message": "down for the test"})
                return
            answer = state.answer(urlsplit(self.path).path.removeprefix(API), given)
            self._reply(
                *((404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no such thing"}) if answer is None else (200, answer))
            )

        def do_GET(self) -> None:
            self._call({name: values[0] for name, values in parse_qs(urlsplit(self.path).query).items()})

        def do_POST(self) -> None:
            self._call(json.loads(self._body() or b"{}"))

        def do_PUT(self) -> None:
            state.artifacts[self.path.removeprefix(ARTIFACTS)] = self._body().decode("utf-8")
            self._reply(200, {})

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.uri = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
