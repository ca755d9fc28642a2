"""Export of the merged model in INT8 and INT4: the format that engines read, its numbers, its certificate, and what can go wrong."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

from components.common.chat import ChatFormat
from components.common.errors import DataError, ModelError, StorageError, UserError
from components.common.files import sha256_file
from components.merge import export
from components.merge.export import SINGLE, Scheme, export_quantized, plan_layers
from components.merge.structure import read_structure

SCHEMES: tuple[Scheme, ...] = ("int8", "int4")
Exported = tuple[Path, dict[str, Any]]


@pytest.fixture(scope="module")
def chat(tiny_model: Path) -> ChatFormat:
    return ChatFormat.of_tokenizer(AutoTokenizer.from_pretrained(tiny_model))


@pytest.fixture(scope="module")
def rows(tiny_model: Path, tiny_rows: list[dict[str, str]], chat: ChatFormat) -> list[tuple[list[int], list[bool]]]:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    return [chat.example(tokenizer, row["question"], row["answer"]) for row in tiny_rows[:10]]


@pytest.fixture(scope="module")
def merged(tiny_model: Path, chat: ChatFormat, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the merge step writes: bf16, with chat format and merge_info.json."""
    folder = tmp_path_factory.mktemp("merged") / "model"
    _write_model(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16), tiny_model, chat, folder)
    return folder


@pytest.fixture(scope="module")
def exported(merged: Path, chat: ChatFormat, rows: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    """Both exports: folder and record."""
    parent = tmp_path_factory.mktemp("exported")
    return {scheme: (parent / scheme, export_quantized(merged, parent / scheme, scheme, chat, rows)) for scheme in SCHEMES}


def _write_model(model: Any, tokenizer_of: Path, chat: ChatFormat, folder: Path, **options: Any) -> None:
    model.save_pretrained(folder, **options)
    AutoTokenizer.from_pretrained(tokenizer_of).save_pretrained(folder)
    chat.save(folder)
    (folder / "merge_info.json").write_text('{"base_model": "tiny", "precision": "bf16"}')
    (folder / "manifest.json").write_text("{}")


def _small_model(tiny_model: Path, chat: ChatFormat, folder: Path, *, hidden: int, intermediate: int) -> Path:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=2000,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    _write_model(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), tiny_model, chat, folder)
    return folder


