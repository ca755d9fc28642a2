"""Submit and watch, against a small HTTP server that speaks KFP's v2beta1 API; the client is KFP's own."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from components.common.errors import ServiceError, UserError
from orchestration import cluster

PROJECT_COMMAND = [sys.executable, "pipeline.py"]


class FakeKfp:
    """The state of the API server: the answers to come for a run, and what was posted."""

    def __init__(self) -> None:
        self.answers: list[Any] = []  # dicts, or an HTTP status to fail with
        self.posted: list[dict[str, Any]] = []
        self.address = ""

    def next_answer(self) -> Any:
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


@pytest.fixture
def kfp() -> Iterator[FakeKfp]:
    state = FakeKfp()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def reply(self, status: int, value: Any) -> None:
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            if "/healthz" in self.path:
                self.reply(200, {"multi_user": False})
            elif "/experiments" in self.path:
                self.reply(200, {"experiments": [{"experiment_id": "e1", "display_name": "medical-qa"}]})
            else:
                answer = state.next_answer()
                self.reply(answer, {"error": "no"}) if isinstance(answer, int) else self.reply(200, answer)

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.posted.append(body)
            if "/runs" in self.path:
                self.reply(200, {"run_id": "r1", "display_name": body.get("display_name", "")})
            else:
                self.reply(200, {"experiment_id": "e1", "display_name": "medical-qa"})

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    state.address = f"http://127.0.0.1:{server.server_port}"
    yield state
    server.shutdown()
    server.server_close()


def run_answer(state: str, **tasks: str) -> dict[str, Any]:
    details = [{"display_name": name, "state": task_state} for name, task_state in tasks.items()]
    return {"run_id": "r1", "state": state, "run_details": {"task_details": details}}


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PROJECT_COMMAND, *arguments], capture_output=True, text=True, timeout=120, check=False)


def test_submit_sends_the_compiled_pipeline_with_typed_parameters(kfp: FakeKfp) -> None:
    kfp.answers = [run_answer("SUCCEEDED")]
    result = command(
        "submit",
        "--host",
        kfp.address,
        "--set",
        "learning_rate=1e-4",
        "--set",
        "validation_fraction=0.2",
        "--set",
        'tolerations=[{"key": "gpu"}]',
    )
    assert result.returncode == 0, result.stderr
    assert "submitted: run r1" in result.stdout
    run = next(body for body in kfp.posted if "pipeline_spec" in body)
    parameters = run["runtime_config"]["parameters"]
    assert parameters["learning_rate"] == "1e-4", "a number or auto travels as text"
    assert parameters["validation_fraction"] == 0.2
    assert parameters["tolerations"] == [{"key": "gpu"}]
    pipeline_spec = run["pipeline_spec"]["pipeline_spec"]
    assert pipeline_spec["pipelineInfo"]["name"] == "medical-qa"
    assert "platforms" in run["pipeline_spec"]["platform_spec"]


@pytest.mark.parametrize("state", sorted(cluster.END_STATES))
def test_d34_watch_knows_every_end_state(kfp: FakeKfp, state: str) -> None:
    kfp.answers = [run_answer("RUNNING", prepare="RUNNING"), run_answer(state, prepare="SUCCEEDED")]
    client = cluster.connect(kfp.address, "kubeflow", "")
    assert cluster.watch(client, "r1", poll_every_s=0.01, timeout_s=20) == state


def test_watch_prints_each_change_once_and_forgives_a_hiccup(kfp: FakeKfp, capsys: pytest.CaptureFixture[str]) -> None:
    kfp.answers = [
        run_answer("RUNNING", train="RUNNING"),
        503,
        run_answer("RUNNING", train="RUNNING"),
        run_answer("FAILED", train="FAILED"),
    ]
    client = cluster.connect(kfp.address, "kubeflow", "")
    assert cluster.watch(client, "r1", poll_every_s=0.01, timeout_s=20) == "FAILED"
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ", 1)[1] for line in lines[:-1]] == ["train: RUNNING", "train: FAILED"]


def test_watch_gives_up_in_words(kfp: FakeKfp) -> None:
    client = cluster.connect(kfp.address, "kubeflow", "")
    kfp.answers = [404]
    with pytest.raises(UserError, match="no run r1"):
        cluster.watch(client, "r1", poll_every_s=0.01)
    kfp.answers = [500]
    with pytest.raises(ServiceError, match="stopped answering"):
        cluster.watch(client, "r1", poll_every_s=0.01)
    kfp.answers = [run_answer("RUNNING")]
    with pytest.raises(ServiceError, match="did not end within"):
        cluster.watch(client, "r1", poll_every_s=0.01, timeout_s=0.05)


def test_no_server_is_a_clear_error() -> None:
    result = command("submit", "--host", "http://127.0.0.1:9")
    assert result.returncode == 2
    assert "no KFP API server answers" in result.stderr and "port-forward" in result.stderr
    assert "Traceback" not in result.stderr


def test_unknown_and_wrong_parameters_are_refused_before_anything_is_sent(kfp: FakeKfp) -> None:
    result = command("submit", "--host", kfp.address, "--set", "learnin_rate=1")
    assert result.returncode == 2 and "did you mean learning_rate" in result.stderr
    result = command("submit", "--host", kfp.address, "--set", "batch_size=many")
    assert result.returncode == 2 and "1 parameter(s) can't be used" in result.stderr and "valid integer" in result.stderr
    assert not kfp.posted
