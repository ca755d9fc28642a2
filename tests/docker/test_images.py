"""The images that `pipeline.py images build` made, as containers; and building and pushing, with images of a few kilobytes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from components.common.errors import ServiceError
from components.common.files import sha256_file
from orchestration.images import REPOSITORIES, VERSION_LABEL, ImageRef, build_images, content_digest, push_images
from orchestration.launch import docker_client
from tests.docker.small_registry import small_registry

pytestmark = pytest.mark.docker

PROJECT = Path(__file__).resolve().parents[2]
IMAGES = {target: f"{repository}:dev" for target, repository in REPOSITORIES.items()}
STEPS = {
    "light": ("prepare", "deploy", "report"),
    "full": ("prepare", "train", "merge", "evaluate", "deploy", "report", "serve"),
}
ANYONE = "54321:0"
LIGHT_LAYERS_MB, FULL_LAYERS_MB = 300, 8000  # measured: 225 MB; 1,556 MB with torch for CPUs, 5,665 MB with CUDA
HARDENED: dict[str, Any] = {
    "read_only": True,
    "tmpfs": {"/tmp": "size=256m,mode=1777"},
    "network_mode": "none",
    "cap_drop": ["ALL"],
    "security_opt": ["no-new-privileges:true"],
}
both_images = pytest.mark.parametrize("target", IMAGES)


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    client = docker_client()
    yield client
    client.close()


def run(engine: Any, target: str, *command: str, **options: Any) -> str:
    """What a command prints in a container; anything but exit code 0 raises with its standard error."""
    return engine.containers.run(IMAGES[target], list(command), remove=True, **options).decode("utf-8")


def distributions(target: str) -> dict[str, str]:
    """The packages that the lock promises, as PyPI normalises names."""
    text = (PROJECT / "docker" / f"requirements-{target}.txt").read_text(encoding="utf-8")
    return dict(re.findall(r"^([a-z0-9._-]+)==(\S+)", text, flags=re.MULTILINE))


# the images as they are


@both_images
def test_configuration(engine: Any, target: str) -> None:
    """Kubernetes and Docker treat ENTRYPOINT differently, and a pod that must not be root needs a numeric user."""
    config = engine.images.get(IMAGES[target]).attrs["Config"]
    assert config["Entrypoint"] is None
    assert config["User"] == "10001:0"
    assert config["Labels"]["org.opencontainers.image.title"] == REPOSITORIES[target]
    assert re.fullmatch("[0-9a-f]{16}", config["Labels"][VERSION_LABEL])
    assert config["Labels"]["org.opencontainers.image.revision"]
    assert {"OMP_WAIT_POLICY=passive", "HF_HUB_DISABLE_TELEMETRY=1", "PYTHONUNBUFFERED=1", "HOME=/tmp"} <= set(config["Env"])
    assert f"{REPOSITORIES[target]}: python -m components.STEP --help" in engine.containers.run(IMAGES[target], remove=True).decode()


@both_images
@pytest.mark.parametrize("user", ["10001:0", ANYONE, "54321:54321"])
def test_every_step_starts_as_any_user_on_a_read_only_disk(engine: Any, target: str, user: str) -> None:
    helps = " && ".join(f"python -m components.{step} --help" for step in STEPS[target])
    printed = run(engine, target, "sh", "-c", helps, user=user, **HARDENED)
    for step in STEPS[target]:
        assert f"usage: python -m components.{step}" in printed


@both_images
def test_a_step_does_its_work_as_any_user_on_a_read_only_disk(engine: Any, target: str) -> None:
    data = {str(PROJECT / "data"): {"bind": "/data", "mode": "ro"}}
    work = "python -m components.prepare --data_path /data/medical_qa_data.jsonl >/dev/null && cat /tmp/prepare_metrics.json"
    printed = run(engine, target, "sh", "-c", work, user=ANYONE, volumes=data, **HARDENED)
    assert json.loads(printed)["rows_kept"] == len((PROJECT / "data" / "medical_qa_data.jsonl").read_text(encoding="utf-8").splitlines())


@both_images
def test_a_user_without_a_passwd_entry_has_a_home_and_a_name(engine: Any, target: str) -> None:
    """torch and tensorboard ask for both."""
    code = "import getpass, pathlib; home = pathlib.Path.home(); (home / '.cache').mkdir(); print(getpass.getuser(), home)"
    assert run(engine, target, "python", "-c", code, user=ANYONE, **HARDENED) == "medical-qa /tmp\n"


@both_images
def test_nothing_of_the_image_can_be_written(engine: Any, target: str) -> None:
    printed = run(
        engine, target, "sh", "-c", "find /app /opt/venv ! -type l \\( -perm -o+w -o -perm -g+w \\); find /app ! -perm -o+r", user="0:0"
    )
    assert printed == ""
    attempt = "touch /app/x /app/components/x /opt/venv/x 2>&1 || true"
    assert run(engine, target, "sh", "-c", attempt, user=ANYONE).count("Permission denied") == 3


@both_images
def test_nothing_becomes_root(engine: Any, target: str) -> None:
    assert run(engine, target, "find", "/", "-xdev", "-type", "f", "-perm", "/6000", user="0:0") == ""


@both_images
def test_nothing_of_the_build_is_left(engine: Any, target: str) -> None:
    look = (
        "for tool in gcc cc g++ c++ make ld git; do command -v $tool; done;"
        "ls -A /tmp /root/.cache /var/lib/apt/lists /var/cache/apt/archives 2>/dev/null | grep -v -e '^$' -e ':$' -e partial -e lock;"
        "find /opt/venv -name 'pip' -o -name '*.whl' -o -name 'requirements*.txt';"
        "find /app -mindepth 1 -maxdepth 1; find /app -name tests -o -name '*.md'"
    )
    printed = run(engine, target, "sh", "-c", look, user="0:0")
    assert set(printed.split()) == {"/app/LICENSE", "/app/components"}


@both_images
def test_the_code_is_that_of_this_working_copy(engine: Any, target: str) -> None:
    """An image of yesterday makes every other test here say something about yesterday."""
    printed = run(engine, target, "sh", "-c", "cd /app && find components -name '*.py' -exec sha256sum {} +")
    code = [(sha256_file(path), path.relative_to(PROJECT).as_posix()) for path in (PROJECT / "components").rglob("*.py")]
    assert sorted(printed.splitlines()) == sorted(f"{digest}  {name}" for digest, name in code), "build the images again"


# what is installed

INSTALLED = """
import importlib.metadata, json, re
print(json.dumps({re.sub(r"[-_.]+", "-", d.name).lower(): d.version for d in importlib.metadata.distributions()}))
"""

# Every top-level module of every package in the lock.
IMPORT_ALL = """
import importlib, importlib.metadata, json, re, sys
wanted, failed = set(json.loads(sys.argv[1])), {}
for module, names in importlib.metadata.packages_distributions().items():
    if module.isidentifier() and not module.startswith("_") and wanted & {re.sub(r"[-_.]+", "-", name).lower() for name in names}:
        try:
            importlib.import_module(module)
        except BaseException as error:
            failed[module] = repr(error)
