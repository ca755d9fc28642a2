"""What a user can do wrong with the merge command: exit code 2, what / where / fix, no traceback, nothing half-written."""

from __future__ import annotations

import errno
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save_file

from components.common.errors import UserError
from components.common.files import read_json, write_json
from components.merge.__main__ import main
from tests.unit.merge_support import make_adapter

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("trained") / "adapter", tiny_model, steps=4)


def flags_for(folder: Path) -> list[str]:
    paths = {"--adapter": "adapter", "--merge_info": "merge_info.json", "--metrics": "metrics.json", "--report": "report.html"}
    return [part for flag, name in paths.items() for part in (flag, str(folder / name))]


def nothing_is_left(folder: Path) -> None:
    assert not (folder / "model").exists()
    assert not (folder / "merge_info.json").exists()
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]


def refused(folder: Path, *flags: str) -> str:
    """What the command says when it refuses, without the cost of a process."""
    with pytest.raises(UserError) as caught:
        main([*flags_for(folder), *flags])
    assert caught.value.fix
    nothing_is_left(folder)
    return str(caught.value)


def refused_by_the_command(folder: Path, *flags: str) -> str:
    """What the real command says when it refuses."""
    command = [sys.executable, "-m", "components.merge", *flags_for(folder), *flags]
    result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert "fix: " in result.stderr
    nothing_is_left(folder)
    return result.stderr


@pytest.fixture
def spoiled(adapter: Path, tmp_path: Path) -> Path:
    """A folder with a copy of the adapter, for a test to spoil."""
    shutil.copytree(adapter, tmp_path / "adapter")
    return tmp_path


def test_a_missing_adapter(tmp_path: Path) -> None:
    assert "adapter's folder does not exist" in refused_by_the_command(tmp_path, "--output", str(tmp_path / "model"))


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("adapter_model.safetensors", "no weights"),
        ("adapter_config.json", "LoRA configuration is missing"),
        ("train_info.json", "train_info.json is missing"),
        ("chat_format.json", "chat format is missing"),
    ],
)
def test_an_adapter_with_a_file_missing(name: str, word: str, spoiled: Path) -> None:
    (spoiled / "adapter" / name).unlink()
    assert word in refused(spoiled, "--output", str(spoiled / "model"))


def test_a_broken_or_cut_or_infinite_adapter(spoiled: Path) -> None:
    weights = spoiled / "adapter" / "adapter_model.safetensors"
    tensors = load(weights.read_bytes())  # not `load_file`: it maps the file that is written next
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "weights are broken" in refused(spoiled, "--output", str(spoiled / "model"))
    tensors[next(iter(tensors))][0, 0] = float("inf")
    save_file(tensors, weights, metadata={"format": "pt"})
    assert "not finite" in refused(spoiled, "--output", str(spoiled / "model"))


def test_an_adapter_of_another_base(spoiled: Path, tiny_model: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    def other_base(name: str, **changes: Any) -> str:
        config = Qwen2Config.from_pretrained(tiny_model)
        for key, value in changes.items():
            setattr(config, key, value)
        shutil.copytree(tiny_model, spoiled / name)
        Qwen2ForCausalLM(config).save_pretrained(spoiled / name)
        return str(spoiled / name)

    narrow = other_base("narrow", hidden_size=64, num_attention_heads=2)
    assert "does not fit this base model" in refused(spoiled, "--base_model", narrow, "--output", str(spoiled / "model"))
    deep = other_base("deep", num_hidden_layers=6, layer_types=["full_attention"] * 6)
    assert "other layers than this base model" in refused(spoiled, "--base_model", deep, "--output", str(spoiled / "model"))


def test_a_base_with_another_chat_template(spoiled: Path, tiny_model: Path) -> None:
    other = Path(shutil.copytree(tiny_model, spoiled / "other"))
    (other / "chat_template.jinja").write_text("{{ messages[0].content }}<|im_end|>", encoding="utf-8")
    said = refused(spoiled, "--base_model", str(other), "--output", str(spoiled / "model"))
    assert "not the one that the adapter was trained with" in said


def test_a_base_that_is_absent_or_not_causal(spoiled: Path) -> None:
    assert "does not exist" in refused(spoiled, "--base_model", str(spoiled / "absent"), "--output", str(spoiled / "model"))
    (spoiled / "bert").mkdir()
    (spoiled / "bert" / "config.json").write_text('{"architectures": ["BertForMaskedLM"]}', encoding="utf-8")
    assert "not a causal language model" in refused(spoiled, "--base_model", str(spoiled / "bert"), "--output", str(spoiled / "model"))


def test_a_full_disk_is_told_before_the_merge(spoiled: Path) -> None:
    disk = spoiled / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    if (
        mount is None
        or subprocess.run([mount, "-t", "tmpfs", "-o", "size=1m", "none", str(disk)], check=False, capture_output=True).returncode
    ):
        pytest.skip("needs the right to mount a file system")
    try:
        said = refused_by_the_command(spoiled, "--output", str(disk / "model"))
        assert "the disk is too full" in said
        assert str(disk) in said
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_fills_up_during_the_merge(spoiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("components.merge.streaming._write", full)
    with pytest.raises(OSError, match="No space left"):  # run_command makes it exit code 2: see test_cli
        main([*flags_for(spoiled), "--output", str(spoiled / "model")])
    nothing_is_left(spoiled)


def test_de_quantised_weights_that_there_are_not(spoiled: Path) -> None:
    said = refused(spoiled, "--merge_base", "dequantized", "--output", str(spoiled / "model"))
    assert "trained on the original weights" in said


def test_a_data_set_that_is_missing_or_broken(spoiled: Path) -> None:
    assert "data set is missing" in refused(spoiled, "--dataset", str(spoiled / "absent"), "--output", str(spoiled / "model"))
    (spoiled / "rows.jsonl").write_text('{"question": "a", "answer": "b"}\n{"question": \n', encoding="utf-8")
    assert "line 2" in refused(spoiled, "--dataset", str(spoiled / "rows.jsonl"), "--output", str(spoiled / "model"))


def test_a_base_that_is_quantised(spoiled: Path, tiny_model: Path) -> None:
    base = Path(shutil.copytree(tiny_model, spoiled / "base"))
    config = read_json(base / "config.json", kind="config")
    write_json(base / "config.json", config | {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}})
    assert "base model is quantised" in refused(spoiled, "--base_model", str(base), "--output", str(spoiled / "model"))


def test_storage_that_is_down(spoiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}.items():
        monkeypatch.setenv(name, value)
    assert "object storage refused" in refused(spoiled, "--storage_uri", "s3://bucket", "--output", str(spoiled / "model"))


def test_a_gpu_that_is_not_there(spoiled: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert "no GPU" in refused(spoiled, "--device", "cuda", "--output", str(spoiled / "model"))


def test_weights_too_large_for_fp16_are_refused(spoiled: Path) -> None:
    weights = spoiled / "adapter" / "adapter_model.safetensors"
    tensors = load(weights.read_bytes())  # not `load_file`: it maps the file that is written next
    for name in tensors:
        tensors[name] = tensors[name] + (1000.0 if "layers.0.mlp.up_proj" in name else 0.0)
    save_file(tensors, weights, metadata={"format": "pt"})
    assert "too large for torch.float16" in refused_by_the_command(spoiled, "--precision", "fp16", "--output", str(spoiled / "model"))
