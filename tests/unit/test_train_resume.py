"""A run that was stopped, killed or evicted goes on and ends bit for bit as if nothing had happened (d10)."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow
PROJECT = Path(__file__).resolve().parents[2]
EPOCHS = 4
EVERY_STEP = ["--checkpoint_every_s", "0.001"]
# dropout: a resumed run without the state of the random numbers would end elsewhere
FLAGS = ["--epochs", str(EPOCHS), "--learning_rate", "1e-3", "--batch_size", "1", "--gradient_accumulation_steps", "1"]
FLAGS += ["--lora_r", "4", "--lora_dropout", "0.1", "--precision", "fp32", "--patience", "0"]
STOPPED_AT = 9  # within the second epoch: there is a best adapter from before
KILLED_AT = 16


class Command:
    """`python -m components.train` with a folder for what it writes."""

    def __init__(self, folder: Path, model: Path, rows: Path) -> None:
        self.folder = folder
        paths = {"--adapter": "adapter", "--curves": "curves.html", "--metrics": "metrics.json"}
        flags = [part for flag, name in paths.items() for part in (flag, str(folder / name))]
        self.line = [sys.executable, "-m", "components.train", "--base_model", str(model), "--dataset", str(rows), *flags, *FLAGS]

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are when nothing else is said."""
        return self.folder / "adapter.checkpoints"

    @property
    def weights(self) -> bytes:
        return (self.folder / "adapter" / "adapter_model.safetensors").read_bytes()

    @property
    def info(self) -> dict[str, Any]:
        info: dict[str, Any] = json.loads((self.folder / "adapter" / "train_info.json").read_text(encoding="utf-8"))
        return info

    def run(self, *flags: str, variables: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """Run to the end."""
        environment = os.environ | (variables or {})
        return subprocess.run([*self.line, *flags], cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=300, check=False)

    def run_until(
        self, step: int, signals: Sequence[int], place: Path, *flags: str, variables: dict[str, str] | None = None
    ) -> tuple[int, str]:
        """Run, send the signals once a checkpoint of `step` or later lies in `place`; exit code and all output."""
        environment = os.environ | (variables or {})
        line = [*self.line, *EVERY_STEP, *flags]
        with subprocess.Popen(line, cwd=PROJECT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            while newest(place) < step and process.poll() is None:
                time.sleep(0.01)
            for number in signals:
                process.send_signal(number)
            output, _ = process.communicate(timeout=300)
        return process.returncode, output


def newest(place: Path) -> int:
    """The step of the newest checkpoint in a folder, 0 without one."""
    return max((int(path.stem.removeprefix("step-")) for path in place.rglob("step-*.json")), default=0)


def losses_of(info: dict[str, Any]) -> dict[str, Any]:
    """What a run's ledger says about the result, without times."""
    metrics = {name: value for name, value in info["metrics"].items() if "loss" in name}
    return {name: info[name] for name in ("evaluations", "steps", "best_step", "tokens", "trainable_tokens")} | metrics


@pytest.fixture(scope="module")
def rows_file(tiny_rows: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in tiny_rows[1::3]), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, rows_file: Path) -> Command:
    """A run that nothing disturbed, without any checkpoint."""
    command = Command(tmp_path_factory.mktemp("unbroken"), tiny_model, rows_file)
    result = command.run("--checkpoint_uri", "none")
    assert result.returncode == 0, result.stderr
    assert command.info["steps"] > KILLED_AT + 5, "too short a run to interrupt it twice"
    assert command.info["best_step"] > KILLED_AT, "the kept weights depend on what came after the interruptions"
    assert not command.checkpoints.exists()
    return command


@pytest.fixture
def command(tmp_path: Path, tiny_model: Path, rows_file: Path) -> Command:
    return Command(tmp_path, tiny_model, rows_file)


def test_d10_stopped_then_killed_then_resumed_equals_unbroken(command: Command, unbroken: Command) -> None:
    """SIGTERM saves and exits with 143; SIGKILL loses at most what came after the last checkpoint; then the run ends as it should."""
    code, output = command.run_until(STOPPED_AT, [signal.SIGTERM], command.checkpoints)
    assert code == 143, output
    stopped = re.search(r"^stopped after step (\d+); run the same command again to go on$", output, re.MULTILINE)
    assert stopped and "Traceback" not in output
    assert newest(command.checkpoints) == int(stopped[1]) >= STOPPED_AT, "the signal saved the step it stopped after"
    assert not (command.folder / "adapter").exists(), "half an adapter is none"

    code, output = command.run_until(KILLED_AT, [signal.SIGKILL], command.checkpoints)
    assert code == -signal.SIGKILL
    assert f"resumed after step {stopped[1]}" in output
    killed = newest(command.checkpoints)
    assert KILLED_AT <= killed < unbroken.info["steps"], "killed while it trained"
    assert not (command.folder / "adapter").exists()

    result = command.run()
    assert result.returncode == 0, result.stderr
    assert command.info["resumed_from"] == [int(stopped[1]), killed]
    assert command.weights == unbroken.weights
    assert losses_of(command.info) == losses_of(unbroken.info)
    assert not command.checkpoints.exists(), "success leaves no checkpoint"
    assert unbroken.info["resumed_from"] == []


def test_d10_resumed_from_object_storage_in_another_place(
    command: Command, unbroken: Command, tmp_path: Path, s3_server: tuple[Path, dict[str, str]]
) -> None:
    """A pod was evicted: the next one has nothing but the bucket, and other paths."""
    bucket, variables = s3_server
    place = ["--checkpoint_uri", f"s3://bucket/{tmp_path.name}"]
    code, output = command.run_until(STOPPED_AT, [signal.SIGTERM], bucket / tmp_path.name, *place, variables=variables)
    assert code == 143, output
    elsewhere = Command(
        tmp_path / "elsewhere", *(Path(command.line[command.line.index(flag) + 1]) for flag in ("--base_model", "--dataset"))
    )
    result = elsewhere.run(*place, variables=variables)
    assert result.returncode == 0, result.stderr
    assert "resumed after step" in result.stdout
    assert elsewhere.weights == unbroken.weights
    assert losses_of(elsewhere.info) == losses_of(unbroken.info)
    assert not [path for path in (bucket / tmp_path.name).rglob("*") if path.is_file()]


def test_d10_other_settings_take_nothing_and_a_rerun_after_success_starts_anew(command: Command, unbroken: Command) -> None:
    code, output = command.run_until(STOPPED_AT, [signal.SIGKILL], command.checkpoints)
    assert code == -signal.SIGKILL, output
    left = {path: path.read_bytes() for path in command.checkpoints.rglob("step-*")}
    for _ in range(2):
        other = command.run("--learning_rate", "8e-4")
        assert other.returncode == 0, other.stderr
        assert "resumed" not in other.stdout and command.info["resumed_from"] == []
        assert command.weights != unbroken.weights
        assert {path: path.read_bytes() for path in command.checkpoints.rglob("step-*")} == left, "another run's checkpoints are not ours"


def test_storage_that_is_down_at_the_start_is_refused(command: Command) -> None:
    down = {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_REGION": "us-east-1"}
    result = command.run("--checkpoint_uri", "s3://bucket/x", variables=down)
    assert result.returncode == 2, result.stderr
    assert "object storage refused" in result.stderr and "s3://bucket/x" in result.stderr and "AWS_ENDPOINT_URL" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (command.folder / "adapter").exists()