print(json.dumps(failed))
"""


def installed(engine: Any, target: str) -> dict[str, str]:
    return json.loads(run(engine, target, "python", "-c", INSTALLED))


def test_light_holds_exactly_its_lock(engine: Any) -> None:
    assert installed(engine, "light") == distributions("light")


def test_full_holds_its_lock_and_torch(engine: Any) -> None:
    found = installed(engine, "full")
    assert {name: found.get(name) for name in distributions("full")} == distributions("full")
    others = found.keys() - distributions("full").keys()
    assert "torch" in others
    assert {name for name in others if not name.startswith(("torch", "triton", "nvidia", "cuda"))} == set()


@both_images
def test_no_kfp_in_a_step_image(engine: Any, target: str) -> None:
    """It pins requests and urllib3, and would hold back their security updates."""
    assert not [name for name in installed(engine, target) if name.startswith("kfp")]


@both_images
def test_everything_installed_can_be_imported(engine: Any, target: str) -> None:
    names = json.dumps([*distributions(target), *(["torch"] if target == "full" else [])])
    printed = run(engine, target, "python", "-W", "ignore", "-c", IMPORT_ALL, names, user=ANYONE, **HARDENED)
    assert json.loads(printed.splitlines()[-1]) == {}


@both_images
def test_versions_fit_together(engine: Any, target: str) -> None:
    """The base image's own pip looks into the environment that has none."""
    check = "PATH=/usr/local/bin:/usr/bin:/bin python3 -m pip --python /opt/venv/bin/python check"
    assert "No broken requirements found." in run(engine, target, "sh", "-c", check, user=ANYONE, environment={"PYTHONPATH": ""})


def test_four_bit_layers_work_without_a_gpu(engine: Any) -> None:
    """bitsandbytes looks for an OpenMP library that a slim base doesn't have: torch brings it."""
    code = (
        "import torch, bitsandbytes as b; layer = b.nn.Linear4bit(64, 64, quant_type='nf4', compute_dtype=torch.bfloat16).to('cpu');"
        "print(tuple(layer(torch.randn(2, 64, dtype=torch.bfloat16)).shape))"
    )
    assert run(engine, "full", "python", "-c", code, user=ANYONE, **HARDENED).splitlines()[-1] == "(2, 64)"