def _rounded(weight: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Round to nearest, written out: what the export must be equal to."""
    values = weight.float().reshape(len(weight), -1, group)
    scale = (values.abs().amax(dim=-1, keepdim=True) / ((2**bits - 1) / 2)).bfloat16().float()
    return (values / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1).mul(scale).reshape(weight.shape)


def _bytes(folder: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in folder.iterdir()}


def _linear(model: Any) -> Iterator[tuple[str, Any]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name != "lm_head")


@pytest.mark.parametrize(("scheme", "bits", "group"), [("int8", 8, None), ("int4", 4, 128)])
def test_weights_are_those_of_plain_rounding(
    exported: dict[str, Exported], merged: Path, scheme: str, bits: int, group: int | None
) -> None:
    folder, _ = exported[scheme]
    original = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)  # nothing of ours: as any user would
    with torch.inference_mode():
        loaded(torch.arange(20)[None])  # the library unpacks at the first use
    worst = 0.0
    for (name, before), (other, after) in zip(_linear(original), _linear(loaded), strict=True):
        assert name == other
        expected = _rounded(before.weight, bits, group or before.in_features)
        worst = max(worst, (after.weight - expected).abs().max().item())
    print(f"largest difference: {worst}")
    assert worst == 0
    for name in ("model.embed_tokens.weight", "model.norm.weight", "model.layers.0.self_attn.q_proj.bias"):
        assert torch.equal(loaded.state_dict()[name], original.state_dict()[name])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_certificate_model_is_what_plain_transformers_loads(exported: dict[str, Exported], scheme: Scheme) -> None:
    folder, _ = exported[scheme]
    compute = export.choose_compute("bf16")  # in fp32 the certificate's weights are rounded to bf16 once more
    ids = torch.arange(30)[None]
    with torch.inference_mode():
        ours = export.load_model(folder, compute)(ids).logits
        plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()(ids).logits
    print(f"largest difference: {(ours - plain).abs().max()}")
    assert torch.equal(ours, plain)


def test_folder_is_the_standard_format(exported: dict[str, Exported], merged: Path) -> None:
    expected = {"int8": (8, None, "channel"), "int4": (4, 128, "group")}
    for scheme, (bits, group, strategy) in expected.items():
        folder, record = exported[scheme]
        stated = json.loads((folder / "config.json").read_text())["quantization_config"]
        weights = stated["config_groups"]["group_0"]["weights"]
        assert (stated["quant_method"], stated["format"], stated["quantization_status"]) == (
            "compressed-tensors",
            "pack-quantized",
            "compressed",
        )
        assert stated["ignore"] == ["lm_head"]
        assert stated["config_groups"]["group_0"]["targets"] == ["Linear"]
        assert stated["config_groups"]["group_0"]["input_activations"] is None
        assert (weights["num_bits"], weights["group_size"], weights["strategy"], weights["symmetric"]) == (bits, group, strategy, True)
        tensors = load_file(folder / SINGLE)
        layer = "model.layers.0.mlp.down_proj"
        assert tensors[f"{layer}.weight_packed"].dtype == torch.int32
        assert tensors[f"{layer}.weight_packed"].shape == (128, 256 * bits // 32)
        assert tensors[f"{layer}.weight_scale"].dtype == torch.bfloat16
        assert tensors[f"{layer}.weight_scale"].shape == (128, 256 // group if group else 1)
        assert tensors[f"{layer}.weight_shape"].tolist() == [128, 256]
        assert f"{layer}.weight" not in tensors
        assert record["weights_size_bytes"]["quantised"] == (folder / SINGLE).stat().st_size
        assert record["weights_size_bytes"]["merged"] == (merged / SINGLE).stat().st_size


def test_folder_is_complete(exported: dict[str, Exported], merged: Path, chat: ChatFormat) -> None:
    for folder, record in exported.values():
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_format.json"):
            assert (folder / name).read_bytes() == (merged / name).read_bytes()
        assert ChatFormat.load(folder).digest == chat.digest
        info = json.loads((folder / "merge_info.json").read_text())
        assert info["base_model"] == "tiny"
        assert info["export"]["scheme"] == record["scheme"]
        assert not (folder / "manifest.json").exists()  # the merged model's names other bytes
        assert all(path.stat().st_mode & 0o044 for path in folder.iterdir())


def test_same_inputs_give_the_same_bytes(exported: dict[str, Exported], merged: Path, chat: ChatFormat, tmp_path: Path) -> None:
    for scheme in SCHEMES:
        export_quantized(merged, tmp_path / "elsewhere", scheme, chat, [])  # other rows, another folder, and one that is replaced
        assert _bytes(tmp_path / "elsewhere") == _bytes(exported[scheme][0])


def test_many_files_in_and_out(
    exported: dict[str, Exported], merged: Path, chat: ChatFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write_model(AutoModelForCausalLM.from_pretrained(merged, dtype="auto"), merged, chat, tmp_path / "cut", max_shard_size="300KB")
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 3
    monkeypatch.setattr(export, "SHARD_BYTES", 100_000)
    export_quantized(tmp_path / "cut", tmp_path / "out", "int4", chat, [])
    files = sorted((tmp_path / "out").glob("model-*-of-*.safetensors"))
    assert len(files) > 3
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    expected = load_file(exported["int4"][0] / SINGLE)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "out" / file, "pt") as opened:
            assert name in opened.keys()  # noqa: SIM118
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")(torch.arange(5)[None])


def test_blocks_of_rows_give_the_same_numbers(merged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    structure = read_structure(merged)
    plan = plan_layers(structure, "int4")
    weight = structure.files.tensor("model.layers.0.mlp.up_proj.weight")
    whole = export.compressed(weight, plan, "w")
    monkeypatch.setattr(export, "BLOCK_WEIGHTS", 1000)
    cut = export.compressed(weight, plan, "w")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_certificate_tells_the_nll_of_both(exported: dict[str, Exported], merged: Path, rows: Any) -> None:
    def nll(model: Any) -> float:
        with torch.inference_mode():
            losses = [
                torch.nn.functional.cross_entropy(
                    model(torch.tensor([ids])).logits[0, :-1].double(), torch.tensor(ids[1:]), reduction="none"
                )[torch.tensor(mask[1:])]
                for ids, mask in rows
            ]
        return float(torch.cat(losses).mean())

    dtype = export.choose_compute().dtype
    before = nll(AutoModelForCausalLM.from_pretrained(merged, dtype=dtype))
    for scheme in SCHEMES:
        folder, record = exported[scheme]
        found = record["certificate"]
        assert found["nll_merged"] == pytest.approx(before, abs=2e-3)
        assert found["nll"] == pytest.approx(nll(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)), abs=2e-3)
        assert found["nll_difference"] == pytest.approx(found["nll"] - found["nll_merged"], abs=2e-5)
        assert found["rows"] == len(rows)
        assert found["answer_tokens"] == sum(sum(mask) for _, mask in rows)
        json.dumps(record, allow_nan=False)
    eight, four = exported["int8"][1], exported["int4"][1]
    assert eight["passed"]
    assert eight["certificate"]["top1_agreement"] > four["certificate"]["top1_agreement"] > 0.5


def test_a_failed_certificate_warns_and_keeps_the_model(
    merged: Path, chat: ChatFormat, rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(export.MAX_NLL_DIFFERENCE, "int4", -9.0)
    record = export_quantized(merged, tmp_path / "out", "int4", chat, rows[:2])
    assert record["passed"] is False
    assert "warning: int4 costs more than it may" in capsys.readouterr().out
    assert (tmp_path / "out" / SINGLE).is_file()


def test_certificate_of_another_model_fails(merged: Path, chat: ChatFormat, rows: Any, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(merged, dtype="auto")
    for _, module in _linear(model):
        module.weight.data = module.weight.data.flip(0)
    _write_model(model, merged, chat, tmp_path / "flipped")
    export_quantized(tmp_path / "flipped", tmp_path / "out", "int8", chat, [])
    found = export.certificate(merged, tmp_path / "out", "int8", chat, rows[:4], parameters=1)
    assert not found["passed"]
    assert found["nll_difference"] > 0.5
    assert found["exact_answers"] == 0


def test_certificate_counts_answers_and_positions() -> None:
    def said(nll: list[float], choices: list[int], answers: list[list[int]]) -> export._Said:
        return export._Said(torch.tensor(nll, dtype=torch.float64), torch.tensor(choices), answers)

    before = said([1.0, 2.0], [3, 4], [[5, 6, 7], [8, 9], [1, 2, 3], [4]])
    same = export._compared(before, before)
    assert (same["exact_answers"], same["first_divergence"], same["nll_difference"], same["top1_agreement"]) == (1, None, 0, 1)
    after = export._compared(before, said([1.5, 2.5], [3, 5], [[5, 6, 7], [8, 9, 9], [1, 0, 3], [4]]))
    assert (after["exact_answers"], after["first_divergence"], after["nll_difference"], after["top1_agreement"]) == (0.5, 1, 0.5, 0.5)
    broken = export._compared(before, said([float("nan"), 2.0], [3, 4], before.answers))
    assert broken["nll_difference"] is None


def test_greedy_answers_side_by_side_are_those_of_one_by_one(merged: Path, chat: ChatFormat, rows: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    prompts = [ids[: mask.index(True)] for ids, mask in rows]
    assert len({len(prompt) for prompt in prompts}) > 1
    short = [([*prompt, 0], [False] * len(prompt) + [True]) for prompt in prompts]
    together = export._listen(model, chat, short, "rows").answers
    alone = [export._listen(model, chat, [row], "rows").answers[0] for row in short]
    assert together == alone
    assert all(1 <= len(answer) <= export.GREEDY_TOKENS for answer in together)


def test_without_rows_or_memory_there_is_no_certificate(
    merged: Path, chat: ChatFormat, rows: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    none = export_quantized(merged, tmp_path / "out", "int8", chat, [])
    assert none["passed"] is False
    assert "no rows" in none["certificate"]["reason"]
    monkeypatch.setattr(export, "free_bytes", lambda device: 1 << 20)
    small = export_quantized(merged, tmp_path / "out", "int8", chat, rows)
    assert small["passed"] is False
    assert "memory is too small" in small["certificate"]["reason"]
    assert (tmp_path / "out" / SINGLE).is_file()


@pytest.mark.parametrize(
    ("hidden", "intermediate", "group", "kept"),
    [(128, 256, 128, []), (192, 256, 64, []), (128, 100, 128, ["model.layers.*.mlp.down_proj"]), (96, 96, 32, [])],
)
def test_widths_decide_the_group_size(
    tiny_model: Path, chat: ChatFormat, tmp_path: Path, hidden: int, intermediate: int, group: int, kept: list[str]
) -> None:
    folder = _small_model(tiny_model, chat, tmp_path / "small", hidden=hidden, intermediate=intermediate)
    record = export_quantized(folder, tmp_path / "out", "int4", chat, [])
    assert record["group_size"] == group
    assert record["not_quantised"] == ["embeddings", "lm_head", *kept, "norms", "biases"]
    assert record["quantised_layers"] == 14 - 2 * len(kept)
    with torch.inference_mode():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        loaded(torch.arange(9)[None])
    original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    down = "model.layers.0.mlp.down_proj.weight"
    assert torch.equal(loaded.get_parameter(down), original.get_parameter(down)) == bool(kept)


def test_a_model_of_odd_widths_is_refused(tiny_model: Path, chat: ChatFormat, tmp_path: Path) -> None:
    folder = _small_model(tiny_model, chat, tmp_path / "odd", hidden=12, intermediate=20)
    with pytest.raises(ModelError, match="no linear layer that int4 can hold") as raised:
        export_quantized(folder, tmp_path / "out", "int4", chat, [])
    assert raised.value.fix
    assert not (tmp_path / "out").exists()
    assert export_quantized(folder, tmp_path / "out", "int8", chat, [])["quantised_layers"] == 14


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_precisions(merged: Path, chat: ChatFormat, rows: Any, tmp_path: Path, dtype: torch.dtype) -> None:
    _write_model(AutoModelForCausalLM.from_pretrained(merged, dtype=dtype), merged, chat, tmp_path / "in")
    assert export_quantized(tmp_path / "in", tmp_path / "out", "int8", chat, rows[:2])["passed"]
    assert load_file(tmp_path / "out" / SINGLE)["model.layers.0.mlp.down_proj.weight_scale"].dtype == dtype


def test_rows_of_zeros_stay_zeros(merged: Path) -> None:
    plan = plan_layers(read_structure(merged), "int4")
    packed = export.compressed(torch.zeros(4, 128, dtype=torch.float16), plan, "w")
    assert packed["weight_scale"].isfinite().all()
    assert (packed["weight_packed"].view(torch.uint8) == 0x88).all()  # two nibbles of 8: the format's zero


def test_quantising_twice_is_refused(exported: dict[str, Exported], chat: ChatFormat, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="already quantised \\(compressed-tensors\\)"):
        export_quantized(exported["int8"][0], tmp_path / "out", "int4", chat, [])
    assert not list(tmp_path.iterdir())


def test_the_missing_library_is_named(merged: Path, chat: ChatFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "compressed_tensors", None)
    with pytest.raises(UserError, match="compressed-tensors is not installed") as raised:
        export_quantized(merged, tmp_path / "out", "int8", chat, [])
    assert "pip install" in raised.value.fix
    assert not list(tmp_path.iterdir())


def test_the_merged_model_is_never_replaced(merged: Path, chat: ChatFormat) -> None:
    before = _bytes(merged)
    with pytest.raises(UserError, match="would replace the model"):
        export_quantized(merged, merged / ".." / merged.name, "int8", chat, [])
    assert _bytes(merged) == before


def _cut(folder: Path) -> None:
    weights = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(weights[: len(weights) // 2])


def _nan(folder: Path) -> None:
    tensors = load_file(folder / SINGLE)
    tensors["model.layers.3.mlp.down_proj.weight"][5, 7] = float("nan")
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def _drop(folder: Path) -> None:
    tensors = load_file(folder / SINGLE)
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("spoil", "kind", "words"),
    [
        (_cut, ModelError, "broken"),
        (_nan, ModelError, r"not a finite number: model\.layers\.3\.mlp\.down_proj"),
        (_drop, ModelError, "missing"),
        (lambda folder: (folder / SINGLE).unlink(), ModelError, "no such weight file"),
        (lambda folder: (folder / "config.json").unlink(), DataError, "config.json is missing"),
        (lambda folder: (folder / "config.json").write_text("{"), DataError, "not JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), ModelError, "not an object"),
    ],
)
def test_a_broken_merged_model_leaves_nothing(merged: Path, chat: ChatFormat, tmp_path: Path, spoil: Any, kind: type, words: str) -> None:
    shutil.copytree(merged, tmp_path / "in")
    spoil(tmp_path / "in")
    with pytest.raises(kind, match=words):
        export_quantized(tmp_path / "in", tmp_path / "out", "int8", chat, [])
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_full_disk_leaves_nothing(merged: Path, chat: ChatFormat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:  # the library's own words on a full disk, which are no OSError
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(StorageError, match="the disk is full") as raised:
        export_quantized(merged, tmp_path / "out", "int4", chat, [])
    assert raised.value.where.startswith(str(tmp_path))
    assert not list(tmp_path.iterdir())
