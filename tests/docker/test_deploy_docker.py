"""The docker target on a real Engine, with the real service in its image and a tiny real model.

`MEDICAL_QA_TEST_IMAGE` and `MEDICAL_QA_TEST_LIGHT_IMAGE` name the images; the rolls below are one service's life, in this order.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from components.common.storage import store_model
from tests.conftest import PROJECT
from tests.unit.deploy_support import Command, Load, StoredModel, free_port

pytestmark = pytest.mark.docker

IMAGE = os.environ.get("MEDICAL_QA_TEST_IMAGE", "medical-qa:dev")
LIGHT_IMAGE = os.environ.get("MEDICAL_QA_TEST_LIGHT_IMAGE", "medical-qa-light:dev")
SERVICE = f"test-deploy-{os.getpid()}"
FLAGS = ("--deploy_target", "docker", "--service_image", IMAGE, "--ready_timeout_s", "240", "--drain_s", "10")


def docker(*arguments: str) -> str:
    return subprocess.run(["docker", *arguments], capture_output=True, text=True, check=True, timeout=120).stdout.strip()


def containers(service: str = SERVICE) -> list[str]:
    return docker("ps", "--all", "--format", "{{.Names}}", "--filter", f"label=medical-qa.service={service}").split()


def inspect(name: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(docker("inspect", name))[0]
    return value


def remove_all(service: str) -> None:
    for name in containers(service):
        docker("rm", "--force", name)
    if docker("network", "ls", "--quiet", "--filter", f"name=medical-qa-{service}"):
        docker("network", "rm", f"medical-qa-{service}")


@pytest.fixture(scope="module")
def models(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, StoredModel]:
    """The tiny model with two system prompts, so with two digests, and one whose weights were damaged after it was stored."""
    from transformers import AutoTokenizer

    from components.common.chat import ChatFormat

    root = tmp_path_factory.mktemp("models")
    stored = {}
    for name in ("a", "b", "damaged"):
        shutil.copytree(tiny_model, root / name)
        ChatFormat.of_tokenizer(AutoTokenizer.from_pretrained(tiny_model), f"你是医学助手 {name}。").save(root / name)
        uri, manifest = store_model(root / name, str(root / "store"))
        stored[name] = StoredModel(uri, manifest.digest)
    weights = next(stored["damaged"].folder.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    return stored


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Command]:
    yield Command(PROJECT, tmp_path_factory.mktemp("state"), free_port(), service=SERVICE)
    remove_all(SERVICE)


def server_of(digest: str) -> str:
    return next(name for name in containers() if name.startswith(f"{SERVICE}-{digest[:12]}"))


def test_first_roll(service: Command, models: dict[str, StoredModel]) -> None:
    result = service.roll(models["a"], *FLAGS)
    assert result.returncode == 0, result.stdout + result.stderr
    assert service.answered_by() == models["a"].digest
    assert service.record["outcome"] == "live" and service.record["target"] == "docker"
    assert len(containers()) == 2

    facts = inspect(server_of(models["a"].digest))
    assert facts["Config"]["User"] == "10001:10001"
    assert facts["HostConfig"]["RestartPolicy"]["Name"] == "unless-stopped"
    assert facts["HostConfig"]["Memory"] > 0 and facts["HostConfig"]["PidsLimit"] > 0 and facts["HostConfig"]["CapDrop"] == ["ALL"]
    (mount,) = facts["Mounts"]
    assert (mount["Source"], mount["Destination"], mount["RW"]) == (str(models["a"].folder), str(models["a"].folder), False)
    labels = facts["Config"]["Labels"]
    assert (labels["medical-qa.service"], labels["medical-qa.digest"], labels["medical-qa.role"]) == (SERVICE, models["a"].digest, "server")
    assert list(facts["NetworkSettings"]["Networks"]) == [f"medical-qa-{SERVICE}"]


def test_the_same_digest_is_left_alone(service: Command, models: dict[str, StoredModel]) -> None:
    before = containers()
    result = service.roll(models["a"], *FLAGS)
    assert result.returncode == 0 and "live already" in result.stdout
    assert containers() == before
    status = service.run(*FLAGS, "--action", "status").stdout
    assert "answering" in status and models["a"].digest in status and before[0] in status + before[1]


def test_no_request_fails_through_a_roll_and_a_rollback(service: Command, models: dict[str, StoredModel]) -> None:
    with Load("127.0.0.1", service.port).running() as load:
        load.wait_for(models["a"].digest, timeout_s=120)
        result = service.roll(models["b"], *FLAGS)
        assert result.returncode == 0, result.stdout + result.stderr
        load.wait_for(models["b"].digest, timeout_s=120)
        former = load.answers[models["a"].digest]
        assert service.run(*FLAGS, "--action", "rollback").returncode == 0
        load.wait_for(models["a"].digest, former + 20, timeout_s=120)
    print(f"{sum(load.answers.values())} answers, {len(load.failures)} failures")
    assert not load.failures, (len(load.failures), load.failures[:5])
    assert len(containers()) == 2


def test_a_damaged_model_leaves_the_former_serving(service: Command, models: dict[str, StoredModel]) -> None:
    before = containers()
    result = service.roll(models["damaged"], *FLAGS)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "error: ready: the server ended" in result.stderr and "does not match its manifest" in result.stderr
    assert service.record["outcome"] == "kept_former"
    assert containers() == before and service.answered_by() == models["a"].digest
    assert "does not match its manifest" in next(service.folder.glob(f"*{models['damaged'].digest[:12]}*.log")).read_text()


def test_an_image_that_is_nowhere(service: Command, models: dict[str, StoredModel]) -> None:
    before = containers()
    result = service.roll(models["b"], *FLAGS, "--service_image", "localhost:1/no-such-image:dev")
    assert result.returncode == 2 and "can't be pulled" in result.stderr and "Traceback" not in result.stderr
    result = service.roll(models["b"], *FLAGS, "--service_image", "")
    assert result.returncode == 2 and "--service_image" in result.stderr
    assert containers() == before and service.answered_by() == models["a"].digest


def test_a_taken_port(service: Command, models: dict[str, StoredModel], tmp_path: Path) -> None:
    other = Command(PROJECT, tmp_path, free_port(), service=f"{SERVICE}-other")
    try:
        with socket.create_server(("127.0.0.1", other.port)):
            result = other.roll(models["a"], *FLAGS)
        assert result.returncode == 2 and f"can't listen on 127.0.0.1:{other.port}" in result.stderr
        assert containers(other.service) == []
    finally:
        remove_all(other.service)


def test_a_server_and_a_front_that_died_are_started_again(service: Command, models: dict[str, StoredModel]) -> None:
    died = server_of(models["a"].digest)
    docker("kill", died)
    response = httpx.get(f"{service.url}/health", trust_env=False, timeout=20)
    assert response.status_code == 503 and response.headers["Content-Type"] == "application/problem+json"
    assert service.roll(models["a"], *FLAGS).returncode == 0
    assert service.answered_by() == models["a"].digest and died not in containers()

    docker("kill", next(name for name in containers() if "-front-" in name))
    result = service.roll(models["a"], *FLAGS)
    assert result.returncode == 0 and "live already" in result.stdout
    assert service.answered_by() == models["a"].digest and len(containers()) == 2


def test_the_step_itself_in_a_container(service: Command, models: dict[str, StoredModel]) -> None:
    """As the local docker mode of the pipeline runs it: it reaches candidate and front by name, on their network."""
    state = service.state_dir
    store = models["b"].folder.parents[1]
    command = ["run", "--rm", "--user", "0:0", "--volume", "/var/run/docker.sock:/var/run/docker.sock"]
    command += ["--volume", f"{state}:{state}", "--volume", f"{store}:{store}", LIGHT_IMAGE, "python", "-m", "components.deploy"]
    flags = ["--service_name", SERVICE, "--service_port", str(service.port), "--state_dir", str(state), "--model_uri", models["b"].uri]
    result = subprocess.run(
        ["docker", *command, *flags, "--rollout", f"{state}/rollout.json", *FLAGS], capture_output=True, text=True, check=False, timeout=400
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert service.record["outcome"] == "live" and service.answered_by() == models["b"].digest
    assert len(containers()) == 2


def test_the_service_moves_to_another_port(service: Command, models: dict[str, StoredModel]) -> None:
    service.port = free_port()
    assert service.roll(models["b"], *FLAGS).returncode == 0
    assert service.answered_by() == models["b"].digest and len(containers()) == 2


def test_stop_leaves_no_container_and_no_network(service: Command, models: dict[str, StoredModel]) -> None:
    result = service.run(*FLAGS, "--action", "stop")
    assert result.returncode == 0, result.stderr
    assert containers() == [] and docker("network", "ls", "--quiet", "--filter", f"name=medical-qa-{SERVICE}") == ""
    assert "nothing is live" in service.run(*FLAGS, "--action", "status").stdout
    assert (service.folder / "history.jsonl").exists()
