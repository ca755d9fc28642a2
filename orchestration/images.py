"""Build the step images on the local Docker Engine, and push them to a registry.

An image is named after its content: the digest of every file that goes into it and of the build arguments. The same content has the
same name on every machine, and another content never has it, so a pipeline that names its images can't run other code than it says.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.common.errors import ServiceError, UserError
from components.common.files import sha256_file, sha256_text
from orchestration.launch import PROJECT, docker_client

DOCKERFILE = "docker/Dockerfile"
BASE_IMAGE = "python:3.11-slim"
REPOSITORIES = {"light": "medical-qa-light", "full": "medical-qa"}
PARAMETERS = {"light": "light_image", "full": "image"}
DIGEST_CHARS = 16
VERSION_LABEL = "org.opencontainers.image.version"
TRANSFER_LINE_EVERY_S = 5.0
COLOUR = re.compile(r"\x1b\[[0-9;]*m")  # the engine marks what a command writes to stderr


@dataclass(frozen=True)
class ImageRef:
    """An image of ours on the local Docker Engine.

    Attributes:
        target: stage of the Dockerfile, "light" or "full".
        name: repository and content digest, such as `medical-qa:3f2a…`.
        id: the engine's own id of the image.
        size_bytes: unpacked, with the base image.
    """

    target: str
    name: str
    id: str
    size_bytes: int


def context_files(context: Path) -> list[str]:
    """The files that are sent to the Docker Engine, as `.dockerignore` says: relative paths, sorted."""
    from docker.utils import exclude_paths

    ignore = context / ".dockerignore"
    lines = ignore.read_text(encoding="utf-8").splitlines() if ignore.exists() else []
    patterns = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    return sorted(path for path in exclude_paths(str(context), patterns, dockerfile=DOCKERFILE) if (context / path).is_file())


def content_digest(build_args: Mapping[str, str], context: Path = PROJECT) -> str:
    """What an image's content follows from, as the first hex characters of a sha256: the build context's files and the arguments."""
    files = "".join(f"{sha256_file(context / path)}  {path}\n" for path in context_files(context))
    arguments = "".join(f"{name}={value}\n" for name, value in sorted(build_args.items()))
    return sha256_text(files + arguments)[:DIGEST_CHARS]


def build_images(
    base_image: str = BASE_IMAGE,
    tag: str = "dev",
    targets: Sequence[str] = ("light", "full"),
    build_args: Mapping[str, str] | None = None,
    context: Path = PROJECT,
) -> list[ImageRef]:
    """Build images and tag each with its content digest and with `tag`; the engine's output is printed as it comes.

    Args:
        base_image: image with Python 3.11 or newer to build on.
        tag: a second, movable tag.
        targets: "light", "full".
        build_args: further arguments of the Dockerfile, such as `TORCH_REQUIREMENT`.
        context: the project's folder.

    Raises:
        UserError: the tag is not one. ServiceError: no Docker Engine, or it can't build.
    """
    if not re.fullmatch(r"\w[\w.-]{0,127}", tag, re.ASCII):
        raise UserError("this can't be an image's tag", where=f"--tag {tag}", fix="use letters, digits, '.', '_' and '-'")
    arguments = {"BASE_IMAGE": base_image, **(build_args or {})}
    digest = content_digest(arguments, context)
    labels = {"VERSION": digest, "REVISION": _revision(context)}
    client = docker_client()
    images = []
    for target in targets:
        repository = REPOSITORIES[target]
        name = f"{repository}:{digest}"
        print(f"building {name} on {base_image}", flush=True)
        started = time.monotonic()
        with _explained(
            "the build", DOCKERFILE, "read the lines above; for another base image or package index see `pipeline.py images build --help`"
        ):
            _follow(
                client.api.build(
                    path=str(context),
                    dockerfile=DOCKERFILE,
                    target=target,
                    tag=name,
                    buildargs=arguments | labels,
                    rm=True,
                    forcerm=True,
                    decode=True,
                )
            )
            image = client.images.get(name)
            image.tag(repository, tag)
        images.append(ImageRef(target, name, image.id, image.attrs["Size"]))
        print(f"built {name}, also {repository}:{tag}: {image.attrs['Size'] / 1e6:.0f} MB, {time.monotonic() - started:.0f} s", flush=True)
    return images


def push_images(repository: str, tag: str = "dev", targets: Sequence[str] = ("light", "full")) -> dict[str, str]:
    """Push images to a registry, each under its content digest.

    Args:
        repository: registry and path, such as `registry.example.com/team`.
        tag: tag of the local images to push.
        targets: "light", "full".

    Returns:
        The pipeline's image parameters: name → image by registry digest. A cluster that runs them can't be given other content later.

    Raises:
        ServiceError: no Docker Engine, an image is not built, or the registry refuses.
    """
    from docker.errors import ImageNotFound

    client = docker_client()
    client.api.timeout = None  # a registry may take minutes to store a layer, and says nothing meanwhile
    parameters = {}
    for target in targets:
        local = f"{REPOSITORIES[target]}:{tag}"
        remote = f"{repository.rstrip('/')}/{REPOSITORIES[target]}"
        try:
            image = client.images.get(local)
        except ImageNotFound:
            raise ServiceError(
                f"the Docker Engine has no image {local}", fix=f"build it: python pipeline.py images build --target {target}"
            ) from None
        version = image.labels.get(VERSION_LABEL, tag)
        print(f"pushing {remote}:{version}", flush=True)
        with _explained("the push", f"{remote}:{version}", "check the repository's name and the network, and log in: docker login"):
            image.tag(remote, version)
            facts = _follow(client.api.push(remote, tag=version, stream=True, decode=True))
        parameters[PARAMETERS[target]] = f"{remote}@{facts['Digest']}"
    return parameters


def _revision(context: Path) -> str:
    """The commit that last changed what goes into the images, so that other commits leave them as they are."""
    paths = ["components", "docker", "LICENSE", ".dockerignore"]
    try:
        commit = subprocess.run(["git", "log", "-1", "--format=%H", "--", *paths], cwd=context, capture_output=True, text=True, check=True)
        changes = subprocess.run(["git", "status", "--porcelain", "--", *paths], cwd=context, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return (commit.stdout.strip() or "unknown") + ("-dirty" if changes.stdout.strip() else "")


@contextmanager
def _explained(doing: str, where: str, fix: str) -> Iterator[None]:
    """Turn what the Docker SDK raises into an error that a user can mend."""
    from docker.errors import APIError, DockerException
    from requests.exceptions import RequestException

    try:
        yield
    except APIError as error:
        raise ServiceError(f"{doing} failed: {error.explanation or error}", where=where, fix=fix) from None
    except (DockerException, RequestException) as error:
        raise ServiceError(f"{doing} failed: {error}", where=where, fix=fix) from None


def _follow(events: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Print what the engine does, as plain lines, and return the facts it reports.

    Raises:
        DockerException: the engine reports an error.
    """
    from docker.errors import DockerException

    facts: dict[str, Any] = {}
    layers: dict[str, tuple[int, int]] = {}
    last_line = time.monotonic()
    for event in events:
        if "error" in event:
            raise DockerException(event["error"].strip())
        facts |= event.get("aux") or {}
        print(COLOUR.sub("", event.get("stream", "")), end="", flush=True)
        transfer = event.get("progressDetail") or {}
        if {"current", "total"} <= transfer.keys():
            layers[event["id"]] = (transfer["current"], transfer["total"])
            if time.monotonic() - last_line > TRANSFER_LINE_EVERY_S:
                last_line = time.monotonic()
                done, total = (sum(sizes) / 1e6 for sizes in zip(*layers.values(), strict=True))
                print(f"  {event['status'].lower()}: {done:.0f} of {total:.0f} MB so far", flush=True)
        elif "status" in event and "id" not in event:
            print(f"  {event['status']}", flush=True)
    return facts


