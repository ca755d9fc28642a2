"""What the train step chooses by itself: precision, steps, warm-up, and how it says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from components.common import device
from components.common.errors import UserError
from components.train.choices import choose_precision, decide, explain_4bit, plan_steps, precision_name
from components.train.config import TrainSettings
from components.train.recipe import learning_rate_share


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}), encoding="utf-8")
    return tmp_path


def without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_d17_fp16_is_refused_for_qwen_with_the_reason(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_bf16(monkeypatch)
    compute, choices = choose_precision("fp16", tiny_model)
    assert compute.dtype == torch.float32
    precision = next(choice for choice in choices if choice.name == "precision")
    assert precision.value == "fp32"
    assert "Qwen models overflow" in precision.reason
    assert "no native bf16" in precision.reason
    assert "溢出" in precision.reason_zh


def test_d17_bf16_is_chosen_where_the_device_has_it(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    for asked in ("auto", "fp16"):
        compute, choices = choose_precision(asked, tiny_model)
        assert compute.dtype == torch.bfloat16, asked
        assert "natively" in next(choice.reason for choice in choices if choice.name == "precision")


def test_d17_fp16_on_a_cpu_is_refused_for_any_model(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_bf16(monkeypatch)
    compute, choices = choose_precision("fp16", llama)
    assert compute.dtype == torch.float32
    assert "a CPU can't train in it" in next(choice.reason for choice in choices if choice.name == "precision")


def test_a_precision_that_can_be_kept_is_kept(llama: Path) -> None:
    for asked, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        compute, _ = choose_precision(asked, llama)  # type: ignore[arg-type]
        assert compute.dtype == dtype


def test_d18_the_cost_of_4bit_is_told_before_it_is_paid() -> None:
    on_cpu = explain_4bit(device.Compute(torch.device("cpu"), torch.bfloat16, ""))
    on_gpu = explain_4bit(device.Compute(torch.device("cuda"), torch.bfloat16, ""))
    assert "no less memory" in on_cpu.reason
    assert "0.75–0.95 of the speed" in on_gpu.reason
    assert "computes in bf16" in on_gpu.reason


def test_every_choice_is_printed_with_its_reason(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    decided = decide(TrainSettings(precision="fp32", load_in_4bit=True), tiny_model, 21)
    said = capsys.readouterr().out
    assert {choice.name for choice in decided.choices} == {
        "device",
        "precision",
        "threads",
        "gradient_accumulation_steps",
        "steps",
        "warmup_steps",
        "load_in_4bit",
    }
    for choice in decided.choices:
        assert f"{choice.name}: {choice.value} ({choice.reason})" in said
        assert choice.reason_zh
    assert precision_name(decided.compute) == "fp32"


def test_a_large_data_set_is_trained_as_asked() -> None:
    plan, _ = plan_steps(TrainSettings(), 10_000)
    assert plan == (4, 4, 625, 1875, 10)


def test_twenty_rows_give_enough_steps_and_the_change_is_explained() -> None:
    plan, choices = plan_steps(TrainSettings(), 21)
    assert (plan.accumulation, plan.steps_an_epoch, plan.steps) == (1, 6, 18)
    assert plan.warmup_steps == 1
    reasons = {choice.name: choice.reason for choice in choices}
    assert "4 asked for; fewer, because 21 rows" in reasons["gradient_accumulation_steps"]
    assert "10 asked for; at most a tenth" in reasons["warmup_steps"]


def test_a_part_of_an_epoch_and_a_single_row_are_possible() -> None:
    assert plan_steps(TrainSettings(epochs=0.5), 1600)[0].steps == 50
    assert plan_steps(TrainSettings(epochs=0.01), 1)[0].steps == 1


def test_the_learning_rate_rises_linearly_and_falls_as_a_cosine_to_a_tenth() -> None:
    plan, _ = plan_steps(TrainSettings(epochs=1, batch_size=1, gradient_accumulation_steps=1), 100)
    rates = [learning_rate_share(step, plan) for step in range(101)]
    assert rates[:3] == pytest.approx([1 / 11, 2 / 11, 3 / 11])
    assert max(rates) == rates[10] == pytest.approx(1)
    assert rates[55] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_without_warm_up_the_first_step_has_the_full_rate() -> None:
    plan, _ = plan_steps(TrainSettings(warmup_steps=0), 21)
    assert learning_rate_share(0, plan) == 1


@pytest.mark.parametrize("flags", [["--bf16", "--fp16"], ["--bf16", "--precision", "fp32"]])
def test_two_precisions_at_once_are_a_mistake(flags: list[str]) -> None:
    with pytest.raises(UserError) as error:
        TrainSettings.parse("python -m components.train", flags)
    assert "asked for twice" in str(error.value)


def test_the_original_flags_work() -> None:
    flags = "--model_name m --output_dir o --max_length 512 --batch_size 2 --epochs 5 --learning_rate 0.0003 --load_in_4bit --gradient_checkpointing"
    settings, _ = TrainSettings.parse("train", [*flags.split(), "--gradient_accumulation_steps", "8", "--warmup_steps", "3", "--fp16"])
    assert (settings.base_model, settings.adapter, settings.max_length, settings.batch_size) == ("m", Path("o"), 512, 2)
    assert (settings.epochs, settings.learning_rate, settings.load_in_4bit, settings.gradient_checkpointing) == (5, 3e-4, True, True)
    assert (settings.gradient_accumulation_steps, settings.warmup_steps, settings.asked_precision) == (8, 3, "fp16")
