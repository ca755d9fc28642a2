"""An adapter trained on a quantised base: both ways to merge it are measured, and the better one is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from components.common.chat import ChatFormat
from components.merge.__main__ import main
from components.merge.adapter import read_adapter
from components.merge.certificate import answer_logits
from components.merge.rows import answer_tokens, load_rows
from components.merge.streaming import merge_shards
from tests.rows import write_rows
from tests.unit.merge_support import QUANTIZED, flags_for, make_adapter, record_of


@pytest.fixture(scope="module", params=["nf4", "int8"])
def quantised(request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """An adapter trained on a quantised base, merged with the default settings: the name of the quantisation, and the folder of it all."""
    folder = tmp_path_factory.mktemp(request.param)
    adapter = make_adapter(folder / "adapter", tiny_model, quantization=request.param)
    rows = write_rows(folder / "rows.jsonl")
    main([*flags_for(folder, adapter), "--dataset", str(rows), "--output", str(folder / "model"), "--precision", "fp32"])
    return request.param, folder


def test_d06_an_adapter_of_a_quantised_base_is_merged_into_the_weights_that_serve_it_better(
    quantised: tuple[str, Path], tiny_model: Path, tmp_path: Path
) -> None:
    quantization, folder = quantised
    record, adapter = record_of(folder), read_adapter(folder / "adapter")
    nll = record["bases"]["nll"]
    better, worse = sorted(nll, key=lambda kind: nll[kind])
    assert record["trained_on"] == quantization
    assert record["merge_base"] == record["bases"]["chosen"] == better
    assert record["metrics"]["nll_dequantized_base"] == nll["dequantized"]
    assert record["certificate"]["merged_fp32"]["max_logit_difference"] < 1e-3
    low, high = record["bases"]["interval"]
    assert low <= nll[worse] - nll[better] <= high
    kept = load_file(folder / "model" / "model.safetensors")
    for kind in nll:
        (tmp_path / kind).mkdir()
        merge_shards(tiny_model, adapter, tmp_path / kind, dtype=torch.float32, merge_base=kind)
        other = load_file(tmp_path / kind / "model.safetensors")
        assert all(torch.equal(weight, other[name]) for name, weight in kept.items()) == (kind == better)
    assert "quantization_config" not in json.loads((folder / "model" / "config.json").read_text(encoding="utf-8"))
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert f"{nll['original']:.4f}" in page
    assert f"{nll['dequantized']:.4f}" in page


def test_d06_the_dequantised_candidate_is_the_model_that_was_trained(quantised: tuple[str, Path], tiny_model: Path) -> None:
    """Its NLL is that of the quantised base with its adapter, to rounding; that of the original weights is further off."""
    quantization, folder = quantised
    base: Any = AutoModelForCausalLM.from_pretrained(
        tiny_model, dtype=torch.float32, quantization_config=QUANTIZED[quantization], device_map={"": "cpu"}
    )
    trained = PeftModel.from_pretrained(base, str(folder / "adapter")).train()  # evaluation mode packs the weights anew on a CPU
    tokenizer, chat = AutoTokenizer.from_pretrained(tiny_model), ChatFormat.load(folder / "adapter")
    rows = load_rows(folder / "rows.jsonl", tokenizer, chat).rows
    sums = [torch.nn.functional.cross_entropy(answer_logits(trained, row), torch.tensor(row.answer_ids), reduction="sum") for row in rows]
    nll, measured = float(sum(sums)) / answer_tokens(rows), record_of(folder)["bases"]["nll"]
    assert measured["dequantized"] == pytest.approx(nll, abs=2e-4)
    assert abs(measured["dequantized"] - nll) < abs(measured["original"] - nll)


def test_the_base_to_merge_into_can_be_named(tiny_model: Path, tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", tiny_model, quantization="nf4", steps=2)
    main([*flags_for(tmp_path, adapter), "--merge_base", "dequantized", "--output", str(tmp_path / "model")])
    record = record_of(tmp_path)
    assert record["merge_base"] == "dequantized"
    assert record["bases"]["nll"].keys() == {"dequantized"}
    assert record["trained_in_4bit"]
