"""What the world can do to a rollout: exit code 2, what / where / fix, no traceback, and the service as it was."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from components.common.errors import StorageError, explain_os_error
from components.deploy import process as process_module
from components.deploy.__main__ import main
from components.deploy.detached import DetachedProcess
from components.deploy.front import Forward
from tests.conftest import PROJECT
from tests.unit.deploy_support import Command, StoredModel, free_port, project_with_stand_in, running_servers, stored_model


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return project_with_stand_in(tmp_path_factory.mktemp("deploy"))


@pytest.fixture(scope="module")
def model(project: Path) -> StoredModel:
    return stored_model(project.parent, "a")


@pytest.fixture
def command(project: Path, tmp_path: Path) -> Iterator[Command]:
    service = Command(project, tmp_path / "state", free_port())
    yield service
    service.clean_up()


def refused(result: subprocess.CompletedProcess[str], *says: str) -> None:
    assert result.returncode == 2, result.stdout + result.stderr
    assert result.stderr.startswith("error: ") and "fix:" in result.stderr and "Traceback" not in result.stderr
    for part in says:
        assert part in result.stderr


def nothing_was_started(command: Command) -> None:
    assert running_servers(command) == []
    assert not list(command.folder.glob("*.json")) and not list(command.folder.glob("servers/*"))


@pytest.mark.parametrize(
    ("model_uri", "says"),
    [
        ("", "--model_uri"),
        ("/nowhere/at/all", "does not exist"),
        ("file:///nowhere/at/all", "does not exist"),
        ("s3://bucket/models/latest", "does not end in a model's digest"),
        ("gs://bucket/model", "not a storage that we know"),
    ],
)
def test_d35_a_model_that_is_not_there(command: Command, model_uri: str, says: str) -> None:
    refused(command.run("--model_uri", model_uri), says)
    assert not command.state_dir.exists()


@pytest.mark.parametrize(("manifest", "says"), [("{half", "not JSON"), ('{"files": []}', "missing or wrong fields"), ("\xff", "not JSON")])
def test_a_broken_manifest(command: Command, tmp_path: Path, manifest: str, says: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "manifest.json").write_text(manifest, encoding="latin-1")
    refused(command.run("--model_uri", str(tmp_path / "model")), says, "manifest.json")
    nothing_was_started(command)


def test_all_wrong_settings_are_named_at_once(command: Command, model: StoredModel) -> None:
    flags = ("--service_name", "Not/A Name", "--service_port", "70000", "--deploy_target", "moon")
    refused(command.roll(model, *flags), "3 setting(s)", "--service_name", "--service_port", "--deploy_target")


def test_a_taken_port_is_refused_before_anything_is_started(command: Command, model: StoredModel) -> None:
    with socket.create_server(("127.0.0.1", command.port)):
        refused(command.roll(model), f"can't listen on 127.0.0.1:{command.port}", "--service_port")
    nothing_was_started(command)
    assert not list(command.folder.glob("*.log"))


def test_an_address_that_is_not_ours(command: Command, model: StoredModel) -> None:
    refused(command.roll(model, "--service_host", "203.0.113.7"), "can't listen on 203.0.113.7")
    nothing_was_started(command)


@pytest.mark.parametrize("flags", [(), ("--action", "stop"), ("--action", "rollback")])
def test_a_second_command_at_once_is_refused_and_told_who_is_at_it(command: Command, model: StoredModel, flags: tuple[str, ...]) -> None:
    command.folder.mkdir(parents=True)
    with FileLock(command.folder / "lock"):
        (command.folder / "lock.holder").write_text("`roll` by process 42 on elsewhere since yesterday\n")
        refused(command.roll(model, *flags), "another command is changing the service 'svc'", "process 42 on elsewhere")
    nothing_was_started(command)


def test_two_real_rolls_at_once(command: Command, model: StoredModel) -> None:
    slow = stored_model(command.project.parent, "slow", never_ready=True)
    first = command.start("--model_uri", slow.uri, "--ready_timeout_s", "60")
    while not running_servers(command):
        time.sleep(0.05)
    refused(command.roll(model), f"`roll` by process {first.pid} on {socket.gethostname()}")
    # Another service of the same folder is free to go.
    other = Command(command.project, command.state_dir, free_port(), service="other")
    assert other.roll(model).returncode == 0
    assert other.run("--action", "stop").returncode == 0
    first.terminate()
    first.communicate(timeout=30)
    assert command.roll(model).returncode == 0  # the lock went with its holder


def test_a_record_with_another_processes_id_ends_nobody(command: Command, model: StoredModel) -> None:
    """After a restart of the machine our process ids belong to others."""
    assert command.roll(model).returncode == 0
    command.clean_up()
    innocent = subprocess.Popen(["sleep", "600"])
    try:
        for path in (command.folder / "front.process.json", *command.folder.glob("servers/*.json")):
            value = json.loads(path.read_text())
            value.get("process", value)["pid"] = innocent.pid
            path.write_text(json.dumps(value))
        assert "nothing is live" in command.run("--action", "status").stdout
        assert command.run("--action", "stop").returncode == 0
        assert innocent.poll() is None
    finally:
        innocent.kill()
        innocent.wait()


def test_a_broken_front_state_neither_stops_the_traffic_nor_the_next_roll(command: Command, model: StoredModel) -> None:
    assert command.roll(model).returncode == 0
    (command.folder / "front.json").write_text('{"backend": ')
    assert command.answered_by() == model.digest
    status = command.run("--action", "status")
    assert status.returncode == 0 and "front.json is broken" in status.stdout
    successor = stored_model(command.project.parent, "b")
    assert command.roll(successor).returncode == 0
    assert command.answered_by() == successor.digest and len(running_servers(command)) == 1


@pytest.mark.parametrize("text", ["{half", "[]", '{"server": {}}', '{"server": {"surprise": 1}, "process": {}}'])
def test_a_broken_process_record(command: Command, text: str) -> None:
    (command.folder / "servers").mkdir(parents=True)
    (command.folder / "servers" / "x.json").write_text(text)
    refused(command.run("--action", "stop"), "servers/x.json", "delete it")


def test_rollback_without_a_history_with_a_broken_one_and_to_a_model_that_is_gone(command: Command, model: StoredModel) -> None:
    refused(command.run("--action", "rollback"), "no former model to go back to")
    former = stored_model(command.project.parent, "doomed")
    assert command.roll(former).returncode == 0
    assert command.roll(model).returncode == 0
    process = running_servers(command)

    history = command.folder / "history.jsonl"
    whole = history.read_text()
    history.write_text(whole + '{"outcome": \n')
    refused(command.run("--action", "rollback"), "history.jsonl, line 3")
    history.write_text(whole)
    shutil.rmtree(former.folder)
    refused(command.run("--action", "rollback"), "does not exist", former.digest)
    former.folder.mkdir()
    (former.folder / "weights.txt").write_text("others")
    refused(command.run("--action", "rollback"), "another model has taken the former one's place")
    assert running_servers(command) == process and command.answered_by() == model.digest


def test_a_full_disk_at_the_shift_puts_the_former_back(command: Command, model: StoredModel, monkeypatch: pytest.MonkeyPatch) -> None:
    assert command.roll(model).returncode == 0
    process = running_servers(command)

    def no_space(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    sigterm = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(process_module, "write_atomically", no_space)
    monkeypatch.setattr(process_module, "PROJECT", command.project)
    arguments = {
        "model_uri": stored_model(command.project.parent, "b").uri,
        "service_name": command.service,
        "service_port": command.port,
        "state_dir": command.state_dir,
        "rollout": command.state_dir / "rollout.json",
    }
    with pytest.raises(OSError, match="No space") as caught:
        main([part for name, value in arguments.items() for part in (f"--{name}", str(value))])
    signal.signal(signal.SIGTERM, sigterm)
    assert isinstance(explain_os_error(caught.value), StorageError)
    assert running_servers(command) == process and command.answered_by() == model.digest
    assert command.record["outcome"] == "kept_former" and command.record["stages"][-1]["stage"] == "shift"


def test_a_file_in_the_place_of_the_folder(command: Command, model: StoredModel, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    blocked = Command(command.project, tmp_path, command.port, service="file")
    refused(blocked.roll(model), "a file stands where", "--state_dir")
    refused(Command(command.project, tmp_path / "file", command.port).roll(model), "a file stands where")
    assert running_servers(command) == []


@pytest.mark.parametrize("action", ["roll", "status", "stop", "rollback"])
def test_the_docker_engine_is_not_running(command: Command, model: StoredModel, tmp_path: Path, action: str) -> None:
    command.environment["DOCKER_HOST"] = f"unix://{tmp_path}/dead.sock"
    flags = ("--deploy_target", "docker", "--service_image", "medical-qa:dev", "--action", action)
    refused(command.roll(model, *flags), "can't reach the Docker Engine", "dead.sock", "start it")


def test_the_real_service_refuses_an_empty_model(tmp_path: Path) -> None:
    """No stand-in here: what `python -m components.serve` says about a useless folder reaches the user."""
    empty = stored_model(tmp_path, "useless")
    command = Command(PROJECT, tmp_path / "state", free_port())
    refused(command.roll(empty, "--ready_timeout_s", "60"), "error: ready: the server ended", "process ")
    assert command.record["outcome"] == "failed"


def test_a_process_is_known_by_its_start_too(tmp_path: Path) -> None:
    started = DetachedProcess.start(["sleep", "600"], log=tmp_path / "log", cwd=tmp_path)
    assert started.is_running() and os.getsid(started.pid) == started.pid
    recycled = DetachedProcess(started.pid, "another boot:12345")
    assert not recycled.is_running()
    recycled.stop(0)
    assert started.is_running()
    began = time.monotonic()
    started.stop(10)
    assert not started.is_running() and time.monotonic() - began < 5
    started.stop(10)  # ending it twice is no error
    assert not DetachedProcess(2**22 + 1, "x").is_running()


def test_a_process_that_hears_no_sigterm_is_ended_with_its_children(tmp_path: Path) -> None:
    script = "trap '' TERM; sleep 601 & echo $!; wait; wait; sleep 601"
    process = DetachedProcess.start(["sh", "-c", script], log=tmp_path / "log", cwd=tmp_path)
    while not (tmp_path / "log").read_text().strip():
        time.sleep(0.02)
    child = int((tmp_path / "log").read_text())
    process.stop(0.3)
    assert not process.is_running()
    deadline = time.monotonic() + 5
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().rpartition(")")[2]:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_the_front_state_is_what_the_front_reads(command: Command, model: StoredModel) -> None:
    assert command.roll(model).returncode == 0
    forward = Forward.from_json((command.folder / "front.json").read_text())
    record = json.loads(next(command.folder.glob("servers/*.json")).read_text())
    assert forward == Forward(record["server"]["backend"], model.digest)
