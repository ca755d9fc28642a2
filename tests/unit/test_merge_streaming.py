"""Merging shard by shard: the numbers are PEFT's own, the memory is a few rows, the bytes are always the same (d06, d08)."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from components.common.errors import ModelError
from components.common.files import sha256_file, write_json
from components.merge.adapter import Adapter, read_adapter
from components.merge.quantised import quantised_layers
from components.merge.streaming import Weights, merge_shards, merged_weights, write_shards
from components.merge.structure import read_structure
from tests.unit.merge_support import QUANTIZED, save_adapter

PROJECT = Path(__file__).resolve().parents[2]
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "rsdora": {"use_rslora": True, "use_dora": True},
    "some layers": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1, 3]},
}


def random_adapter(folder: Path, base: Path, **lora: Any) -> tuple[Adapter, Any]:
    """An adapter that changes its base much, saved; and the PEFT model."""
    torch.manual_seed(1)
    loaded: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "init_lora_weights": False} | lora
    model = get_peft_model(loaded, LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:
                parameter.mul_(torch.rand_like(parameter) + 0.5)
    save_adapter(folder, model, AutoTokenizer.from_pretrained(base), base, "none")
    return read_adapter(folder), model


@pytest.mark.parametrize("kind", KINDS)
def test_d06_the_merged_weights_are_those_of_the_library(kind: str, tiny_model: Path, tmp_path: Path) -> None:
    adapter, model = random_adapter(tmp_path / "adapter", tiny_model, **KINDS[kind])
    merge_shards(tiny_model, adapter, tmp_path, dtype=torch.float32)
    merged, base = load_file(tmp_path / "model.safetensors"), load_file(tiny_model / "model.safetensors")
    wanted = model.merge_and_unload(safe_merge=True).state_dict()
    assert merged.keys() == base.keys()
    changed = [name for name in merged if not torch.equal(merged[name], base[name])]
    assert len(changed) == (4 if kind == "some layers" else 28)
    for name, weight in merged.items():
        difference = float((weight - wanted[name]).abs().max())
        assert difference <= 1e-6 * float(wanted[name].abs().max()), f"{name} differs by {difference:.3g}"


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_the_dequantised_weights_are_those_that_bitsandbytes_computes_with(quantization: str, tiny_model: Path) -> None:
    import bitsandbytes as bnb

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        tiny_model, dtype=torch.float32, quantization_config=QUANTIZED[quantization], device_map={"": "cpu"}
    )
    structure = read_structure(tiny_model)
    layers = quantised_layers(structure.empty_model())
    weights = Weights(structure, quantization=quantization, quantised=frozenset(f"{name}.weight" for name in layers))
    found = {name: module for name, module in loaded.named_modules() if isinstance(module, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))}
    assert found.keys() == layers
    module: Any
    for name, module in found.items():
        if quantization == "nf4":
            wanted = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        else:
            wanted = bnb.functional.int8_vectorwise_dequant(module.weight.data, module.weight.SCB)
        torch.testing.assert_close(weights[f"{name}.weight"], wanted.float(), rtol=0, atol=0)


def cut(base: Path, folder: Path, *, index: bool) -> Path:
    """The same model in several files."""
    shutil.copytree(base, folder)
    (folder / "model.safetensors").unlink()
    write_shards(Weights(read_structure(base)), folder, torch.float32, shard_bytes=600_000)
    assert len(list(folder.glob("*.safetensors"))) > 3
    if not index:
        (folder / "model.safetensors.index.json").unlink()
    return folder


@pytest.mark.parametrize("index", [True, False])
def test_the_base_may_be_cut_into_files_with_or_without_an_index(index: bool, tiny_model: Path, tmp_path: Path) -> None:
    adapter, _ = random_adapter(tmp_path / "adapter", tiny_model)
    base = cut(tiny_model, tmp_path / "cut", index=index)
    for name, folder in (("one", tiny_model), ("many", base)):
        (tmp_path / name).mkdir()
        merge_shards(folder, adapter, tmp_path / name)
    one, many = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "many"))
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_several_files_are_read_by_the_library_and_always_the_same_bytes(tiny_model: Path, tmp_path: Path) -> None:
    adapter, model = random_adapter(tmp_path / "adapter", tiny_model)
    weights = merged_weights(read_structure(tiny_model), adapter, "original")
    digests = []
    for name in ("one", "two"):
        folder = Path(shutil.copytree(tiny_model, tmp_path / name))
        (folder / "model.safetensors").unlink()
        write_shards(weights, folder, torch.float32, shard_bytes=600_000)
        digests.append({path.name: sha256_file(path) for path in sorted(folder.glob("model*"))})
    assert digests[0] == digests[1]
    index = json.loads((tmp_path / "one" / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert set(index["weight_map"].values()) == {name for name in digests[0] if name.endswith(".safetensors")}
    for path in (tmp_path / "one").glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
    read: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "one", dtype=torch.float32)
    wanted = model.merge_and_unload().state_dict()
    torch.testing.assert_close(dict(read.state_dict()), dict(wanted), rtol=1e-5, atol=1e-6)


def test_a_head_that_is_stored_although_it_is_tied_is_left_out_if_equal_and_refused_if_not(tiny_model: Path, tmp_path: Path) -> None:
    adapter, _ = random_adapter(tmp_path / "adapter", tiny_model)
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    tensors = load_file(tiny_model / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    merge_shards(base, adapter, tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")

    del tensors["model.embed_tokens.weight"]
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    weights = merged_weights(read_structure(base), adapter, "original")
    assert weights.structure.tied == {"model.embed_tokens.weight": "lm_head.weight"}
    assert torch.equal(weights["model.embed_tokens.weight"], weights["lm_head.weight"])

    tensors["model.embed_tokens.weight"] = tensors["lm_head.weight"] + 1
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="are one weight, but they differ"):
        read_structure(base)


def test_files_with_other_names_than_the_layers_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    tensors = load_file(tiny_model / "model.safetensors")
    save_file({name.replace("model.", "transformer."): tensor for name, tensor in tensors.items()}, base / "model.safetensors")
    with pytest.raises(ModelError, match="the files call their weights otherwise, such as transformer"):
        read_structure(base)


def test_a_base_that_is_cut_or_incomplete_or_of_other_shapes_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    path = base / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(ModelError, match="weights are broken"):
        read_structure(base)
    tensors = load_file(tiny_model / "model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if "norm" not in name}, path)
    with pytest.raises(ModelError, match="9 weights are missing"):
        read_structure(base)
    save_file(tensors | {"model.norm.weight": torch.zeros(7)}, path)
    with pytest.raises(ModelError, match=r"model.norm.weight is \(7,\)"):
        read_structure(base)
    path.unlink()
    with pytest.raises(ModelError, match="no such weight file"):
        read_structure(base)
    write_json(base / "model.safetensors.index.json", {"weight_map": {"a": "model-1.safetensors"}})
    with pytest.raises(ModelError, match="no such weight file") as caught:
        read_structure(base)
    assert "model-1.safetensors" in caught.value.where


def test_a_base_with_weights_that_are_not_numbers_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    adapter, _ = random_adapter(tmp_path / "adapter", tiny_model)
    base = Path(shutil.copytree(tiny_model, tmp_path / "base"))
    tensors = load_file(tiny_model / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"not a finite number: model.layers.2.mlp.up_proj"):
        merge_shards(base, adapter, tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"rank_pattern": {"q_proj": 2}},
        {"alpha_pattern": {"q_proj": 2}},
        {"modules_to_save": ["lm_head"]},
        {"bias": "all"},
        {"lora_bias": True},
        {"init_lora_weights": "pissa"},
        {"trainable_token_indices": [1]},
        {"fan_in_fan_out": True},
        {"something_new": 1},
    ],
)
def test_settings_that_change_what_lora_computes_are_refused(change: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    random_adapter(tmp_path / "adapter", tiny_model)
    path = tmp_path / "adapter" / "adapter_config.json"
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | change)
    with pytest.raises(ModelError, match=f"can't be merged here: {next(iter(change))}"):
        read_adapter(tmp_path / "adapter")


def test_an_adapter_of_a_weight_that_is_shared_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    adapter, _ = random_adapter(tmp_path / "adapter", tiny_model, target_modules=["lm_head"])
    with pytest.raises(ModelError, match="whose weight another layer shares"):
        merged_weights(read_structure(tiny_model), adapter, "original")


# Anonymous memory: what the process itself holds. Pages of the mapped weight files don't count: the system takes them back at will.
# It is sampled every millisecond in a thread of the process that merges; torch's kernels don't hold the interpreter's lock meanwhile.
MEASURE = """
import re, sys, threading, time, torch
from pathlib import Path
from components.merge.adapter import read_adapter
from components.merge.quantised import round_trip
from components.merge.streaming import merged_weights, write_shards
from components.merge.structure import read_structure
base, adapter, target, kind, shard_bytes = sys.argv[1:]
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
weights = merged_weights(read_structure(Path(base)), read_adapter(Path(adapter)), kind)
round_trip(torch.ones(64, 64), "nf4")  # loads the libraries' code, which is not what is measured
before = peak = anonymous()
def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.001)
threading.Thread(target=watch, daemon=True).start()
write_shards(weights, Path(target), torch.bfloat16, int(shard_bytes))
print(peak - before)
"""
SHARD_BYTES = 32 << 20


@pytest.fixture(scope="module")
def large(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model of a dozen files of up to 32 MiB, and adapters for it."""
    folder = tmp_path_factory.mktemp("large")
    config = Qwen2Config.from_pretrained(tiny_model)
    config.update({"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 14, "layer_types": ["full_attention"] * 14})
    torch.manual_seed(0)
    model: Any = Qwen2ForCausalLM(config)
    model.to(torch.bfloat16)
    shutil.copytree(tiny_model, folder / "base", ignore=shutil.ignore_patterns("model.safetensors"))
    model.save_pretrained(folder / "base", max_shard_size=SHARD_BYTES)
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False))
    save_adapter(folder / "adapter", adapted, AutoTokenizer.from_pretrained(tiny_model), folder / "base", "nf4")
    return folder / "base", folder / "adapter"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["original", "dequantized"])
def test_d08_the_peak_memory_is_below_two_shards_and_the_largest_layer(kind: str, large: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = large
    sizes = [path.stat().st_size for path in base.glob("*.safetensors")]
    assert len(sizes) >= 10, "the test wants many shards"
    structure = read_structure(base)
    largest = max(torch.Size(structure.files.shape(name)).numel() for name in structure.names) * 2
    command = [sys.executable, "-c", MEASURE, str(base), str(adapter), str(tmp_path), kind, str(SHARD_BYTES)]
    result = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, timeout=300, check=True)
    peak = int(result.stdout.splitlines()[-1])
    bound = 2 * max(sizes) + largest
    print(f"{kind}: peak {peak / 2**20:.1f} MiB of anonymous memory, bound {bound / 2**20:.1f} MiB, model {sum(sizes) / 2**20:.0f} MiB")
    assert 0 < peak < bound, f"{peak / 2**20:.1f} MiB, where {bound / 2**20:.1f} are allowed"
    assert len(list(tmp_path.glob("*.safetensors"))) >= 10
