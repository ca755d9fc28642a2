"""The command line: bad input, an interrupt, and the runs it lists."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from orchestration.record import STEPS, RunRecord
from tests.rows import write_rows

PROJECT = Path(__file__).resolve().parents[2]


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "pipeline.py", *arguments]
    return subprocess.run(line, cwd=PROJECT, capture_output=True, text=True, timeout=120, check=False, env=os.environ | environment)


def assert_user_error(result: subprocess.CompletedProcess[str], *texts: str) -> None:
    assert result.returncode == 2, result.stdout + result.stderr
    for text in texts:
        assert text in result.stderr, result.stderr
    assert "Traceback" not in result.stderr


def test_help_of_every_command() -> None:
    top = command("--help")
    for name in ("compile", "parameters", "run", "rerun", "runs", "show", "stop", "status", "submit", "watch", "images"):
        assert f"  {name}" in top.stdout
        result = command(name, "--help")
        assert result.returncode == 0 and "--help" in result.stdout


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("a: [", "not YAML"),
        ("- 1", "one `name: value` a line"),
        ("epoch: 3", "did you mean epochs"),
        ("validation_fraction: many", "needs a number"),
        ("use_dora: maybe", "true or false"),
        ("epochs: many", "epochs: Input should be a valid number"),
        ("{learning_rate: -1, quantization: int3}", "2 parameter(s) can't be used"),
    ],
)
def test_a_bad_parameter_file(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "params.yaml"
    if content is not None:
        path.write_text(content)
    assert_user_error(command("run", "--params", str(path), "--runs_dir", str(tmp_path / "runs")), message, str(path))
    assert not (tmp_path / "runs").exists()


def test_a_parameter_file_in_another_encoding(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes("base_model: 模型".encode("gb18030"))
    assert_user_error(command("run", "--params", str(path), "--runs_dir", str(tmp_path / "runs")), "not YAML")


def test_missing_data_is_found_before_anything_runs(tmp_path: Path) -> None:
    result = command("run", "--runs_dir", str(tmp_path / "runs"), "--set", "data_path=/no/such.jsonl")
    assert_user_error(result, "data file is missing", "/no/such.jsonl", "--set data_path=")
    assert not (tmp_path / "runs").exists()


def test_docker_not_running(tmp_path: Path) -> None:
    result = command("run", "--runner", "docker", "--runs_dir", str(tmp_path / "runs"), DOCKER_HOST=f"unix://{tmp_path}/none.sock")
    assert_user_error(result, "Docker Engine does not answer", "start Docker")
    assert not (tmp_path / "runs").exists()


def test_no_such_run(tmp_path: Path) -> None:
    for arguments in (("show", "20200101-000000-0000"), ("rerun", "train", "--run", "20200101-000000-0000"), ("show",)):
        assert_user_error(command(*arguments, "--runs_dir", str(tmp_path)), "there is no run")
    assert "no runs in" in command("runs", "--runs_dir", str(tmp_path)).stdout


def test_a_broken_record_is_named(tmp_path: Path) -> None:
    record = RunRecord.start(tmp_path, runner="process", parameters={})
    record.path.write_text("{")
    assert_user_error(command("runs", "--runs_dir", str(tmp_path)), "run record is not JSON", str(record.path))


def test_a_file_in_the_place_of_the_runs_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert_user_error(command("run", "--runs_dir", str(tmp_path / "file" / "runs")), "a file stands where a folder is needed", "file/runs")


def test_compile_writes_one_file(tmp_path: Path) -> None:
    result = command("compile", "--output", str(tmp_path / "new" / "pipeline.yaml"))
    assert result.returncode == 0 and (tmp_path / "new" / "pipeline.yaml").read_text().startswith("# PIPELINE DEFINITION")


def test_parameters_are_listed() -> None:
    lines = command("parameters").stdout.splitlines()
    assert "base_model = 'Qwen/Qwen2.5-7B-Instruct'" in lines and "batch_size = 'auto'" in lines and "use_dora = False" in lines


def test_an_interrupt_stops_the_step_and_is_recorded(tiny_model: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    settings = [
        text for value in (f"base_model={tiny_model}", f"data_path={rows}", "epochs=500", "max_length=256") for text in ("--set", value)
    ]
    process = subprocess.Popen(
        [sys.executable, "pipeline.py", "run", "--runs_dir", str(tmp_path / "runs"), *settings],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("[train] train:"):
            break
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == 130, rest
    record = json.loads(next((tmp_path / "runs").glob("*/run.json")).read_text())
    assert record["state"] == "interrupted" and record["steps"]["train"]["state"] == "interrupted"
    assert all(record["steps"][step]["state"] in ("succeeded", "interrupted", "skipped") for step in STEPS)
    time.sleep(0.5)
    running = subprocess.run(["pgrep", "-f", str(tmp_path)], capture_output=True, text=True, check=False).stdout
    assert not running, f"still running: {running}"
    assert not list((tmp_path / "runs").glob("*/train/adapter"))
