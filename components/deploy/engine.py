"""The Docker Engine: how to reach it, what its refusals mean to a user, and small files inside a container."""

from __future__ import annotations

import io
import os
import re
import socket
import tarfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from components.common.errors import ServiceError, UserError

if TYPE_CHECKING:
    from docker.client import DockerClient
    from docker.models.containers import Container


def connect() -> DockerClient:
    """The Engine that the usual `DOCKER_*` variables or the Docker context name.

    Raises:
        ServiceError: it is not running, or its Python package is not installed.
    """
    try:
        from docker.client import from_env
        from docker.errors import DockerException
    except ModuleNotFoundError:
        raise ServiceError("the Python package `docker` is not installed", fix="pip install docker") from None
    try:
        return from_env()
    except DockerException as error:
        raise ServiceError(
            f"can't reach the Docker Engine: {str(error)[:200]}",
            where=os.environ.get("DOCKER_HOST", "the local Engine's socket"),
            fix="start it (systemctl start docker, or Docker Desktop), or use --deploy_target process",
        ) from None


@contextmanager
def engine_errors() -> Iterator[None]:
    """Turn what the Engine refuses into a ServiceError; also a decorator."""
    from docker.errors import APIError, DockerException
    from requests.exceptions import RequestException

    try:
        yield
    except APIError as error:
        raise ServiceError(f"the Docker Engine refused: {error.explanation or error}", fix="see: docker ps -a, docker events") from None
    except (DockerException, RequestException) as error:
        raise ServiceError(f"lost the Docker Engine: {str(error)[:200]}", fix="check that it runs: docker version") from None


def need_image(engine: DockerClient, image: str) -> None:
    """Make sure that the Engine has an image; pull it when it has not.

    Raises:
        UserError: none is named. ServiceError: it can't be had.
    """
    from docker.errors import APIError, ImageNotFound

    if not image:
        raise UserError("the docker target needs an image", where="--service_image", fix="name it: --service_image medical-qa:dev")
    try:
        engine.images.get(image)
    except ImageNotFound:
        print(f"pulling {image}: it is not on this Engine", flush=True)
        try:
            engine.images.pull(image)
        except APIError as error:
            raise ServiceError(
                f"the service's image is not on this Engine and can't be pulled: {error.explanation or error}",
                where=image,
                fix="build it, or check --service_image",
            ) from None


def own_container(engine: DockerClient) -> Container | None:
    """The container in which this command runs, or None: Docker names a container's host after its id."""
    from docker.errors import NotFound

    hostname = socket.gethostname()
    try:
        return engine.containers.get(hostname) if re.fullmatch(r"[0-9a-f]{12}", hostname) else None
    except NotFound:
        return None


def put_file(container: Container, folder: str, name: str, text: str) -> None:
    """Write a small text file into a container, running or not. The folder must exist."""
    content = text.encode()
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode, entry.mtime = len(content), 0o644, int(time.time())
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.addfile(entry, io.BytesIO(content))
    container.put_archive(folder, buffer.getvalue())


def get_file(container: Container, folder: str, name: str) -> str | None:
    """A small text file from a container, running or not; None when there is none."""
    from docker.errors import NotFound

    try:
        chunks, _ = container.get_archive(f"{folder}/{name}")
    except NotFound:
        return None
    with tarfile.open(fileobj=io.BytesIO(b"".join(chunks))) as archive:
        file = archive.extractfile(name)
        return file.read().decode("utf-8", "replace") if file else None
