"""The train command from its flags to its files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from components.common.chat import ChatFormat
from components.train.__main__ import main

PROJECT = Path(__file__).resolve().parents[2]
FAST = ["--epochs", "2", "--learning_rate", "5e-3", "--batch_size", "4", "--lora_r", "8", "--lora_alpha", "16"]


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """The library allows one precision a process."""
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="module")
def rows_file(tiny_rows: list[dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in tiny_rows[1::2]), encoding="utf-8")
    return path


def flags_for(folder: Path, model: Path, rows: Path) -> list[str]:
    paths = {"--adapter": folder / "adapter", "--curves": folder / "curves.html", "--metrics": folder / "metrics.json"}
    return ["--base_model", str(model), "--dataset", str(rows), *(str(part) for pair in paths.items() for part in pair), *FAST]


@pytest.fixture(scope="module")
def trained(tiny_model: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    AcceleratorState._reset_state(True)
    main(flags_for(folder, tiny_model, rows_file))
    return folder


def info_of(folder: Path) -> dict[str, Any]:
    info: dict[str, Any] = json.loads((folder / "adapter" / "train_info.json").read_text(encoding="utf-8"))
    return info


def test_the_adapter_folder_is_whole(trained: Path, tiny_model: Path) -> None:
    names = {path.name for path in (trained / "adapter").iterdir()}
    wanted = {"adapter_config.json", "adapter_model.safetensors", "chat_format.json", "tokenizer.json", "train_info.json", "logs"}
    assert wanted <= names
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in (trained / "adapter").rglob("*")), "the next step may be another user"
    config = json.loads((trained / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == str(tiny_model)
    assert config["target_modules"] == sorted(config["target_modules"])
    assert not [path for path in trained.iterdir() if path.name.startswith(".")], "a scratch folder was left"


def test_the_adapter_works_with_peft_alone(trained: Path, tiny_model: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(trained / "adapter")
    chat = ChatFormat.load(trained / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    ids, _ = chat.example(tokenizer, "什么是高血压？", "血压高。")
    with torch.no_grad():
        before = base(torch.tensor([ids])).logits
        after = PeftModel.from_pretrained(base, trained / "adapter")(torch.tensor([ids])).logits
    assert float((before - after).abs().max()) > 0.1, "the adapter does nothing"


def test_training_lowered_the_validation_loss_and_the_metrics_say_so(trained: Path) -> None:
    metrics = json.loads((trained / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["validation_loss"] < metrics["validation_loss_base"]
    assert metrics["rows_dropped"] == 0
    assert metrics["tokens_per_second"] > 0
    assert all(isinstance(value, (int, float)) for value in metrics.values())
    assert metrics.keys() >= {"train_loss", "validation_loss", "validation_loss_base", "tokens_per_second", "seconds", "rows_dropped"}


def test_the_ledger_tells_what_made_the_adapter(trained: Path, rows_file: Path) -> None:
    info = info_of(trained)
    assert info["chat_digest"] == ChatFormat.load(trained / "adapter").digest
    assert len(info["base_fingerprint"]) == len(info["data_digest"]) == 64
    assert info["settings"]["learning_rate"] == 5e-3
    assert "dataset" not in info["settings"], "a path says nothing about what was trained"
    assert info["versions"].keys() >= {"torch", "transformers", "peft"}
    assert {"device", "precision", "threads", "steps"} <= {choice["name"] for choice in info["choices"]}
    assert all(choice["reason"] and choice["reason_zh"] for choice in info["choices"])
    assert info["rows"]["train"]["used"] + info["rows"]["validation"]["used"] == 15
    assert info["steps"] == info["evaluations"][-1]["step"]
    assert info["best_step"] in {epoch["step"] for epoch in info["evaluations"]}
    assert info["metrics"]["validation_loss"] == min(epoch["validation_loss"] for epoch in info["evaluations"])
    assert 0 < info["trainable_tokens"] < info["tokens"]
    assert info["peak_memory_bytes"]["process"] > 100e6


def test_tensorboard_reads_the_logs(trained: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained / "adapter" / "logs"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {
        "train/loss",
        "train/grad_norm",
        "train/learning_rate",
        "train/tokens_per_second",
        "validation/loss",
    }
    assert len(events.Scalars("train/loss")) == info_of(trained)["steps"]
    assert [point.step for point in events.Scalars("validation/loss")] == [0, *(epoch["step"] for epoch in info_of(trained)["evaluations"])]


def test_the_curves_are_a_page_of_its_own_in_both_languages(trained: Path) -> None:
    page = (trained / "curves.html").read_text(encoding="utf-8")
    assert page.count("<polyline") == 6
    assert "src=" not in page
    assert "href=" not in page
    for english, chinese in (("validation", "验证"), ("Choices", "自动选择"), ("What it took", "资源消耗"), ("Evaluations", "各次评估")):
        assert english in page
        assert chinese in page
    assert "nan" not in page.lower().replace("finance", "")


def test_the_same_seed_gives_the_same_weights_and_another_gives_others(
    trained: Path, tiny_model: Path, rows_file: Path, tmp_path: Path
) -> None:
    main(flags_for(tmp_path / "again", tiny_model, rows_file))
    main([*flags_for(tmp_path / "other", tiny_model, rows_file), "--seed", "7"])
    first, again, other = (
        load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (trained, tmp_path / "again", tmp_path / "other")
    )
    assert all(first[name].equal(again[name]) for name in first)
    assert any(not first[name].equal(other[name]) for name in first)


def test_kfp_gets_every_artifact_and_the_metrics_as_metadata(tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    names = {"adapter": "system.Model", "curves": "system.HTML", "metrics": "system.Metrics"}
    message = {
        "inputs": {
            "parameterValues": {"base_model": str(tiny_model), "epochs": 1.0, "learning_rate": 5e-3, "batch_size": 4.0, "lora_r": 8.0},
            "artifacts": {"dataset": {"artifacts": [{"name": "dataset", "uri": str(rows_file)}]}},
        },
        "outputs": {
            "artifacts": {
                name: {"artifacts": [{"name": name, "type": {"schemaTitle": kind}, "uri": str(tmp_path / "out" / name)}]}
                for name, kind in names.items()
            },
            "outputFile": str(tmp_path / "out" / "executor_output.json"),
        },
    }
    main(["--executor_input", json.dumps(message)])
    written = json.loads((tmp_path / "out" / "executor_output.json").read_text(encoding="utf-8"))["artifacts"]
    assert written.keys() == names.keys()
    shown = written["metrics"]["artifacts"][0]["metadata"]
    assert shown == json.loads((tmp_path / "out" / "metrics").read_text(encoding="utf-8"))
    assert len(written["adapter"]["artifacts"][0]["metadata"]["data_digest"]) == 64


def test_a_learning_rate_of_ten_ends_well_with_finite_but_bad_weights(
    tiny_model: Path, tiny_rows: list[dict[str, str]], tmp_path: Path
) -> None:
    known = tmp_path / "known.jsonl"  # rows that the tiny model was pre-trained on: there is something to spoil
    known.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in tiny_rows[::2]), encoding="utf-8")
    main([*flags_for(tmp_path, tiny_model, known), "--learning_rate", "10"])
    metrics = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))
    assert metrics.get("validation_loss", float("inf")) > metrics["validation_loss_base"], "the gate would let this adapter pass"
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())
    assert any(float(weight.abs().max()) > 1 for weight in weights.values()), "the untrained adapter was kept"
    page = (tmp_path / "curves.html").read_text(encoding="utf-8")
    assert "Worse than the base model" in page
    assert "比基础模型更差" in page


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_step_killed_half_way_leaves_no_adapter(how: signal.Signals, tiny_model: Path, rows_file: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "components.train", *flags_for(tmp_path, tiny_model, rows_file), "--epochs", "100000"]
    with subprocess.Popen(command, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=os.environ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step "):  # an epoch is over: there is something that could be taken for a result
                break
        process.send_signal(how)
        process.wait(30)
    assert process.returncode not in (0, 1, 2)
    assert not (tmp_path / "adapter").exists()
    assert not (tmp_path / "curves.html").exists()
    assert not (tmp_path / "metrics.json").exists()
