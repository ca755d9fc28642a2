"""How much memory training will need: against what was measured, what autograd really keeps, and what is published."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from components.common.device import Compute
from components.common.errors import ModelError
from components.common.memory import device_memory
from components.train.batches import collate
from components.train.forecast import GIB, Shape, forecast, layer_bytes, read_shape
from components.train.loss import answer_nll
from components.train.model import add_lora, load_base
from components.train.plan import Plan
from tests.unit.train_support import PAD, encoded, plan_of

CPU, GPU = torch.device("cpu"), torch.device("cuda")
QWEN_7B = {
    "model_type": "qwen2",
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": False,
}
SMOL = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
GEMMA = {
    "model_type": "gemma3_text",
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "vocab_size": 262144,
    "tie_word_embeddings": True,
}
# Peak of two optimizer steps of LoRA r16 (without the copies of the best and the last good weights) in MiB, with the mapped weights:
# (config, precision, quantization, checkpointing, tokens, changes, MiB). AMD EPYC, 2 threads, torch 2.13, glibc 2.36.
MEASURED: list[tuple[dict[str, Any], str, str, bool, int, dict[str, Any], int]] = [
    (SMOL, "bf16", "none", False, 512, {}, 1290),
    (SMOL, "bf16", "none", False, 1024, {}, 1946),
    (SMOL, "bf16", "none", False, 2048, {}, 3301),
    (SMOL, "bf16", "none", True, 512, {}, 908),
    (SMOL, "bf16", "none", True, 1024, {}, 1189),
    (SMOL, "bf16", "none", True, 2048, {}, 1415),
    (SMOL, "fp32", "none", False, 512, {}, 1981),
    (SMOL, "fp32", "none", False, 1024, {}, 3111),
    (SMOL, "fp32", "none", False, 2048, {}, 5398),
    (SMOL, "fp32", "none", True, 512, {}, 1399),
    (SMOL, "fp32", "none", True, 1024, {}, 1848),
    (SMOL, "fp32", "none", True, 2048, {}, 2727),
    (SMOL, "bf16", "nf4", False, 1024, {}, 1737),
    (SMOL, "bf16", "nf4", True, 1024, {}, 1013),
    (SMOL, "bf16", "int8", False, 1024, {}, 2019),
    (SMOL, "bf16", "int8", True, 1024, {}, 1259),
    (SMOL, "bf16", "none", False, 1024, {"lora_dropout": 0.05}, 2647),
    (SMOL, "bf16", "none", False, 1024, {"use_dora": True}, 2754),
    (SMOL, "bf16", "none", True, 1024, {"use_dora": True}, 1420),
    (GEMMA, "bf16", "none", False, 512, {}, 2104),
    (GEMMA, "bf16", "none", False, 1024, {}, 2639),
    (GEMMA, "bf16", "none", False, 2048, {}, 3733),
    (GEMMA, "bf16", "none", True, 512, {}, 1646),
    (GEMMA, "bf16", "none", True, 1024, {}, 1838),
    (GEMMA, "bf16", "nf4", True, 1024, {}, 1695),
    (GEMMA, "fp32", "none", False, 1024, {}, 3799),
    (GEMMA, "fp32", "none", True, 1024, {}, 2711),
]


def shape_of(folder: Path, config: dict[str, Any]) -> Shape:
    """The shape by config.json alone."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return read_shape(folder)


def write_header(path: Path, tensors: dict[str, list[int]]) -> None:
    """A weight file of which only the header is read."""
    header = json.dumps({name: {"dtype": "BF16", "shape": shape, "data_offsets": [0, 0]} for name, shape in tensors.items()}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)


def on(device: torch.device, **changes: Any) -> Plan:
    dtype = torch.float32 if changes.get("precision") == "fp32" else torch.bfloat16
    return plan_of(**{"precision": "bf16", "compute": Compute(device, dtype, ""), "lora_r": 16} | changes)


@pytest.mark.parametrize(("config", "precision", "quantization", "checkpointing", "tokens", "changes", "measured_mib"), MEASURED)
def test_the_forecast_is_within_a_quarter_of_what_was_measured(
    config: dict[str, Any],
    precision: str,
    quantization: str,
    checkpointing: bool,
    tokens: int,
    changes: dict[str, Any],
    measured_mib: int,
    tmp_path: Path,
) -> None:
    shape = shape_of(tmp_path, config)
    plan = on(CPU, precision=precision, quantization=quantization, gradient_checkpointing=checkpointing, **changes)
    kept_copies = 8 * shape.lora_parameters(16, dora=plan.use_dora)  # the measuring loop had none
    found = (forecast(shape, plan, tokens).total_bytes - kept_copies) / 2**20
    assert 0.75 < found / measured_mib < 1.26, f"forecast {found:.0f} MiB, measured {measured_mib} MiB"


@pytest.mark.parametrize(
    ("precision", "changes"), [("bf16", {}), ("fp32", {}), ("bf16", {"lora_dropout": 0.05}), ("bf16", {"use_dora": True})], ids=str
)
def test_a_layer_keeps_what_the_formula_says(precision: str, changes: dict[str, Any], tiny_model: Path, tiny_rows: Any) -> None:
    plan = plan_of(precision=precision, lora_r=16, **changes)
    model = add_lora(load_base(tiny_model, plan), plan)
    batch = collate(encoded(tiny_model, tiny_rows[:4]), packed=True, pad_id=PAD, device="cpu")
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        # what is as long as the batch: not the cast LoRA weights, nor the chunks of the head
        if batch.tokens in tensor.shape and tensor.untyped_storage().data_ptr() not in own:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        elif tensor.dim() == 4 and tensor.shape[-2] in batch.row_lengths and tensor.untyped_storage().data_ptr() not in own:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)  # of the attention, row by row
        return tensor

    with (
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        loss = answer_nll(model, batch)
    found = sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) / batch.tokens
    shape = read_shape(tiny_model)
    expected = layer_bytes(shape, plan) * shape.layers
    assert loss.requires_grad
    assert found == pytest.approx(expected, rel=0.1), f"{found:.0f} bytes a token, {expected} expected"


