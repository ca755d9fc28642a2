"""The real command rolls a stand-in service: what goes live, what stays, and what is written about it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.unit.deploy_support import Command, StoredModel, free_port, project_with_stand_in, running_servers, stored_model

STAGES = ["candidate", "ready", "smoke", "shift", "watch", "keep"]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return project_with_stand_in(tmp_path_factory.mktemp("deploy"))


@pytest.fixture(scope="module")
def model_a(project: Path) -> StoredModel:
    return stored_model(project.parent, "a")


@pytest.fixture(scope="module")
def model_b(project: Path) -> StoredModel:
    return stored_model(project.parent, "b")


@pytest.fixture
def command(project: Path, tmp_path: Path) -> Iterator[Command]:
    """A service of which nothing exists yet."""
    yield from _service(project, tmp_path / "state")


@pytest.fixture(scope="module")
def live(project: Path, model_a: StoredModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    """A service with model a live; tests that use it must leave it so."""
    for command in _service(project, tmp_path_factory.mktemp("live") / "state"):
        assert command.roll(model_a).returncode == 0
        yield command


def _service(project: Path, state_dir: Path) -> Iterator[Command]:
    command = Command(project, state_dir, free_port())
    yield command
    command.clean_up()


def _port_is_closed(command: Command) -> bool:
    try:
        httpx.get(f"{command.url}/health", trust_env=False)
    except httpx.ConnectError:
        return True
    return False


def _live_process(command: Command) -> int:
    state = json.loads((command.folder / "front.json").read_text())
    records = [json.loads(path.read_text()) for path in command.folder.glob("servers/*.json")]
    return next(int(record["process"]["pid"]) for record in records if record["server"]["backend"] == state["backend"])


def test_first_roll_goes_live_and_outlives_the_step(command: Command, model_a: StoredModel) -> None:
    result = command.roll(model_a)
    assert result.returncode == 0, result.stderr
    assert command.answered_by() == model_a.digest
    process = _live_process(command)
    assert os.getsid(process) == process  # in no session of ours, so nothing that ends us ends it

    record = command.record
    assert [stage["stage"] for stage in record["stages"]] == STAGES
    assert all(stage["ok"] and stage["duration_s"] >= 0 for stage in record["stages"])
    assert (record["outcome"], record["url"], record["digest"], record["former_digest"]) == ("live", command.url, model_a.digest, None)
    answers = record["stages"][2]["answers"]
    assert [answer["language"] for answer in answers] == ["zh", "zh", "en"]
    assert all(answer["latency_s"] > 0 and answer["answer_characters"] > 0 for answer in answers)
    assert f"live: {command.url}" in result.stdout and f"curl -s {command.url}/ask" in result.stdout


def test_same_digest_again_changes_nothing(live: Command, model_a: StoredModel) -> None:
    before = _live_process(live)
    result = live.roll(model_a)
    assert result.returncode == 0 and "live already" in result.stdout
    assert running_servers(live) == [_live_process(live)] == [before]
    assert live.record["outcome"] == "already_live" and [stage["stage"] for stage in live.record["stages"]] == ["front"]


def test_a_new_model_replaces_the_former(command: Command, model_a: StoredModel, model_b: StoredModel) -> None:
    assert command.roll(model_a).returncode == 0
    former = _live_process(command)
    assert command.roll(model_b).returncode == 0
    assert command.answered_by() == model_b.digest
    assert running_servers(command).count(former) == 0
    assert command.record["former_digest"] == model_a.digest


@pytest.mark.parametrize(
    ("behaviour", "stage", "outcome", "says"),
    [
        ({"exits": True}, "ready", "kept_former", "reason 4711"),
        ({"never_ready": True}, "ready", "kept_former", "not ready after 1 s"),
        ({"wrong_digest": True}, "ready", "kept_former", "another model"),
        ({"error_500": True}, "smoke", "kept_former", "status 500"),
        ({"empty_answer": True}, "smoke", "kept_former", "empty"),
        ({"no_disclaimer": True}, "smoke", "kept_former", "no disclaimer"),
        ({"wrong_language": True}, "smoke", "kept_former", "not in the question's language"),
        ({"other_model_answers": True}, "smoke", "kept_former", "answered by model ffffffffffff"),
        ({"answer_s": 5}, "smoke", "kept_former", "ReadTimeout"),
        ({"unhealthy_after_answers": 3}, "watch", "rolled_back", "not healthy"),
        ({"unhealthy_after_answers": 4}, "watch", "rolled_back", "not healthy"),
        ({"dies_at_answer": 2}, "smoke", "kept_former", "RemoteProtocolError"),
        ({"dies_at_answer": 4}, "watch", "rolled_back", "RemoteProtocolError"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_a_bad_candidate_leaves_the_former_serving(
    live: Command, model_a: StoredModel, behaviour: dict[str, object], stage: str, outcome: str, says: str
) -> None:
    before = _live_process(live)
    servers = running_servers(live)
    bad = stored_model(live.project.parent, f"bad {behaviour}", **behaviour)
    result = live.roll(bad, "--ready_timeout_s", "1", "--smoke_timeout_s", "1", "--watch_s", "1")
    assert result.returncode == 2, result.stdout
    assert f"error: {stage}: " in result.stderr and says in result.stderr and "Traceback" not in result.stderr
    assert "fix:" in result.stderr
    assert "stand-in for" in result.stderr or behaviour.get("exits")  # the end of the candidate's log
    assert live.answered_by() == model_a.digest
    assert _live_process(live) == before and running_servers(live) == servers

    record = live.record
    assert record["outcome"] == outcome and record["error"]
    assert [entry["ok"] for entry in record["stages"]] == [True] * STAGES.index(stage) + [False]
    entry = json.loads((live.folder / "history.jsonl").read_text().splitlines()[-1])
    assert (entry["digest"], entry["outcome"], entry["former_digest"]) == (bad.digest, outcome, model_a.digest)


@pytest.mark.parametrize("behaviour", [{"exits": True}, {"unhealthy_after_answers": 4}])
def test_a_bad_first_candidate_leaves_nothing_behind(command: Command, behaviour: dict[str, object]) -> None:
    result = command.roll(stored_model(command.project.parent, f"first {behaviour}", **behaviour), "--watch_s", "1")
    assert result.returncode == 2 and "nothing is live" in result.stderr
    assert command.record["outcome"] == "failed"
    assert _port_is_closed(command)
    assert not list(command.folder.glob("servers/*")) and not (command.folder / "front.json").exists()


def test_a_live_service_that_died_is_started_again(command: Command, model_a: StoredModel) -> None:
    command.roll(model_a)
    died = _live_process(command)
    os.kill(died, signal.SIGKILL)
    response = httpx.get(f"{command.url}/health", trust_env=False)
    assert response.status_code == 503 and response.headers["Retry-After"]
    assert "nothing is live" in command.run("--action", "status").stdout
    assert command.roll(model_a).returncode == 0
    assert command.answered_by() == model_a.digest and _live_process(command) != died


def test_a_live_service_that_hangs_and_hears_no_sigterm_is_replaced(command: Command, model_a: StoredModel) -> None:
    command.roll(model_a)
    hangs = _live_process(command)
    os.kill(hangs, signal.SIGSTOP)
    result = command.roll(model_a, "--drain_s", "0")
    assert result.returncode == 0, result.stderr
    assert command.answered_by() == model_a.digest and hangs not in running_servers(command)


def test_a_front_that_died_is_started_again_without_a_roll(command: Command, model_a: StoredModel) -> None:
    command.roll(model_a)
    server = _live_process(command)
    os.kill(json.loads((command.folder / "front.process.json").read_text())["pid"], signal.SIGKILL)
    while not _port_is_closed(command):
        time.sleep(0.05)
    assert "live already" in command.roll(model_a).stdout
    assert command.answered_by() == model_a.digest and _live_process(command) == server


def test_the_service_moves_to_another_port(command: Command, model_a: StoredModel) -> None:
    command.roll(model_a)
    former_port, command.port = command.port, free_port()
    assert command.roll(model_a).returncode == 0
    assert command.answered_by() == model_a.digest
    assert _port_is_closed(Command(command.project, command.state_dir, former_port))


def test_rollback_goes_back_and_forth(command: Command, model_a: StoredModel, model_b: StoredModel) -> None:
    command.roll(model_a)
    assert command.run("--action", "rollback").returncode == 2
    command.roll(model_b)
    for expected in (model_a, model_b):
        result = command.run("--action", "rollback")
        assert result.returncode == 0, result.stderr
        assert command.answered_by() == expected.digest
        assert command.record["action"] == "rollback" and command.record["outcome"] == "live"


def test_stop_ends_everything_and_rollback_starts_the_former(command: Command, model_a: StoredModel, model_b: StoredModel) -> None:
    command.roll(model_a)
    command.roll(model_b)
    result = command.run("--action", "stop")
    assert result.returncode == 0 and "stopped svc: process" in result.stdout
    assert _port_is_closed(command) and not list(command.folder.glob("servers/*"))
    assert "nothing is live" in command.run("--action", "status").stdout
    assert "no server was running" in command.run("--action", "stop").stdout
    assert command.run("--action", "rollback").returncode == 0
    assert command.answered_by() == model_a.digest


def test_status_shows_what_is_live(live: Command, model_a: StoredModel) -> None:
    output = live.run("--action", "status").stdout
    for expected in ("answering", live.url, model_a.digest, model_a.uri, f"process {_live_process(live)}"):
        assert expected in output


def test_sigterm_in_mid_rollout_ends_the_candidate(live: Command, model_a: StoredModel) -> None:
    servers = running_servers(live)
    process = live.start("--model_uri", stored_model(live.project.parent, "slow", never_ready=True).uri)
    while len(running_servers(live)) == len(servers):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130 and "Traceback" not in errors
    assert running_servers(live) == servers
    assert live.answered_by() == model_a.digest and live.record["outcome"] == "kept_former"


def test_what_a_killed_rollout_left_is_cleared_by_the_next(command: Command, model_a: StoredModel, model_b: StoredModel) -> None:
    command.roll(model_a)
    live = _live_process(command)
    process = command.start("--model_uri", stored_model(command.project.parent, "slow", never_ready=True).uri)
    while len(list(command.folder.glob("servers/*.json"))) == 1 or len(running_servers(command)) == 1:
        time.sleep(0.05)
    process.kill()
    process.communicate()
    assert command.answered_by() == model_a.digest  # killed, and nobody noticed
    result = command.roll(model_b)
    assert result.returncode == 0 and "an interrupted rollout left it" in result.stdout
    assert running_servers(command) == [_live_process(command)] != [live]


def test_neither_torch_nor_transformers_is_imported_by_a_whole_roll(live: Command, model_a: StoredModel) -> None:
    probe = live.project.parent / "sitecustomize"
    probe.mkdir(exist_ok=True)
    # Any import of them fails loudly, in the step and in the processes it starts.
    for name in ("torch", "transformers", "kfp"):
        (probe / f"{name}.py").write_text(f"raise RuntimeError('{name} was imported')")
    strict = Command(live.project, live.state_dir / "strict", free_port(), environment={"PYTHONPATH": str(probe)})
    try:
        assert strict.roll(model_a).returncode == 0
    finally:
        strict.run("--action", "stop")


def test_the_executor_output_names_url_digest_and_outcome(command: Command, model_a: StoredModel, tmp_path: Path) -> None:
    message = {
        "inputs": {
            "parameterValues": {
                "model_uri": model_a.uri,
                "deploy_target": "process",
                "service_name": "svc",
                "service_host": "127.0.0.1",
                "service_port": float(command.port),
                "service_image": "",
                "state_dir": str(command.state_dir),
            }
        },
        "outputs": {
            "artifacts": {"rollout": {"artifacts": [{"name": "rollout", "uri": str(tmp_path / "out" / "rollout")}]}},
            "outputFile": str(tmp_path / "out" / "executor_output.json"),
        },
    }
    arguments = [sys.executable, "-m", "components.deploy", "--executor_input", json.dumps(message)]
    result = subprocess.run(arguments, cwd=command.project, capture_output=True, text=True, check=False, timeout=120)
    assert result.returncode == 0, result.stderr
    output = json.loads((tmp_path / "out" / "executor_output.json").read_text())
    metadata = output["artifacts"]["rollout"]["artifacts"][0]["metadata"]
    assert metadata == {"url": command.url, "digest": model_a.digest, "outcome": "live"}
    assert json.loads((tmp_path / "out" / "rollout").read_text())["outcome"] == "live"


def test_d38_the_history_holds_absolute_addresses_that_still_serve_later(command: Command, model_a: StoredModel) -> None:
    """A model that was rolled by a relative path must be found by a rollback from another folder."""
    relative = os.path.relpath(model_a.folder, command.project)
    assert command.run("--model_uri", relative).returncode == 0
    entry = json.loads((command.folder / "history.jsonl").read_text())
    assert entry["model_uri"] == model_a.uri
