"""`python -m components.serve` as its users start and stop it."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from components.common.errors import EXIT_INTERRUPTED
from tests.conftest import PROJECT
from tests.unit.serve_support import LONG, ServiceCommand, assert_problem, read_health, store_served_model, wait_until


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("command")


@pytest.fixture(scope="module")
def model_uri(tiny_model: Path, root: Path) -> str:
    return store_served_model(tiny_model, root)


@pytest.fixture(scope="module")
def command(model_uri: str, root: Path) -> Iterator[ServiceCommand]:
    service = ServiceCommand(model_uri, root, "--max_concurrency", "16")
    try:
        service.wait_until_ready()
        yield service
    finally:
        service.kill()


def run_serve(*flags: str, cwd: Path = PROJECT) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    arguments = [sys.executable, "-m", "components.serve", *flags]
    return subprocess.run(arguments, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False)


def assert_user_error(result: subprocess.CompletedProcess[str], *words: str) -> None:
    assert result.returncode == 2, result.stdout + result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    assert result.stderr.splitlines()[0].startswith("error: ")
    assert "  fix: " in result.stderr
    for word in words:
        assert word in result.stderr


def test_d40_health_answers_while_sixteen_answers_are_generated(command: ServiceCommand) -> None:
    times = []
    with ThreadPoolExecutor(16) as pool, httpx.Client(base_url=command.url, timeout=120, trust_env=False) as client:
        answers = [pool.submit(client.post, "/ask", json=LONG) for _ in range(16)]
        busy = 0
        while not all(answer.done() for answer in answers):
            started = time.monotonic()
            busy = max(busy, client.get("/health").json()["running"])
            times.append(time.monotonic() - started)
            time.sleep(0.01)
        assert [answer.result().status_code for answer in answers] == [200] * 16
    assert busy >= 12, "the answers must have run side by side while health was asked"
    assert len(times) > 10
    assert sorted(times)[int(len(times) * 0.95)] < 0.25, "idle it takes about 2 ms; the bound leaves room for two busy cores"


def test_d44_no_word_of_a_patient_in_the_logs(command: ServiceCommand) -> None:
    secret = "张三丰的乙肝表面抗原"
    with httpx.Client(base_url=command.url, timeout=60, trust_env=False) as client:
        answered = client.post("/ask", json={"question": f"{secret}是什么", "max_length": 8})
        client.post("/ask", json={"question": secret, "history": [{"role": "user", "content": secret}]})
        client.post("/ask", json={secret: secret, "question": secret, "temperature": secret})
        client.post("/ask", content=f'{{"question": "{secret}'.encode(), headers={"content-type": "application/json"})
        client.post("/ask", json={"question": secret * 1000})
        client.get(f"/{secret}?q={secret}", headers={b"X-Request-ID": secret.encode(), b"User-Agent": secret.encode()})
        client.post("/reload_model", json={"model_uri": f"/{secret}"})
    wait_until(lambda: answered.headers["x-request-id"] in command.text())
    for text in (command.text(), (command.folder / "api_server.log").read_text(encoding="utf-8")):
        assert secret not in text
        assert "乙肝" not in text
        assert json.dumps(secret)[1:-1] not in text, "escaped it is still there"
    line = next(line for line in command.log_lines() if line.get("request_id") == answered.headers["x-request-id"])
    assert line["question_chars"] == len(secret) + 3
    assert (line["route"], line["status"], line["completion_tokens"]) == ("/ask", 200, answered.json()["completion_tokens"])
    assert len(line["question_digest"]) == 16
    assert line["model_digest"] == answered.json()["model_digest"]


def test_every_log_line_is_json_and_says_when_it_was_ready(command: ServiceCommand) -> None:
    ready = [line for line in command.log_lines() if line["event"] == "ready"]
    assert len(ready) == 1
    assert ready[0]["load_s"] > 0
    assert not [line for line in command.log_lines() if line.get("route") == "/health"], "probes don't fill the log"


def test_port_taken_is_told_before_the_model_is_loaded(command: ServiceCommand, model_uri: str, tmp_path: Path) -> None:
    port = str(urlsplit(command.url).port)
    started = time.monotonic()
    result = run_serve("--model_uri", model_uri, "--port", port, "--log_file", str(tmp_path / "x.log"))
    assert time.monotonic() - started < 20
    assert_user_error(result, f"127.0.0.1:{port}", "--port")
    assert "device" not in result.stdout


def test_sigterm_finishes_what_runs_and_sends_the_rest_away_politely(model_uri: str, tmp_path: Path) -> None:
    service = ServiceCommand(model_uri, tmp_path)
    try:
        service.wait_until_ready()
        address = urlsplit(service.url)
        idle = http.client.HTTPConnection(str(address.hostname), address.port, timeout=10)
        idle.request("GET", "/health")
        idle.getresponse().read()
        with ThreadPoolExecutor(8) as pool, httpx.Client(base_url=service.url, timeout=60, trust_env=False) as client:
            running = [pool.submit(client.post, "/ask", json=LONG) for _ in range(8)]  # eight, so that each takes seconds
            wait_until(lambda: read_health(service.url)[1]["running"] == 8)
            service.terminate()
            wait_until(lambda: '"draining"' in service.text())
            idle.request("POST", "/ask", json.dumps({"question": "头疼", "max_length": 2}), {"Content-Type": "application/json"})
            last = idle.getresponse()
            assert last.status == 200
            assert last.headers["connection"] == "close"
            wait_until(lambda: read_health(service.url)[0] == 0)
            for answer in running:
                assert answer.result().status_code == 200
                assert answer.result().json()["completion_tokens"] > 0
        assert service.process.wait(20) == 0, service.text()
        assert "Traceback" not in service.text()
        assert '"stopped"' in service.text()
    finally:
        service.kill()


def test_what_is_not_finished_in_drain_s_gets_a_problem(model_uri: str, tmp_path: Path) -> None:
    service = ServiceCommand(model_uri, tmp_path, "--drain_s", "0.1")
    try:
        service.wait_until_ready()
        with ThreadPoolExecutor(8) as pool, httpx.Client(base_url=service.url, timeout=60, trust_env=False) as client:
            answers = [pool.submit(client.post, "/ask", json=LONG) for _ in range(8)]
            wait_until(lambda: read_health(service.url)[1]["running"] == 8)
            service.terminate()
            for answer in answers:
                assert_problem(answer.result(), 503, "shutting-down")
        assert service.process.wait(20) == 0, service.text()
    finally:
        service.kill()


@pytest.mark.parametrize("when", ["bound", "loading"])
def test_sigterm_while_the_model_is_loaded(model_uri: str, tmp_path: Path, when: str) -> None:
    service = ServiceCommand(model_uri, tmp_path)
    try:
        if when == "loading":
            wait_until(lambda: read_health(service.url)[0] == 503, 60)
            loading = httpx.get(f"{service.url}/health", trust_env=False)
            if loading.status_code == 503:  # a quiet machine may have finished meanwhile
                assert_problem(loading, 503, "loading")
                assert int(loading.headers["retry-after"]) >= 1
        service.terminate()
        code = service.process.wait(20)
        assert code == 0 or (when == "bound" and code == EXIT_INTERRUPTED), service.text()  # bound: before the server handles signals
        assert "Traceback" not in service.text()
    finally:
        service.kill()


def test_a_warning_where_others_can_reach_it(model_uri: str, tmp_path: Path) -> None:
    service = ServiceCommand(model_uri, tmp_path, "--host", "0.0.0.0")
    try:
        wait_until(lambda: "listening on " in service.text())
        assert "no authentication" in service.text()
        assert service.url.startswith("http://0.0.0.0:")
        assert not service.url.endswith(":0")
    finally:
        service.kill()


def test_help_is_quick_and_names_the_old_flag() -> None:
    result = run_serve("--help")
    assert result.returncode == 0
    assert "--model_path" in result.stdout and "--host" in result.stdout


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model_path", "./nowhere"], ["nowhere", "components.merge"]),
        (["--model_uri", "s3://"], []),
        (["--model_uri", "gopher://x/y"], ["gopher"]),
        (["--host", "no.such.host.invalid"], ["no.such.host.invalid", "--host"]),
        (["--host", "192.0.2.1"], ["192.0.2.1"]),
        (["--port", "70000"], ["--port"]),
        (["--max_concurrency", "0"], ["--max_concurrency"]),
        (["--request_timeout_s", "nan"], ["--request_timeout_s"]),
        (["--log_file", "/proc/nowhere/x.log"], ["/proc/nowhere"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_users_mistake_exits_with_2(flags: list[str], words: list[str], tmp_path: Path) -> None:
    given = [] if "--log_file" in flags else ["--log_file", str(tmp_path / "x.log")]
    port = [] if "--port" in flags else ["--port", "0"]
    assert_user_error(run_serve(*flags, *given, *port), *words)


def test_a_folder_that_was_not_merged_here_is_refused_with_the_fix(tiny_model: Path, tmp_path: Path) -> None:
    result = run_serve("--model_path", str(tiny_model), "--port", "0", "--log_file", str(tmp_path / "x.log"))
    assert_user_error(result, "chat_format.json", "python -m components.merge")


def test_an_altered_model_is_refused(model_uri: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_uri.removeprefix("file://"), folder)
    (folder / "generation_config.json").write_text("{}", encoding="utf-8")
    result = run_serve("--model_path", str(folder), "--port", "0", "--log_file", str(tmp_path / "x.log"))
    assert_user_error(result, "generation_config.json", "manifest")


def test_storage_down_is_told(tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    os.environ.update(AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}", AWS_ACCESS_KEY_ID="x", AWS_SECRET_ACCESS_KEY="x")
    try:
        result = run_serve("--model_uri", "s3://bucket/models/x", "--port", "0", "--log_file", str(tmp_path / "x.log"))
    finally:
        for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            del os.environ[name]
    assert_user_error(result, "s3://bucket/models/x", "AWS_ENDPOINT_URL")