def add_images_command(subparsers: Any) -> None:
    """Add `images build` and `images push` to a command line."""
    images = subparsers.add_parser("images", help="build the step images, or push them to a registry")
    actions = images.add_subparsers(required=True, metavar="ACTION")

    build = actions.add_parser("build", help="build the images on the local Docker Engine")
    build.set_defaults(handler=_build)
    build.add_argument(
        "--base_image", "--base-image", default=BASE_IMAGE, metavar="IMAGE", help=f"image to build on (default: {BASE_IMAGE})"
    )
    build.add_argument(
        "--torch", default="", metavar="REQUIREMENT", help="torch to install, as pip writes it (default: see docker/Dockerfile)"
    )
    build.add_argument(
        "--build_arg",
        "--build-arg",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="argument of docker/Dockerfile, such as PIP_INDEX_URL or TORCH_INDEX_URL; may be given again",
    )
    push = actions.add_parser("push", help="push the images and print the pipeline parameters that name them by digest")
    push.set_defaults(handler=_push)
    push.add_argument("--repository", required=True, metavar="NAME", help="registry and path, such as registry.example.com/team")
    for action in (build, push):
        action.add_argument("--tag", default="dev", help="tag on this machine, beside the content digest (default: dev)")
        action.add_argument("--target", choices=("light", "full", "all"), default="all", help="which image (default: all)")


def _targets(arguments: argparse.Namespace) -> tuple[str, ...]:
    return tuple(REPOSITORIES) if arguments.target == "all" else (arguments.target,)


def _build(arguments: argparse.Namespace) -> int:
    pairs = [text.partition("=") for text in arguments.build_arg]
    for name, equals, _ in pairs:
        if not (name and equals):
            raise UserError("a build argument needs a name and a value", where=f"--build_arg {name}", fix="write --build_arg NAME=VALUE")
    build_args = {name: value for name, _, value in pairs}
    if arguments.torch:
        build_args["TORCH_REQUIREMENT"] = arguments.torch
    build_images(arguments.base_image, arguments.tag, _targets(arguments), build_args)
    return 0


def _push(arguments: argparse.Namespace) -> int:
    parameters = push_images(arguments.repository, arguments.tag, _targets(arguments))
    print("\npipeline parameters (for --set, or a file for --params):")
    for name, image in parameters.items():
        print(f"{name}: {image}")
    return 0
