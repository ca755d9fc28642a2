"""The merge certificate: the merged model is the adapter on its base, and a merge that isn't is caught (d06)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from components.common.chat import ChatFormat
from components.common.errors import ModelError, UserError
from components.merge import certificate, running
from components.merge.adapter import Adapter, read_adapter
from components.merge.certificate import Agreement, answer_logits, compare, expect, require, summary
from components.merge.lora import LoraLayer
from components.merge.rows import PROBES, Row, load_rows
from components.merge.running import Place, adapted_model, choose_place, plain_model
from components.merge.streaming import Weights, merged_weights
from components.merge.structure import read_structure
from tests.rows import write_rows
from tests.unit.merge_support import make_adapter

CPU = torch.device("cpu")
WHOLE, FROM_DISK = Place(CPU, True, ""), Place(CPU, False, "")


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def chat(tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
    return ChatFormat.of_tokenizer(tokenizer)


@pytest.fixture(scope="module")
def rows(tokenizer: PreTrainedTokenizerBase, chat: ChatFormat) -> list[Row]:
    return load_rows(None, tokenizer, chat).rows


@pytest.fixture(scope="module", params=["lora", "dora"])
def adapter(request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Adapter:
    """An adapter that changes the tiny model's answers."""
    folder = tmp_path_factory.mktemp(request.param)
    return read_adapter(make_adapter(folder, tiny_model, steps=8, use_dora=request.param == "dora"))


def compared(tiny_model: Path, adapter: Adapter, rows: list[Row], chat: ChatFormat, folder: Path, **changes: Any) -> Agreement:
    """The certificate of a merge whose LoRA layers are changed in some way."""
    structure = read_structure(tiny_model)
    merged = merged_weights(structure, adapter, "original")
    layers = {
        name: LoraLayer(**{**vars(layer), **{key: change(name, layer) for key, change in changes.items()}})
        for name, layer in merged.layers.items()
    }
    expected = expect(adapted_model(Weights(structure), adapter, WHOLE), rows, chat, folder)
    return compare(plain_model(Weights(structure, layers), WHOLE), rows, expected, "merged")


def test_d06_a_merge_agrees_with_the_adapter_on_its_base(
    adapter: Adapter, tiny_model: Path, rows: list[Row], chat: ChatFormat, tmp_path: Path
) -> None:
    found = compared(tiny_model, adapter, rows, chat, tmp_path)
    require(found)
    assert found.max_logit_difference < 1e-3, f"logits differ by {found.max_logit_difference:.3g}"
    assert found.kl < 1e-6
    assert found.top1_agreement == 1
    assert abs(found.nll_difference) < 1e-4
    assert (found.greedy_rows, found.greedy_diverged, found.first_greedy_divergence) == (4, 0, None)


@pytest.mark.parametrize("wrong", [0.5, 0.99, 1.01, 2.0, -1.0])
def test_d06_a_wrong_scale_is_caught(
    wrong: float, adapter: Adapter, tiny_model: Path, rows: list[Row], chat: ChatFormat, tmp_path: Path
) -> None:
    found = compared(tiny_model, adapter, rows, chat, tmp_path, scale=lambda name, layer: layer.scale * wrong)
    with pytest.raises(ModelError, match="not what was trained"):
        require(found)


def test_d06_a_layer_that_was_not_merged_is_caught(
    adapter: Adapter, tiny_model: Path, rows: list[Row], chat: ChatFormat, tmp_path: Path
) -> None:
    skip: Callable[[str, LoraLayer], float] = lambda name, layer: 0.0 if "layers.3.mlp.down" in name else layer.scale  # noqa: E731
    with pytest.raises(ModelError, match="not what was trained"):
        require(compared(tiny_model, adapter, rows, chat, tmp_path, scale=skip))


def test_d06_bf16_weights_agree_less_which_the_figures_show(
    adapter: Adapter, tiny_model: Path, rows: list[Row], chat: ChatFormat, tmp_path: Path
) -> None:
    structure = read_structure(tiny_model)
    merged = merged_weights(structure, adapter, "original")
    expected = expect(adapted_model(Weights(structure), adapter, WHOLE), rows, chat, tmp_path)
    found = compare(plain_model(merged, WHOLE).to(torch.bfloat16), rows, expected, "bf16")
    assert found.max_logit_difference > 1e-2
    assert 0 < found.kl < 0.1


def test_a_model_that_is_read_from_the_disk_layer_by_layer_says_the_same(adapter: Adapter, tiny_model: Path, rows: list[Row]) -> None:
    structure = read_structure(tiny_model)
    merged, base = merged_weights(structure, adapter, "original"), Weights(structure)
    for make in (lambda place: adapted_model(base, adapter, place), lambda place: plain_model(merged, place)):
        whole, layered = make(WHOLE), make(FROM_DISK)
        assert all(parameter.device.type == "meta" for parameter in layered.parameters())
        torch.testing.assert_close(answer_logits(layered, rows[1]), answer_logits(whole, rows[1]), rtol=0, atol=0)
        assert all(parameter.device.type == "meta" for parameter in layered.parameters()), "a layer was not given back"