def test_qwen_7b_has_the_published_size(tmp_path: Path) -> None:
    shape = shape_of(tmp_path, QWEN_7B)
    assert shape.parameters == pytest.approx(7_615_616_512, rel=1e-4), "all but the biases"
    assert [round(shape.lora_parameters(rank) / 1e6, 1) for rank in (8, 16, 32, 64)] == [20.2, 40.4, 80.7, 161.5]


def test_qlora_of_qwen_7b_needs_about_the_published_floor(tmp_path: Path) -> None:
    shape = shape_of(tmp_path, QWEN_7B)
    plan = on(GPU, quantization="nf4", gradient_checkpointing=True, lora_r=32)
    assert forecast(shape, plan, 4096).weights_bytes / GIB == pytest.approx(3.14 + 2.03, abs=0.02)
    assert 8 < forecast(shape, plan, 4096).total_bytes / GIB < 9 * 1.25
    assert forecast(shape, plan, 2048).total_bytes / GIB < 12


def test_headers_and_config_agree(tiny_model: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_model / "config.json").read_text(encoding="utf-8"))
    by_files, by_config = read_shape(tiny_model), shape_of(tmp_path, config)
    assert by_files.linears == by_config.linears or sorted(by_files.linears) == sorted(by_config.linears)
    assert by_files.parameters == pytest.approx(by_config.parameters, rel=0.01), "the headers also count the biases"
    assert (by_files.layers, by_files.norms, by_files.outside) == (by_config.layers, by_config.norms, by_config.outside)


def test_every_norm_of_a_layer_counts_and_shards_add_up(tmp_path: Path) -> None:
    config = GEMMA | {"num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": config}), encoding="utf-8")
    norms = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
    write_header(tmp_path / "model-1.safetensors", {f"model.layers.0.{name}.weight": [640] for name in norms})
    attention = {f"model.layers.0.self_attn.{name}_norm.weight": [256] for name in "qk"}
    write_header(tmp_path / "model-2.safetensors", attention | {"model.embed_tokens.weight": [262144, 640]})
    shape = read_shape(tmp_path)
    assert shape.norms == 4 * 640 + 4 * 256 + 256
    assert shape.outside == 262144 * 640


def test_what_saves_memory_does(tmp_path: Path) -> None:
    shape = shape_of(tmp_path, QWEN_7B)
    plain = on(GPU)

    def total(tokens: int = 2048, **changes: Any) -> int:
        return forecast(shape, replace(plain, **changes), tokens).total_bytes

    assert total(1024) < total()
    assert total(gradient_checkpointing=True) < total()
    assert total(quantization="nf4") < total(quantization="int8") < total()
    assert total(lora_r=8) < total()
    assert total(gradient_checkpointing=True, quantization="int8") - total(1, gradient_checkpointing=True, quantization="int8") > 2 * (
        total(gradient_checkpointing=True, quantization="nf4") - total(1, gradient_checkpointing=True, quantization="nf4")
    ), "int8 keeps its inputs in spite of checkpointing"


def test_a_base_that_is_spread_over_cards_needs_a_share_and_two_layers(tmp_path: Path) -> None:
    shape = shape_of(tmp_path, QWEN_7B)
    decoder = (shape.parameters - shape.outside) * 2
    weights = forecast(shape, on(GPU, processes=4, sharded=True), 2048).weights_bytes
    assert weights == pytest.approx(decoder / 4 + 2 * decoder / 28 + shape.outside * 2, rel=1e-6)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        pytest.param(None, "can't be read", id="missing"),
        pytest.param("{", "can't be read", id="broken"),
        pytest.param("[]", "can't be read", id="a list"),
        pytest.param('{"n_embd": 768}', "has no 'num_hidden_layers'", id="no decoder of this form"),
    ],
)
def test_a_config_that_says_too_little_is_refused(content: str | None, said: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content, encoding="utf-8")
    with pytest.raises(ModelError, match=said) as error:
        read_shape(tmp_path)
    assert error.value.where == str(tmp_path / "config.json")
    assert error.value.fix


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, (20).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"[]"])
def test_a_broken_weight_file_is_refused_without_loading(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMOL), encoding="utf-8")
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match="broken") as error:
        read_shape(tmp_path)
    assert error.value.where.endswith("model.safetensors")


def test_the_containers_limit_counts_and_cached_files_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = SimpleNamespace(available=100 * GIB, total=128 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)
    assert device_memory(CPU, cgroup=tmp_path) == (100 * GIB, 128 * GIB), "no container"
    (tmp_path / "memory.max").write_text("max\n", encoding="ascii")
    assert device_memory(CPU, cgroup=tmp_path) == (100 * GIB, 128 * GIB), "a container without a limit"
    (tmp_path / "memory.max").write_text(f"{8 * GIB}\n", encoding="ascii")
    assert device_memory(CPU, cgroup=tmp_path) == (8 * GIB, 8 * GIB)
    (tmp_path / "memory.stat").write_text(f"anon {3 * GIB}\nfile {4 * GIB}\n", encoding="ascii")
    assert device_memory(CPU, cgroup=tmp_path) == (5 * GIB, 8 * GIB)
    assert device_memory(CPU, 2, cgroup=tmp_path) == (5 * GIB // 2, 4 * GIB), "two processes share it"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert device_memory(CPU, 2, cgroup=tmp_path) == (5 * GIB, 8 * GIB), "the other process is on another machine"
