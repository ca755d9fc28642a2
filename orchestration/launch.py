"""Start one step's command, as a process or as a container, and give its output line by line and its exit code."""

from __future__ import annotations

import os
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from components.common.errors import ServiceError

DOCKER_SOCKET = Path("/var/run/docker.sock")
PROJECT = Path(__file__).resolve().parent.parent
TERMINATE_WAIT_S = 15
# Idle OpenMP threads that spin make training on a busy machine several times slower; a log line shall appear when it is written.
STEP_ENVIRONMENT = {
    "OMP_WAIT_POLICY": "passive",
    "PYTHONUNBUFFERED": "1",
    "PYTHONWARNINGS": "ignore::FutureWarning",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}
OnLine = Callable[[str], None]


def as_process(command: list[str], on_line: OnLine) -> int:
    """Run a step's command as a local process, in this interpreter's environment.

    The command belongs to an image, where `python` is the interpreter with the step's packages: here that is our own.
    """
    argv = [sys.executable, *command[1:]] if command[0] == "python" else command
    environment = STEP_ENVIRONMENT | dict(os.environ)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(PROJECT), environment.get("PYTHONPATH", "")]))
    process = subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment, start_new_session=True
    )
    assert process.stdout is not None
    try:
        for raw in process.stdout:
            on_line(raw.decode("utf-8", "replace").rstrip("\n"))
        return process.wait()
    except BaseException:
        _stop_group(process)
        raise


def _stop_group(process: subprocess.Popen[bytes]) -> None:
    """Stop a step and its children: politely, then at once."""
    for signal_number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        os.killpg(process.pid, signal_number)
        try:
            process.wait(TERMINATE_WAIT_S)
        except subprocess.TimeoutExpired:
            continue


def docker_client() -> Any:
    """A client of the local Docker Engine.

    Raises:
        ServiceError: it does not answer.
    """
    from docker.client import DockerClient

    try:
        client = DockerClient.from_env()
        client.ping()
    except Exception as error:
        raise ServiceError(
            f"the Docker Engine does not answer: {str(error)[:200]}",
            where=os.environ.get("DOCKER_HOST", str(DOCKER_SOCKET)),
            fix="start Docker, or use --runner process",
        ) from None
    return client


def require_images(images: list[str]) -> None:
    """Fail before a run starts, rather than in its third step.

    Raises:
        ServiceError: no Docker Engine, or no such image.
    """
    from docker.errors import ImageNotFound

    client = docker_client()
    try:
        for image in images:
            client.images.get(image)
    except ImageNotFound:
        raise ServiceError(f"the Docker Engine has no image {image}", fix="build it: python pipeline.py images build") from None
    finally:
        client.close()


def as_container(
    image: str, command: list[str], on_line: OnLine, *, environment: dict[str, str], mounts: dict[str, str], docker_access: bool
) -> int:
    """Run a step's command in a container on the local Docker Engine.

    kfp.local's own version removes the container by itself and takes one that vanished before it was asked for a success. Here a
    container is created, started, followed to its end, asked for its exit code, and only then removed.

    Args:
        image: with its tag or digest.
        environment: variables of the step.
        mounts: host path → "rw" or "ro", mounted at the same path.
        docker_access: also give the step the Docker socket, to roll out a service.

    Raises:
        ServiceError: no Docker Engine.
    """
    client = docker_client()
    volumes = {path: {"bind": path, "mode": mode} for path, mode in mounts.items()}
    groups: list[str | int] = [0]
    if docker_access:
        volumes[str(DOCKER_SOCKET)] = {"bind": str(DOCKER_SOCKET), "mode": "rw"}
        groups.append(DOCKER_SOCKET.stat().st_gid)
    container = client.containers.create(
        image, command, environment=environment, volumes=volumes, user=f"{os.getuid()}:{os.getgid()}", group_add=groups
    )
    try:
        container.start()
        pending = b""
        for chunk in container.logs(stream=True, follow=True):
            *lines, pending = (pending + chunk).split(b"\n")
            for line in lines:
                on_line(line.decode("utf-8", "replace"))
        if pending:
            on_line(pending.decode("utf-8", "replace"))
        return int(container.wait()["StatusCode"])
    finally:
        container.remove(force=True)
        client.close()


def mounts_for(values: list[Any], runs_dir: Path) -> dict[str, str]:
    """What a containerised step must see of the host: the runs folder, and each path among its inputs."""
    mounts = {str(runs_dir): "rw"}
    for value in values:
        path = Path(re.sub("^file://", "", value)) if isinstance(value, str) else None
        if path and path.is_absolute() and path.exists() and not path.is_relative_to(runs_dir) and not stat.S_ISSOCK(path.stat().st_mode):
            mounts[str(path)] = "ro"
    return mounts