def test_the_place_is_chosen_by_the_memory_that_is_free(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(running, "free_bytes", lambda device: 10 << 30)
    assert choose_place("cpu", 10**9, 10**8).whole
    assert "whole in memory" in capsys.readouterr().out
    assert not choose_place("cpu", 7 * 10**9, 10**8).whole
    assert "an fp32 model needs 31.3 GiB, 10.0 GiB are free: one layer at a time" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"one layer alone needs 14.9 GiB, 10.0 GiB are free"):
        choose_place("cpu", 7 * 10**9, 2 * 10**9)


def test_the_figures_are_those_computed_by_hand() -> None:
    wanted = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    got = torch.tensor([[0.0, math.log(3)], [2.0, 0.0]])
    found = summary(certificate._differences(wanted, got, [0, 0]).unsqueeze(0), 2, [None, 7, 3])
    assert found.max_logit_difference == pytest.approx(math.log(3))
    assert found.mean_logit_difference == pytest.approx(math.log(3) / 4)
    assert found.largest_logit == 2
    # The first token: p = (1/2, 1/2), q = (1/4, 3/4); the second agrees.
    assert found.kl == pytest.approx((0.5 * math.log(2) + 0.5 * math.log(2 / 3)) / 2)
    assert found.top1_agreement == 0.5
    assert found.nll == pytest.approx((math.log(4) + math.log(1 + math.exp(-2))) / 2)
    assert found.nll_difference == pytest.approx((math.log(4) - math.log(2)) / 2)
    assert found.row_nll == (pytest.approx(2 * found.nll),)
    assert (found.greedy_rows, found.greedy_diverged, found.first_greedy_divergence) == (3, 2, 3)


def test_logits_are_compared_in_pieces_that_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    wanted, got, answer = torch.randn(10, 50), torch.randn(10, 50), list(range(10))
    at_once = certificate._differences(wanted, got, answer)
    monkeypatch.setattr(certificate, "CHUNK_TOKENS", 3)
    torch.testing.assert_close(certificate._differences(wanted, got, answer), at_once, rtol=1e-6, atol=1e-6)


def test_logits_that_are_not_numbers_are_not_taken_for_agreement() -> None:
    nothing = torch.full((2, 3), math.nan)
    with pytest.raises(ModelError, match="not what was trained"):
        require(summary(certificate._differences(nothing, nothing, [0, 0]).unsqueeze(0), 2, []))


def test_rounding_is_seen_on_the_scale_of_the_logits() -> None:
    broken = Agreement(0.5, 0.0, 5000.0, 0.0, 1.0, 9.0, 0.0, 0, 0, None, (9.0,))
    require(broken)
    with pytest.raises(ModelError):
        require(broken._replace(largest_logit=20.0))


def test_the_first_greedy_divergence_is_that_of_two_generations(
    adapter: Adapter, tiny_model: Path, rows: list[Row], chat: ChatFormat, tmp_path: Path
) -> None:
    structure = read_structure(tiny_model)
    trained, base = adapted_model(Weights(structure), adapter, WHOLE), plain_model(Weights(structure), WHOLE)
    found = compare(base, rows, expect(trained, rows, chat, tmp_path), "base").first_greedy_divergence

    def generations() -> Iterator[int]:
        for row in rows:
            pair = []
            for model in (trained, base):
                prompt = torch.tensor([row.prompt_ids])
                settings = {"do_sample": False, "max_new_tokens": certificate.GREEDY_TOKENS, "eos_token_id": list(chat.stop_ids)}
                output = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), pad_token_id=chat.pad_id, **settings)
                pair.append(output[0, prompt.shape[1] :].tolist())
            yield next((at for at, (one, other) in enumerate(zip(*pair, strict=False)) if one != other), 10**9)

    assert found is not None
    assert found == min(generations())


def test_the_probes_are_compared_where_the_answer_is(
    tiny_model: Path, rows: list[Row], tokenizer: PreTrainedTokenizerBase, chat: ChatFormat
) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    for (_question, answer), row in zip(PROBES, rows, strict=True):
        assert tokenizer.decode(row.answer_ids[:-1]) == answer
        assert row.answer_ids[-1] == chat.end_of_turn_id
    with torch.no_grad():
        whole = model(torch.tensor([rows[0].ids])).logits[0]
    torch.testing.assert_close(answer_logits(model, rows[0]), whole[rows[0].answer_start - 1 : -1])


def test_held_out_rows_are_spread_over_the_split_and_the_long_ones_passed_over(
    tokenizer: PreTrainedTokenizerBase, chat: ChatFormat, tmp_path: Path
) -> None:
    found = load_rows(write_rows(tmp_path / "rows.jsonl"), tokenizer, chat)
    assert [row.line for row in found.rows] == [1 + 3 * at for at in range(16)]
    assert found.source == "file"
    assert load_rows(tmp_path / "rows.jsonl", tokenizer, chat, 4).rows[0].line == 1
    (tmp_path / "long.jsonl").write_text(f'{{"question": "{"心 肝 " * 600}", "answer": "是"}}\n', encoding="utf-8")
    assert load_rows(tmp_path / "long.jsonl", tokenizer, chat).source == "built-in"
