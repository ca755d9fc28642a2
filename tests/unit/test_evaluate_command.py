"""The real command: what it writes, what it decides, and what it says about inputs that it can't use."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pad_sequence

from components.common.errors import run_command
from components.common.storage import MANIFEST, Manifest
from components.evaluate.__main__ import main
from tests.conftest import PROJECT

MAX_NEW_TOKENS = "96"


def store(folder: Path) -> Path:
    """Give a model folder its manifest."""
    (folder / MANIFEST).write_text(json.dumps(Manifest.of_folder(folder).to_json()))
    return folder


@pytest.fixture(scope="module")
def short_rows(tiny_rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Six rows that the tiny base was not trained on, each with the first sentence of its answer."""
    return [{"question": row["question"], "answer": row["answer"].split("。")[0] + "。"} for row in tiny_rows[1:12:2]]


@pytest.fixture(scope="module")
def models(tiny_model: Path, short_rows: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny "base", and the same fine-tuned on the rows that the tests evaluate; both as the merge step leaves a model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from components.common.chat import ChatFormat

    root = tmp_path_factory.mktemp("models")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    chat = ChatFormat.of_tokenizer(tokenizer)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    examples = [chat.example(tokenizer, row["question"], row["answer"]) for row in short_rows]
    ids = pad_sequence([torch.tensor(ids) for ids, _ in examples], batch_first=True)
    labels = torch.where(pad_sequence([torch.tensor(mask) for _, mask in examples], batch_first=True), ids, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(80):
        model(input_ids=ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(root / "tuned")
    tokenizer.save_pretrained(root / "tuned")
    shutil.copytree(tiny_model, root / "base")
    for name in ("tuned", "base"):
        chat.save(root / name)
        store(root / name)
    return {"tuned": root / "tuned", "base": root / "base"}


@pytest.fixture(scope="module")
def data(short_rows: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "held_out.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in short_rows), encoding="utf-8")
    return path


@dataclass
class Run:
    folder: Path
    code: int
    stdout: str
    stderr: str

    @property
    def results(self) -> dict[str, Any]:
        return dict(json.loads((self.folder / "results.json").read_text(encoding="utf-8")))


def arguments(folder: Path, **flags: object) -> list[str]:
    outputs = {"results": folder / "results.json", "report": folder / "report.html", "metrics": folder / "metrics.json"}
    given = {"max_new_tokens": MAX_NEW_TOKENS} | outputs | flags
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


def start(args: list[str], cwd: Path = PROJECT) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(PROJECT), "HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "passive"}
    command = [sys.executable, "-m", "components.evaluate", *args]
    return subprocess.Popen(command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def evaluate(folder: Path, **flags: object) -> Run:
    process = start(arguments(folder, **flags))
    stdout, stderr = process.communicate(timeout=240)
    return Run(folder, process.returncode, stdout, stderr)


@pytest.fixture(scope="module")
def exam(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [{"question": f"{part}痛怎么办？", "options": {"A": "休息", "B": "跑步", "C": "熬夜"}, "answer": "A"} for part in "头牙腰腹"]
    path = tmp_path_factory.mktemp("exam") / "exam.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def better_flags(models: dict[str, Path], data: Path, exam: Path) -> dict[str, object]:
    # The tiny models have never seen a letter alone as an answer: the exam is no part of what makes one better.
    flags = {"model_uri": models["tuned"], "base_model": models["base"], "dataset": data, "exam_path": exam, "exam_permutations": 2}
    return flags | {"tolerance": 0.9}


@pytest.fixture(scope="module")
def better(better_flags: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> Run:
    return evaluate(tmp_path_factory.mktemp("better"), **better_flags)


def test_a_better_model_is_promoted(better: Run, models: dict[str, Path]) -> None:
    assert better.code == 0, better.stderr
    results = better.results
    assert results["decision"] == "promote", results["reasons"]
    assert results["schema_version"] == 2
    assert results["model"]["digest"] == Manifest.of_folder(models["tuned"]).digest
    assert results["base"]["digest"] == Manifest.of_folder(models["base"]).digest
    assert len(results["rows"]) == results["data"]["used"] == results["data"]["available"] == 6
    assert results["metrics"]["nll"]["difference"]["high"] < 0
    assert results["metrics"]["rouge_l"]["tuned"] > 90 and results["metrics"]["never_stopped"]["tuned"] == 0
    row = results["rows"][0]
    assert row["line"] == 1 and row["question"] and row["reference"]
    assert set(row["tuned"]["scores"]) == set(row["base"]["scores"]) == set(results["metrics"])
    assert "decision: promote" in better.stdout


def test_d25_no_difference_without_its_interval(better: Run) -> None:
    scored = {name: metric for name, metric in better.results["metrics"].items() if metric["rows"]}
    for name, metric in scored.items():
        low, mean, high = (metric["difference"][end] for end in ("low", "mean", "high"))
        assert low <= mean + 1e-6 and mean <= high + 1e-6, name
    numbers = json.loads((better.folder / "metrics.json").read_text())
    differences = {name for name in numbers if name.startswith("difference_") and "exam" not in name}
    assert differences == {f"difference_{name}_{end}" for name in scored for end in ("mean", "low", "high")}
    (line,) = [line for line in better.stdout.splitlines() if line.startswith("rouge_l")]
    assert line.count("[") == line.count("]") == 1


def test_d19_every_report_has_the_loop_and_the_no_end_rate(better: Run) -> None:
    assert {"repeated_4grams", "degenerate", "never_stopped"} <= set(better.results["metrics"])
    report = (better.folder / "report.html").read_text(encoding="utf-8")
    assert "Share of answers that never stop" in report and "不会停止的答案比例" in report


def test_both_models_sit_the_exam(better: Run) -> None:
    exam = better.results["exam"]
    assert exam["available"] == exam["tuned"]["questions"] == exam["base"]["questions"] == 4
    assert exam["tuned"]["prompts"] == 8 and len(exam["questions"]["base"]) == 4
    assert {"low", "mean", "high"} <= set(exam["comparison"]["generated"]["difference"])
    rules = [reason["rule"] for reason in better.results["reasons"]]
    assert "exam_not_worse_likelihood" in rules and "exam_not_worse_generated" in rules
    assert "exam accuracy, likelihood" in better.stdout
    assert better.results["timings"]["tuned"]["exam_s"] > 0


def test_d20_two_runs_are_equal_byte_for_byte(better: Run, better_flags: dict[str, object], tmp_path: Path) -> None:
    again = evaluate(tmp_path, **better_flags)
    once, twice = ({name: value for name, value in run.results.items() if name != "timings"} for run in (better, again))
    assert json.dumps(once, ensure_ascii=False) == json.dumps(twice, ensure_ascii=False)
    assert (tmp_path / "metrics.json").read_bytes() == (better.folder / "metrics.json").read_bytes()


def test_d39_a_worse_model_is_held_and_the_run_is_green(models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    """Started as KFP starts it: the executor output says hold, and the metadata of `metrics` is what the report says (d36)."""
    names = ("results", "report", "metrics")
    message = {
        "inputs": {
            "parameterValues": {
                "model_uri": models["base"].as_uri(),  # the base, compared with what it could have become
                "base_model": str(models["tuned"]),
                "sample_size": 4.0,
                "max_new_tokens": 8.0,
                "bertscore_model": "none",
                "tolerance": 0.02,
                "seed": 42.0,
            },
            "artifacts": {"dataset": {"artifacts": [{"name": "dataset", "uri": str(data)}]}},
        },
        "outputs": {
            "artifacts": {name: {"artifacts": [{"name": name, "uri": str(tmp_path / "out" / name), "metadata": {}}]} for name in names},
            "parameters": {"decision": {"outputFile": str(tmp_path / "decision")}},
            "outputFile": str(tmp_path / "output.json"),
        },
    }
    process = start(["--executor_input", json.dumps(message)])
    _, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr
    output = json.loads((tmp_path / "output.json").read_text())
    results = json.loads((tmp_path / "out" / "results").read_text())
    assert output["parameterValues"] == {"decision": "hold"} == {"decision": results["decision"]}
    assert results["data"]["used"] == 4
    assert results["bertscore"] is None and "bertscore" not in results["metrics"]
    shown = output["artifacts"]["metrics"]["artifacts"][0]["metadata"]
    assert shown == json.loads((tmp_path / "out" / "metrics").read_text())
    assert shown["tuned_nll"] == results["metrics"]["nll"]["tuned"] > shown["base_nll"]
    facts = output["artifacts"]["results"]["artifacts"][0]["metadata"]
    assert facts["decision"] == "hold" and facts["model_digest"] == results["model"]["digest"]
    assert "its upper end must be below 0" in (tmp_path / "out" / "report").read_text(encoding="utf-8")


def test_the_original_command_works_without_a_base(models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    shutil.copytree(models["tuned"], tmp_path / "qwen-medical-qa-merged")
    (tmp_path / "data").mkdir()
    shutil.copy(data, tmp_path / "data" / "medical_qa_data.jsonl")
    command = (
        "--model_path ./qwen-medical-qa-merged --data_path data/medical_qa_data.jsonl --output_path evaluation_results.json --sample_size 3"
    )
    process = start([*command.split(), "--max_new_tokens", "8"], cwd=tmp_path)
    stdout, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr
    results = json.loads((tmp_path / "evaluation_results.json").read_text(encoding="utf-8"))
    assert results["decision"] == "hold" and results["base"] is None
    assert [reason["rule"] for reason in results["reasons"] if not reason["passed"]] == ["base_given"]
    assert all(metric["base"] is None and metric["difference"] is None for metric in results["metrics"].values())
    assert results["bertscore"]["encoder"] == "tuned model"
    assert "--base_model" in stdout


def refused(run: Run, *words: str) -> None:
    """Exit code 2, what/where/fix, no traceback, nothing half-written."""
    assert run.code == 2, run.stderr
    assert "Traceback" not in run.stderr
    for word in ("error:", "where:", "fix:", *words):
        assert word in run.stderr, run.stderr
    assert list(run.folder.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["the data set is missing"]),
        (b"", ["no row"]),
        (b'{"question": "a", "answer": "b"}\n{"question": \n', ["not JSON", "line 2"]),
        ('{"question": "头痛", "answer": "休息"}\n'.encode("gb18030"), ["not UTF-8", "line 1", "iconv"]),
        (b'{"question": "a", "answer": "b"}\n\n{"question": "a", "answer": 5}\n', ["a question and an answer", "line 3"]),
        (b'["a", "b"]\n', ["a question and an answer", "line 1"]),
    ],
    ids=["missing", "empty", "broken-json", "wrong-encoding", "wrong-type", "wrong-layout"],
)
def test_data_that_cannot_be_used(content: bytes | None, words: list[str], models: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_bytes(content)
    (tmp_path / "out").mkdir()
    refused(evaluate(tmp_path / "out", model_uri=models["tuned"], dataset=path), *words)


@pytest.mark.parametrize(
    "broken", ["missing", "no-chat-format", "another-chat-format", "cut-weights", "not-a-model", "unknown-family", "no-manifest"]
)
def test_models_that_cannot_be_used(broken: str, models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    words = {"missing": ["no model is stored here", str(model)]}.get(broken, [])
    if broken != "missing":
        shutil.copytree(models["tuned"], model)
    if broken == "no-chat-format":
        (model / "chat_format.json").unlink()
        store(model)
        words = ["chat format is missing"]
    if broken == "another-chat-format":
        stored = json.loads((model / "chat_format.json").read_text())
        (model / "chat_format.json").write_text(json.dumps(stored | {"system_prompt": "another"}))
        store(model)
        words = ["digest differs"]
    if broken == "cut-weights":
        with (model / "model.safetensors").open("r+b") as file:
            file.truncate(1000)
        words = ["does not match its manifest", "model.safetensors"]
    if broken == "not-a-model":
        (model / "config.json").write_text('{"architectures": ["BertModel"]}')
        store(model)
        words = ["not a causal language model", "BertModel"]
    if broken == "unknown-family":
        (model / "config.json").write_text('{"architectures": ["SomeForCausalLM"], "model_type": "some"}')
        store(model)
        words = ["can't be loaded", str(model)]
    if broken == "no-manifest":
        (model / MANIFEST).unlink()
        words = ["manifest is missing"]
    (tmp_path / "out").mkdir()
    refused(evaluate(tmp_path / "out", model_uri=model, dataset=data), *words)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"bertscore_model": "/nowhere/encoder"}, ["encoder of BERTScore is not there", "/nowhere/encoder"]),
        ({"base_model": "/nowhere/base"}, ["base model's folder does not exist"]),
        ({"exam_path": "/nowhere/exam.jsonl"}, ["/nowhere/exam.jsonl"]),
        (
            {"sample_size": "-1", "confidence": "2", "minimums": "rouge=3"},
            ["3 setting(s)", "--sample_size", "--confidence", "no metric is called 'rouge'"],
        ),
    ],
    ids=["no-encoder", "no-base", "no-exam", "bad-settings"],
)
def test_settings_that_cannot_be_used(flags: dict[str, str], words: list[str], models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    refused(evaluate(tmp_path, model_uri=models["tuned"], dataset=data, **flags), *words)


@pytest.mark.parametrize("wrong", ["folder", "file"])
def test_an_output_that_cannot_be_written_is_known_before_the_work(wrong: str, models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    where = tmp_path / "results.json"
    where.mkdir() if wrong == "folder" else where.touch()
    run = evaluate(tmp_path, model_uri=models["tuned"], dataset=data, results=where if wrong == "folder" else where / "inside.json")
    assert run.code == 2
    assert f"where a {wrong} is" in run.stderr and "Traceback" not in run.stderr
    assert run.stdout == ""


def test_a_full_disk_leaves_nothing(
    models: dict[str, Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path))

    monkeypatch.setattr("components.common.files.os.fsync", full)
    args = arguments(tmp_path, model_uri=models["tuned"], dataset=data, sample_size=3, bertscore_model="none", max_new_tokens=4)
    with pytest.raises(SystemExit) as exit_:
        run_command(lambda: main(args))
    assert exit_.value.code == 2
    assert "the disk is full" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_killed_run_leaves_nothing(models: dict[str, Path], data: Path, tmp_path: Path) -> None:
    process = start(arguments(tmp_path, model_uri=models["tuned"], base_model=models["base"], dataset=data, max_new_tokens=600))
    assert process.stdout
    for line in process.stdout:
        if "tuned model: NLL" in line:
            break
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []
