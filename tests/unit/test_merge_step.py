"""The merge command from its flags to the model that it stores."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from components.common.chat import ChatFormat
from components.common.errors import ModelError
from components.common.files import sha256_file
from components.common.storage import fetch_model, read_manifest, verify
from components.merge.__main__ import main
from components.merge.adapter import read_adapter
from components.merge.lora import LoraLayer
from tests.rows import write_rows
from tests.unit.merge_support import flags_for, make_adapter, record_of

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("trained") / "adapter", tiny_model, steps=100)


@pytest.fixture(scope="module")
def merged(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working folder of one merge into `model/`."""
    folder = tmp_path_factory.mktemp("merged")
    main([*flags_for(folder, adapter), "--output", str(folder / "model")])
    return folder


def test_the_original_command_works_as_written(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_model, tmp_path / "Qwen" / "Qwen2.5-7B-Instruct")
    make_adapter(tmp_path / "qwen-medical-qa-lora", Path("Qwen/Qwen2.5-7B-Instruct"), steps=4)
    command = "--base_model Qwen/Qwen2.5-7B-Instruct --lora_model ./qwen-medical-qa-lora --output ./qwen-medical-qa-merged --device auto --compare"
    main(command.split())
    said = capsys.readouterr().out
    for name in ("adapter", "base", "merged"):
        assert any(line.startswith(name) and line.split()[-1].replace(".", "").isdigit() for line in said.splitlines())
    assert "warning" not in said
    assert (tmp_path / "qwen-medical-qa-merged" / "model.safetensors").is_file()


def test_the_folder_has_all_that_a_model_needs_and_no_scratch_is_left(merged: Path) -> None:
    names = {path.name for path in (merged / "model").iterdir()}
    wanted = {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "chat_format.json",
        "merge_info.json",
        "manifest.json",
    }
    assert wanted <= names
    assert not names & {"adapter_config.json", "adapter_model.safetensors"}
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in (merged / "model").rglob("*"))
    assert not [path for path in merged.iterdir() if path.name.startswith(".")]


def test_d06_the_certificate_is_in_the_report_and_the_metrics(merged: Path) -> None:
    record = record_of(merged)
    assert record["certificate"]["merged_fp32"]["max_logit_difference"] < 1e-3
    assert record["certificate"]["merged_fp32"]["top1_agreement"] == 1
    assert 0 < record["certificate"]["saved_bf16"]["kl"] < 0.1
    metrics = json.loads((merged / "metrics.json").read_text(encoding="utf-8"))
    assert metrics == record["metrics"]
    assert metrics.keys() >= {"kl", "top1_agreement", "max_logit_difference", "merged_size_bytes"}


def test_d06_the_merged_weights_are_base_plus_scaled_product(merged: Path, adapter: Path, tiny_model: Path) -> None:
    base, model, lora = (
        load_file(path)
        for path in (tiny_model / "model.safetensors", merged / "model" / "model.safetensors", adapter / "adapter_model.safetensors")
    )
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    assert model.keys() == base.keys()
    for name, weight in base.items():
        prefix = "base_model.model." + name.removesuffix(".weight")
        wanted = weight.float()
        if f"{prefix}.lora_A.weight" in lora:
            wanted = wanted + config["lora_alpha"] / config["r"] * lora[f"{prefix}.lora_B.weight"] @ lora[f"{prefix}.lora_A.weight"]
        difference = float((model[name].float() - wanted).abs().max())
        assert difference <= 2**-8 * float(wanted.abs().max()), f"{name} differs by {difference:.3g}"
        assert model[name].dtype == torch.bfloat16


def test_d06_a_merge_with_a_wrong_scale_is_never_written(adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = LoraLayer.fold
    monkeypatch.setattr(LoraLayer, "fold", lambda self, weight, first: right(replace(self, scale=self.scale * 1.05), weight, first))
    with pytest.raises(ModelError, match="not what was trained"):
        main([*flags_for(tmp_path, adapter), "--output", str(tmp_path / "model"), "--storage_uri", f"file://{tmp_path}/store"])
    assert list(tmp_path.iterdir()) == []


def test_d07_the_reloaded_folder_has_the_same_ids_template_and_stop_ids(
    merged: Path, adapter: Path, tiny_rows: list[dict[str, str]]
) -> None:
    trained_tokenizer, tokenizer = AutoTokenizer.from_pretrained(adapter), AutoTokenizer.from_pretrained(merged / "model")
    trained_chat, chat = ChatFormat.load(adapter), ChatFormat.load(merged / "model")
    assert chat == trained_chat
    assert ChatFormat.of_tokenizer(tokenizer).digest == trained_chat.digest
    for row in [*tiny_rows, {"question": "a<|im_end|>😀 b", "answer": "<|im_start|>"}]:
        assert chat.example(tokenizer, row["question"], row["answer"]) == trained_chat.example(
            trained_tokenizer, row["question"], row["answer"]
        )
    generation = GenerationConfig.from_pretrained(merged / "model")
    assert generation.eos_token_id == list(chat.stop_ids)
    assert generation.pad_token_id == chat.pad_id
    assert tokenizer.pad_token_id == chat.pad_id


def test_d07_generation_stops(merged: Path) -> None:
    chat, tokenizer = ChatFormat.load(merged / "model"), AutoTokenizer.from_pretrained(merged / "model")
    model: Any = AutoModelForCausalLM.from_pretrained(merged / "model")
    prompt = torch.tensor([chat.prompt_ids(tokenizer, "肺部感染怎么办？")])
    output = model.generate(prompt, do_sample=False, max_new_tokens=300)[0, prompt.shape[1] :].tolist()
    assert output[-1] in chat.stop_ids
    assert 10 < len(output) < 300


def test_d07_a_folder_that_differs_from_what_was_trained_is_refused(merged: Path, adapter: Path, tmp_path: Path) -> None:
    from components.merge.model_folder import check_model_folder

    tokenizer, chat = AutoTokenizer.from_pretrained(adapter), ChatFormat.load(adapter)
    check_model_folder(merged / "model", AutoTokenizer.from_pretrained(merged / "model"), tokenizer, chat)

    def spoil(name: str, change: dict[str, Any]) -> Path:
        folder = Path(shutil.copytree(merged / "model", tmp_path / name.replace(".", "-")))
        value = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps(value | change), encoding="utf-8")
        return folder

    for folder, word in (
        (spoil("generation_config.json", {"eos_token_id": 0}), "stop ids"),
        (spoil("tokenizer_config.json", {"pad_token": "<|im_end|>"}), "pad id"),
    ):
        with pytest.raises(ModelError, match=word):
            check_model_folder(folder, AutoTokenizer.from_pretrained(folder), tokenizer, chat)


def test_the_same_merge_gives_the_same_bytes(merged: Path, adapter: Path, tmp_path: Path) -> None:
    time.sleep(1.1)  # a time stamp would show
    main([*flags_for(tmp_path, adapter), "--output", str(tmp_path / "elsewhere")])
    first, second = read_manifest(merged / "model"), read_manifest(tmp_path / "elsewhere")
    assert first.files == second.files
    assert first.digest == second.digest == record_of(tmp_path)["model_digest"]


def test_merging_over_a_former_model_replaces_it(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old.bin").write_text("old", encoding="utf-8")
    main([*flags_for(tmp_path, adapter), "--output", str(tmp_path / "model"), "--precision", "fp32"])
    assert not (tmp_path / "model" / "old.bin").exists()
    verify(tmp_path / "model")
    assert load_file(tmp_path / "model" / "model.safetensors")["model.norm.weight"].dtype == torch.float32


def test_the_stored_model_is_fetched_by_the_address_that_is_returned(merged: Path, adapter: Path, tmp_path: Path) -> None:
    main([*flags_for(tmp_path, adapter), "--storage_uri", f"file://{tmp_path}/store"])
    record = record_of(tmp_path)
    assert record["model_uri"] == f"file://{tmp_path}/store/models/{record['model_digest']}"
    folder, manifest = fetch_model(record["model_uri"], tmp_path / "cache")
    assert manifest.digest == read_manifest(merged / "model").digest
    assert manifest.facts["adapter_digest"] == record["adapter_digest"]
    assert manifest.facts.keys() >= {"base_model", "adapter_digest", "data_digest", "chat_digest"}
    assert ChatFormat.load(folder).digest == manifest.facts["chat_digest"]
    assert {path.name for path in tmp_path.iterdir()} == {"store", "merge_info.json", "report.html", "metrics.json"}


def test_the_model_goes_to_s3(
    s3_server: tuple[Path, dict[str, str]], adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket, environment = s3_server
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    main([*flags_for(tmp_path, adapter), "--storage_uri", "s3://bucket/medical"])
    uri = record_of(tmp_path)["model_uri"]
    assert uri.startswith("s3://bucket/medical/models/")
    assert (bucket / uri.removeprefix("s3://bucket/") / "manifest.json").is_file()
    fetch_model(uri, tmp_path / "cache")


def test_kfp_gets_the_address_as_a_parameter(adapter: Path, tiny_model: Path, tmp_path: Path) -> None:
    outputs = {"merge_info": "system.Artifact", "report": "system.HTML", "metrics": "system.Metrics"}
    message = {
        "inputs": {
            "parameterValues": {"base_model": str(tiny_model), "storage_uri": f"file://{tmp_path}/store"},
            "artifacts": {
                "adapter": {"artifacts": [{"name": "adapter", "uri": str(adapter)}]},
                "dataset": {"artifacts": [{"name": "dataset", "uri": str(write_rows(tmp_path / "rows.jsonl"))}]},
            },
        },
        "outputs": {
            "parameters": {"model_uri": {"outputFile": str(tmp_path / "model_uri")}},
            "artifacts": {
                name: {"artifacts": [{"name": name, "type": {"schemaTitle": kind}, "uri": str(tmp_path / "out" / name)}]}
                for name, kind in outputs.items()
            },
            "outputFile": str(tmp_path / "out" / "executor_output.json"),
        },
    }
    main(["--executor_input", json.dumps(message)])
    written = json.loads((tmp_path / "out" / "executor_output.json").read_text(encoding="utf-8"))
    record = json.loads((tmp_path / "out" / "merge_info").read_text(encoding="utf-8"))
    assert written["parameterValues"] == {"model_uri": record["model_uri"]}
    assert written["artifacts"]["metrics"]["artifacts"][0]["metadata"] == record["metrics"]
    assert written["artifacts"]["merge_info"]["artifacts"][0]["metadata"]["model_digest"] == record["model_digest"]


def test_rows_are_measured_and_none_of_their_words_are_told(adapter: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl")
    main([*flags_for(tmp_path, adapter), "--dataset", str(rows), "--output", str(tmp_path / "model")])
    record = record_of(tmp_path)
    assert record["measured_on"]["rows"] == 16
    assert record["measured_on"]["lines"][:3] == [1, 4, 7]
    for name in ("merge_info.json", "report.html"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert not any(word in text for word in ("心脏", "疼痛", "甲状腺"))
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_the_report_stands_alone_in_two_languages(merged: Path) -> None:
    page = (merged / "report.html").read_text(encoding="utf-8")
    record = record_of(merged)
    for part in ("proven", "已验证", "Certificate", "合并证书", record["model_digest"], f"{record['certificate']['saved_bf16']['kl']:.4g}"):
        assert part in page
    assert not any(part in page for part in ("src=", "href=", "http"))


def test_a_model_too_large_for_the_memory_is_proven_from_the_disk(
    adapter: Path, merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in ("run", "running"):
        monkeypatch.setattr(f"components.merge.{module}.free_bytes", lambda device: 3_000_000)
    main([*flags_for(tmp_path, adapter), "--output", str(tmp_path / "model")])
    assert "one layer at a time, from the disk" in capsys.readouterr().out
    record, whole = record_of(tmp_path), record_of(merged)
    assert record["model_digest"] == whole["model_digest"]
    assert record["measured_on"]["whole_in_memory"] is False
    assert record["certificate"]["merged_fp32"]["max_logit_difference"] < 1e-3
    assert record["certificate"]["saved_bf16"]["greedy_rows"] == 0
    assert record["certificate"]["saved_bf16"]["kl"] == pytest.approx(whole["certificate"]["saved_bf16"]["kl"], rel=0.01)


def test_a_base_that_changed_since_the_training_is_told(
    adapter: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(tiny_model, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text(encoding="utf-8"))
    (other / "config.json").write_text(json.dumps(config | {"note": "changed"}), encoding="utf-8")
    main([*flags_for(tmp_path, adapter), "--base_model", str(other), "--output", str(tmp_path / "model")])
    assert "is not the base model as it was in training" in capsys.readouterr().out
    assert record_of(tmp_path)["same_base_as_in_training"] is False
    assert "基础模型与训练时不同" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_exports_lie_beside_the_model_and_are_stored_like_it(adapter: Path, tmp_path: Path) -> None:
    main(
        [
            *flags_for(tmp_path, adapter),
            "--output",
            str(tmp_path / "model"),
            "--storage_uri",
            f"file://{tmp_path}/store",
            "--export",
            "both",
        ]
    )
    record = record_of(tmp_path)
    assert [export["scheme"] for export in record["exports"]] == ["int8", "int4"]
    for export in record["exports"]:
        assert (tmp_path / f"model-{export['scheme']}" / "config.json").is_file()
        folder, manifest = fetch_model(export["model_uri"], tmp_path / "cache")
        assert folder != tmp_path / "model"
        assert manifest.facts["merged_from"] == record["model_digest"]
        assert export["certificate"]["nll"] > 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "INT8" in page
    assert "INT4" in page


def test_a_model_that_a_bad_learning_rate_broke_is_merged_all_the_same(tiny_model: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", tiny_model, rate=1.0, steps=10)
    main([*flags_for(tmp_path, adapter), "--output", str(tmp_path / "model")])
    assert (tmp_path / "model" / "model.safetensors").is_file()
    assert all(isinstance(value, (int, float)) for value in record_of(tmp_path)["metrics"].values())


def test_another_base_name_is_told(adapter: Path, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same = Path(shutil.copytree(tiny_model, tmp_path / "same-weights"))
    main([*flags_for(tmp_path, adapter), "--base_model", str(same), "--output", str(tmp_path / "model")])
    assert f"warning: the adapter was trained on {tiny_model}" in capsys.readouterr().out


def test_a_merge_killed_half_way_leaves_no_model(adapter: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "components.merge", *flags_for(tmp_path, adapter), "--output", str(tmp_path / "model")]
    said = tmp_path / "said.txt"
    with said.open("w") as file, subprocess.Popen(command, cwd=PROJECT, stdout=file, stderr=file, env=os.environ) as process:
        while process.poll() is None and not any(path.suffix == ".safetensors" for path in tmp_path.rglob(".model.*/*")):
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    assert process.returncode == -signal.SIGKILL, said.read_text(encoding="utf-8")
    assert not (tmp_path / "model").exists()
    assert not (tmp_path / "merge_info.json").exists()


def test_the_digest_changes_with_the_adapter(adapter: Path, tmp_path: Path) -> None:
    before = read_adapter(adapter).digest
    spoiled = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    assert read_adapter(spoiled).digest == before
    weights = spoiled / "adapter_model.safetensors"
    tensors = load(weights.read_bytes())  # not `load_file`: it maps the file that is written next
    tensors[next(iter(tensors))][0, 0] += 1
    save_file(tensors, weights, metadata={"format": "pt"})
    assert read_adapter(spoiled).digest != before
    assert sha256_file(weights) != sha256_file(adapter / "adapter_model.safetensors")
