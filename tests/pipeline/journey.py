"""The whole pipeline as a user runs it, with the same assertions in process and in docker mode."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

from tests.rows import write_rows

PROJECT = Path(__file__).resolve().parents[2]
TINY = {
    "epochs": "6",
    "learning_rate": "5e-3",
    "batch_size": "4",
    "gradient_accumulation_steps": "1",
    "max_length": "256",
    "lora_r": "8",
    "lora_alpha": "16",
    "max_new_tokens": "48",
    "precision": "fp32",
    "bertscore_model": "none",
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Journey:
    """Commands of `pipeline.py` in a folder of runs of its own."""

    def __init__(self, folder: Path, base_model: Path, runner: str, images: dict[str, str]) -> None:
        self.runs_dir, self.runner, self.port = folder / "runs", runner, free_port()
        self.service_name = f"journey-{self.port}"
        self.parameters = (
            TINY
            | images
            | {
                "data_path": str(write_rows(folder / "rows.jsonl")),
                "base_model": str(base_model),
                "service_port": str(self.port),
                "service_name": self.service_name,
            }
        )

    def command(self, *arguments: str, timeout_s: float = 900) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "pipeline.py", *arguments, "--runs_dir", str(self.runs_dir)]
        environment = os.environ | {"COLUMNS": "200"}
        return subprocess.run(
            line, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout_s, check=False, env=environment
        )

    def run(self, **changes: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
        """One run; its output and its record."""
        settings = [text for name, value in (self.parameters | changes).items() for text in ("--set", f"{name}={value}")]
        result = self.command("run", "--runner", self.runner, *settings)
        return result, self.newest()

    def newest(self) -> dict[str, Any]:
        path = sorted(self.runs_dir.glob("*/run.json"))[-1]
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return record

    def folder(self, record: dict[str, Any]) -> Path:
        return self.runs_dir / str(record["id"])

    def get(self, path: str) -> dict[str, Any]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=30) as response:
            value: dict[str, Any] = json.loads(response.read())
        return value

    def ask(self, question: str) -> dict[str, Any]:
        body = json.dumps({"question": question, "max_length": 48}).encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/ask", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            value: dict[str, Any] = json.loads(response.read())
        return value


def states(record: dict[str, Any]) -> dict[str, str]:
    return {name: facts["state"] for name, facts in record["steps"].items()}


def outputs(record: dict[str, Any], step: str) -> dict[str, Any]:
    value: dict[str, Any] = record["steps"][step]["outputs"]
    return value


def check_journey(journey: Journey) -> None:
    """From nothing to an answer; again from the cache; a broken training is held; one step alone; stop."""
    first = check_first_run(journey)
    check_second_run(journey, first)
    check_gate_holds(journey, first)
    check_rerun(journey, first)
    check_failure_is_reported(journey)
    assert journey.command("stop").returncode == 0


def check_first_run(journey: Journey) -> dict[str, Any]:
    result, record = journey.run()
    assert result.returncode == 0, result.stdout[-6000:]
    assert record["state"] == "succeeded" and set(states(record).values()) == {"succeeded"}, result.stdout[-6000:]
    assert outputs(record, "evaluate")["parameters"]["decision"] == "promote"
    digest = outputs(record, "merge")["parameters"]["model_uri"].rsplit("/", 1)[1]
    answer = journey.ask("肺部感染怎么办？")
    assert answer["model_digest"] == digest and len(answer["answer"]) > 5 and answer["disclaimer"]
    results = json.loads(Path(outputs(record, "evaluate")["artifacts"]["results"]["uri"]).read_text(encoding="utf-8"))
    shown = outputs(record, "evaluate")["artifacts"]["metrics"]["metadata"]
    assert results["decision"] == "promote" and results["reasons"]
    assert shown["tuned_nll"] < shown["base_nll"], "d36: what the UI shows is the metrics artifact's metadata"
    page = (journey.folder(record) / "index.html").read_text(encoding="utf-8")
    for text in ("<svg", "promote", "polyline", record["id"], results["rows"][0]["question"], "logs/train.log", "http"):
        assert text in page, text
    assert "curl" in result.stdout and "stop" in result.stdout and "index.html" in result.stdout
    assert "left" in (journey.folder(record) / "logs" / "train.log").read_text(encoding="utf-8") or record["steps"]["train"]["seconds"] < 15
    return record


def check_second_run(journey: Journey, first: dict[str, Any]) -> None:
    """Nothing changed: every step from the cache, the log says why, the same model goes on serving."""
    started = time.monotonic()
    result, record = journey.run()
    seconds = time.monotonic() - started
    assert result.returncode == 0, result.stdout[-6000:]
    for step in ("prepare", "train", "merge", "evaluate"):
        assert states(record)[step] == "cached", result.stdout[-6000:]
        assert f"[{step}] taken from the cache: same code, settings and inputs as in run {first['id']}" in result.stdout
    assert "already" in result.stdout and states(record)["deploy"] == "succeeded"
    assert journey.ask("胃部出血怎么办？")["answer"]
    assert seconds < 60, f"{seconds:.0f} s"


def check_gate_holds(journey: Journey, first: dict[str, Any]) -> None:
    """d39: a model that training broke is not deployed; the run is green; the former service keeps serving."""
    result, record = journey.run(learning_rate="10")
    assert result.returncode == 0, result.stdout[-6000:]
    assert record["state"] == "succeeded"
    assert "learning_rate 5e-3 → 10" in result.stdout, "the log says why train runs again"
    assert states(record)["prepare"] == "cached" and states(record)["train"] == "succeeded"
    assert outputs(record, "evaluate")["parameters"]["decision"] == "hold"
    assert states(record)["deploy"] == "skipped"
    served = journey.get("/health")["model_digest"]
    assert served == outputs(first, "merge")["parameters"]["model_uri"].rsplit("/", 1)[1]
    page = (journey.folder(record) / "index.html").read_text(encoding="utf-8")
    assert "held" in page
    refused = journey.command("rerun", "deploy")
    assert refused.returncode == 2 and "the gate held" in refused.stdout


def check_rerun(journey: Journey, first: dict[str, Any]) -> None:
    """One step alone, on a past run's artifacts, with one setting changed."""
    result = journey.command("rerun", "evaluate", "--run", first["id"], "--set", "max_new_tokens=16")
    record = journey.newest()
    assert result.returncode == 0, result.stdout[-6000:]
    assert record["parent"] == first["id"] and record["parameters"]["max_new_tokens"] == 16
    assert states(record)["evaluate"] == "succeeded" and states(record)["train"] == "cached" and states(record)["deploy"] == "skipped"
    assert record["steps"]["evaluate"]["inputs"]["parameters"]["model_uri"] == outputs(first, "merge")["parameters"]["model_uri"]
    listed = journey.command("runs").stdout
    assert first["id"] in listed and f"rerun of {first['id']}" in listed
    shown = journey.command("show", first["id"]).stdout
    assert "evaluate.decision = promote" in shown


def check_failure_is_reported(journey: Journey) -> None:
    """A step that fails: exit 1, the reason in one line, the page written, nothing downstream runs."""
    result, record = journey.run(max_length="16")
    assert result.returncode == 1
    assert record["state"] == "failed" and states(record)["train"] == "failed"
    assert states(record)["merge"] == "skipped" and states(record)["report"] == "succeeded"
    assert record["steps"]["train"]["exit_code"] == 2 and "Traceback" not in record["steps"]["train"]["reason"]
    page = (journey.folder(record) / "index.html").read_text(encoding="utf-8")
    assert "failed" in page and record["steps"]["train"]["reason"][:30] in page
