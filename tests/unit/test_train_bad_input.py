"""What a user can do wrong with the train command: exit code 2, what / where / fix, no traceback, nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
GOOD = '{"question": "什么是高血压？", "answer": "血压长期偏高。"}\n{"question": "感冒怎么办？", "answer": "休息，多喝水。"}\n'


def run_train(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    outputs = ["--adapter", str(folder / "adapter"), "--curves", str(folder / "curves.html"), "--metrics", str(folder / "metrics.json")]
    command = [sys.executable, "-m", "components.train", *outputs, *flags]
    return subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=120, check=False, env=os.environ)


def assert_refused(result: subprocess.CompletedProcess[str], folder: Path, *words: str) -> None:
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert "error: " in result.stderr
    assert "fix: " in result.stderr
    for word in words:
        assert word in result.stderr
    assert not (folder / "adapter").exists()
    assert not [path for path in folder.iterdir() if path.name.startswith(".adapter")], "a scratch folder was left"


def plain_file(content: bytes) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = folder / "rows.jsonl"
        path.write_bytes(content)
        return path

    return write


def data_set(broken: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        from datasets import Dataset

        target = folder / "dataset"
        target.mkdir()
        (target / "dataset.json").write_text('{"digest": "d"}', encoding="utf-8")
        row = {"question": "什么？", "answer": "什么。", "history": [], "line": 1}
        if broken == "column":
            del row["answer"]
        Dataset.from_list([row]).to_parquet(str(target / "train.parquet"))
        if broken == "cut":
            (target / "train.parquet").write_bytes(b"PAR1 not a parquet file")
        if broken == "digest":
            (target / "dataset.json").write_text("{}", encoding="utf-8")
        return target

    return write


@pytest.mark.parametrize(
    ("write", "words"),
    [
        pytest.param(lambda folder: folder / "absent.jsonl", ["missing", "absent.jsonl"], id="missing file"),
        pytest.param(plain_file(b""), ["no row"], id="empty file"),
        pytest.param(plain_file(GOOD.encode() + b'{"question": "a"\n'), ["not JSON", "line 3"], id="broken JSON on line 3"),
        pytest.param(plain_file(GOOD.encode("gb18030")), ["not UTF-8", "line 1", "iconv"], id="wrong encoding"),
        pytest.param(plain_file(GOOD.encode() + b'{"prompt": "a", "completion": "b"}\n'), ["question", "line 3"], id="wrong column"),
        pytest.param(plain_file(GOOD.encode() + b'{"question": "a", "answer": 5}\n'), ["both text", "line 3"], id="wrong type"),
        pytest.param(data_set("column"), ["no column answer", "train.parquet"], id="data set without a column"),
        pytest.param(data_set("cut"), ["can't be read", "train.parquet"], id="data set with a broken file"),
        pytest.param(data_set("digest"), ["no digest", "dataset.json"], id="data set without digest"),
        pytest.param(data_set("split"), ["no validation split"], id="data set without validation"),
    ],
)
def test_data_that_cannot_be_used(write: Callable[[Path], Path], words: list[str], tmp_path: Path) -> None:
    result = run_train(tmp_path, "--dataset", str(write(tmp_path)), "--base_model", str(tmp_path))
    assert_refused(result, tmp_path, *words)


def without_network(folder: Path) -> str:
    return "nobody/no-such-model"


def not_causal(folder: Path) -> str:
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text('{"architectures": ["BertForMaskedLM"]}', encoding="utf-8")
    return str(folder / "model")


def no_model(folder: Path) -> str:
    (folder / "model").mkdir()
    return str(folder / "model")


@pytest.mark.parametrize(
    ("base_model", "words"),
    [
        pytest.param(lambda folder: str(folder / "absent"), ["does not exist"], id="absent"),
        pytest.param(no_model, ["no config.json"], id="not a model"),
        pytest.param(not_causal, ["not a causal language model", "BertForMaskedLM"], id="not causal"),
        pytest.param(without_network, ["hub"], id="no network"),
        pytest.param(lambda folder: "package:no-such", ["no package ships"], id="unknown package"),
    ],
)
def test_a_base_model_that_cannot_be_used(base_model: Callable[[Path], str], words: list[str], tmp_path: Path) -> None:
    rows = plain_file(GOOD.encode())(tmp_path)
    assert_refused(run_train(tmp_path, "--dataset", str(rows), "--base_model", base_model(tmp_path)), tmp_path, *words)


def test_wrong_flags_are_named_all_at_once(tmp_path: Path) -> None:
    result = run_train(tmp_path, "--epochs", "-1", "--lora_r", "many", "--lora_dropout", "1.5")
    assert_refused(result, tmp_path, "3 setting(s)", "--epochs", "--lora_r", "--lora_dropout", "--help")


def test_a_huge_answer_is_dropped_and_a_file_of_nothing_else_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    huge = "".join(json.dumps({"question": f"问{number}？", "answer": "长" * 100_000}, ensure_ascii=False) + "\n" for number in range(2))
    rows = plain_file(huge.encode())(tmp_path)
    result = run_train(tmp_path, "--dataset", str(rows), "--base_model", str(tiny_model))
    assert_refused(result, tmp_path, "longer than 1024 tokens", "--max_length")


@pytest.fixture(params=["300k", "600k"])
def small_disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system that is full when the adapter's weights are written, or its tokenizer."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if (
        mount is None
        or subprocess.run(
            [mount, "-t", "tmpfs", "-o", f"size={request.param}", "none", str(folder)], check=False, capture_output=True
        ).returncode
    ):
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk(tiny_model: Path, small_disk: Path, tmp_path: Path) -> None:
    rows = plain_file(GOOD.encode())(tmp_path)
    result = run_train(small_disk, "--dataset", str(rows), "--base_model", str(tiny_model), "--epochs", "1", "--lora_r", "16")
    assert_refused(result, small_disk, "the disk is full", "adapter")