@both_images
def test_size(engine: Any, target: str, record_property: Any) -> None:
    """What a node pulls beside the base image."""
    layers = engine.images.get(IMAGES[target]).history()
    own_mb = sum(layer["Size"] for layer in layers if "COPY" in layer["CreatedBy"]) / 1e6
    total_mb = engine.images.get(IMAGES[target]).attrs["Size"] / 1e6
    record_property("own_layers_mb", round(own_mb))
    record_property("total_mb", round(total_mb))
    print(f"{IMAGES[target]}: {own_mb:.0f} MB of its own, {total_mb:.0f} MB with its base")
    assert own_mb < (LIGHT_LAYERS_MB if target == "light" else FULL_LAYERS_MB)


# building and pushing


SMALL_DOCKERFILE = """
ARG BASE_IMAGE=scratch
FROM ${BASE_IMAGE} AS light
COPY LICENSE /light
ARG VERSION=dev
ARG REVISION=unknown
LABEL org.opencontainers.image.version="${VERSION}" org.opencontainers.image.revision="${REVISION}"
FROM ${BASE_IMAGE} AS full
COPY LICENSE /full
ARG VERSION=dev
ARG REVISION=unknown
LABEL org.opencontainers.image.version="${VERSION}" org.opencontainers.image.revision="${REVISION}"
"""


@pytest.fixture
def small_project(tmp_path: Path) -> Path:
    (tmp_path / "docker").mkdir()
    (tmp_path / "docker" / "Dockerfile").write_text(SMALL_DOCKERFILE, encoding="utf-8")
    (tmp_path / "LICENSE").write_text(f"licence of {tmp_path}", encoding="utf-8")
    shutil.copy(PROJECT / ".dockerignore", tmp_path)
    return tmp_path


@pytest.fixture
def small_images(engine: Any, small_project: Path) -> Iterator[list[ImageRef]]:
    refs = build_images("scratch", "small-test", context=small_project)
    yield refs
    for ref in refs:
        engine.images.remove(ref.id, force=True)


def test_build_names_images_by_their_content(engine: Any, small_project: Path, small_images: list[ImageRef], capsys: Any) -> None:
    digest = content_digest({"BASE_IMAGE": "scratch"}, small_project)
    assert [(ref.target, ref.name) for ref in small_images] == [(target, f"{name}:{digest}") for target, name in REPOSITORIES.items()]
    for ref in small_images:
        image = engine.images.get(ref.name)
        assert image.id == ref.id == engine.images.get(f"{REPOSITORIES[ref.target]}:small-test").id
        assert image.labels[VERSION_LABEL] == digest
        assert 0 < ref.size_bytes < 1000
    assert build_images("scratch", "small-test", ["light"], context=small_project) == small_images[:1]
    assert "Step 1/" in capsys.readouterr().out


def test_build_says_what_the_base_image_lacks(small_project: Path) -> None:
    with pytest.raises(ServiceError) as caught:
        build_images("no-such-registry.invalid/python:3.11", "small-test", context=small_project)
    assert "the build failed" in caught.value.what and "no-such-registry.invalid" in caught.value.what
    assert "--help" in caught.value.fix


def test_a_build_that_fails_exits_with_2_and_no_traceback() -> None:
    command = [sys.executable, "pipeline.py", "images", "build", "--base_image", "no-such-registry.invalid/python:3.11"]
    result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("error: the build failed") and "Traceback" not in result.stderr


def test_push_returns_the_digests_that_the_registry_has(small_images: list[ImageRef]) -> None:
    with small_registry() as registry:
        parameters = push_images(f"{registry.address}/team/", "small-test")
        assert set(parameters) == {"image", "light_image"}
        for ref, name in zip(small_images, ("light_image", "image"), strict=True):
            repository, _, digest = parameters[name].partition("@")
            assert repository == f"{registry.address}/team/{REPOSITORIES[ref.target]}"
            version = ref.name.rpartition(":")[2]
            assert registry.tags[f"team/{REPOSITORIES[ref.target]}:{version}"] == digest
            manifest = json.loads(registry.blobs[digest])
            assert manifest["config"]["digest"] == ref.id
            assert all(layer["digest"] in registry.blobs for layer in manifest["layers"])


def test_push_again_moves_nothing(small_images: list[ImageRef]) -> None:
    with small_registry() as registry:
        first = push_images(registry.address, "small-test")
        before = dict(registry.blobs)
        assert push_images(registry.address, "small-test") == first
        assert registry.blobs == before and not registry.uploads


def test_push_of_what_is_not_built() -> None:
    with pytest.raises(ServiceError) as caught:
        push_images("127.0.0.1:1", "never-built")
    assert "medical-qa-light:never-built" in caught.value.what and "images build" in caught.value.fix


@pytest.mark.usefixtures("small_images")
def test_push_to_a_registry_that_refuses_or_is_not_there() -> None:
    with small_registry(denies=True) as registry, pytest.raises(ServiceError) as denied:
        push_images(registry.address, "small-test")
    assert "denied" in denied.value.what and registry.address in denied.value.where and "docker login" in denied.value.fix
    with pytest.raises(ServiceError) as absent:
        push_images(registry.address, "small-test")
    assert "the push failed" in absent.value.what
