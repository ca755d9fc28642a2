"""What the train step chooses by itself: precision, length, batch, base, steps, and how it says so; and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from components.common.device import Compute
from components.common.errors import DataError, UserError
from components.train.choices import choose_precision, decide, explain_quantization, padding_share, resolve, settings_that_fit
from components.train.config import TrainSettings
from components.train.forecast import GIB, USABLE_SHARE, Memory, Seen, read_shape
from components.train.model import quantization_config
from components.train.plan import Plan
from components.train.recipe import learning_rate_share
from tests.unit.train_support import plan_of

LONG_ROWS = (300,) * 3900 + (2000,) * 100  # the longest 16 rows: 32,000 tokens
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


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}), encoding="utf-8")
    return tmp_path


@pytest.fixture
def qwen_7b(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(QWEN_7B), encoding="utf-8")
    return tmp_path


def seen_on(base: Path, card_gib: float, lengths: tuple[int, ...] = LONG_ROWS, *, device: str = "cuda", **changes: Any) -> Seen:
    """A pretended card with three hundredths of its memory in use."""
    total = int(card_gib * GIB)
    compute = Compute(torch.device(device), torch.bfloat16, "")
    seen = Seen(read_shape(base), compute, Memory(int(0.97 * total), total), lengths, [length // 2 for length in lengths])
    return seen._replace(**changes)


def planned(seen: Seen, **settings: Any) -> tuple[Plan, dict[str, str]]:
    """The plan, and the reasons by name."""
    plan, choices = resolve(TrainSettings(**settings), seen)
    return plan, {choice.name: choice.reason for choice in choices}


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


def test_d18_the_cost_of_quantisation_is_told_before_it_is_paid() -> None:
    on_cpu, on_gpu, slow = (
        Compute(torch.device(device), dtype, "")
        for device, dtype in (("cpu", torch.bfloat16), ("cuda", torch.bfloat16), ("cuda", torch.float32))
    )
    assert "no less memory" in explain_quantization("nf4", on_cpu)[0]
    assert "0.75–0.95 of the speed" in explain_quantization("nf4", on_gpu)[0]
    assert "computes in bf16" in explain_quantization("nf4", on_gpu)[0]
    assert "half of the memory" in explain_quantization("int8", on_gpu)[0]
    assert "fp32 is far slower" in explain_quantization("nf4", slow)[0]


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_d18_4bit_computes_in_the_precision_that_was_told(precision: str) -> None:
    plan = plan_of(precision=precision, quantization="nf4")
    config = quantization_config(plan)
    assert config.bnb_4bit_compute_dtype == plan.compute.dtype
    assert f"computes in {precision}" in explain_quantization("nf4", plan.compute)[0]


def test_every_choice_is_printed_with_its_reason_in_both_languages(tiny_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan, choices = decide(TrainSettings(precision="fp32", load_in_4bit=True), tiny_model, [50] * 21, [20] * 21)
    said = capsys.readouterr().out
    autos = {name for name in TrainSettings.model_fields if TrainSettings.default(name) == "auto"}
    assert autos - {"sharding"} <= {choice.name for choice in choices}
    assert {"device", "threads", "steps", "evaluate_every", "memory"} <= {choice.name for choice in choices}
    for choice in choices:
        assert f"{choice.name}: {choice.value} ({choice.reason})" in said
        assert choice.reason
        assert any("\u4e00" <= letter <= "\u9fff" or letter.isdigit() for letter in choice.reason_zh), choice
    assert (plan.precision, plan.quantization) == ("fp32", "nf4")


@pytest.mark.parametrize(
    ("card_gib", "quantization", "checkpointing", "batch_size"),
    [(80, "none", False, 2), (40, "none", False, 1), (24, "none", True, 2), (16, "nf4", True, 4), (12, "nf4", True, 1)],
)
def test_qwen_7b_on_cards_of_several_sizes(card_gib: int, quantization: str, checkpointing: bool, batch_size: int, qwen_7b: Path) -> None:
    plan, reasons = planned(seen_on(qwen_7b, card_gib))
    assert (plan.quantization, plan.gradient_checkpointing, plan.batch_size) == (quantization, checkpointing, batch_size)
    assert plan.rows_a_step == 16
    if checkpointing:
        assert "without it: " in reasons["gradient_checkpointing"]
    if quantization == "nf4":
        assert "the base in bf16 would need" in reasons["quantization"]
    assert f"{2 * batch_size} at a time would need" in reasons["batch_size"]


def test_short_rows_leave_room_for_a_larger_batch(qwen_7b: Path) -> None:
    plan, reasons = planned(seen_on(qwen_7b, 80, (300,) * 4000))
    assert (plan.batch_size, plan.accumulation, plan.quantization, plan.gradient_checkpointing) == (8, 2, "none", False)
    assert "the most that is used" in reasons["batch_size"]


def test_what_does_not_fit_is_refused_with_settings_that_do(qwen_7b: Path) -> None:
    seen = seen_on(qwen_7b, 24)
    settings = TrainSettings(batch_size=8, gradient_checkpointing=False, quantization="none")
    with pytest.raises(UserError) as error:
        resolve(settings, seen)
    changes = settings_that_fit(settings, seen)
    assert changes
    for change in changes:
        resolve(settings.model_copy(update=change), seen)
        for name, value in change.items():
            assert f"--{name} {str(value).lower()}" in error.value.fix or name == "load_in_8bit"
    assert "23.3 GiB are free" in error.value.what
    assert "batch_size 8, max_length 2048" in error.value.where


def test_one_change_is_named_where_one_is_enough(qwen_7b: Path) -> None:
    seen = seen_on(qwen_7b, 40)
    settings = TrainSettings(batch_size=4, gradient_checkpointing=False)
    changes = settings_that_fit(settings, seen)
    assert {"batch_size": 1} in changes
    assert {"gradient_checkpointing": True} in changes
    for change in changes:
        resolve(settings.model_copy(update=change), seen)


def test_a_shorter_max_length_is_proposed_with_its_cost_and_never_taken(qwen_7b: Path) -> None:
    seen = seen_on(qwen_7b, 10)
    with pytest.raises(UserError) as error:
        resolve(TrainSettings(), seen)
    (change,) = (change for change in settings_that_fit(TrainSettings(), seen) if "max_length" in change)
    assert f"--max_length {change['max_length']} (drops 100 of 4000 rows)" in error.value.fix
    assert resolve(TrainSettings(**change), seen)[0].max_length == change["max_length"]


def test_a_card_that_is_far_too_small_says_how_large_it_must_be(qwen_7b: Path) -> None:
    with pytest.raises(UserError) as error:
        resolve(TrainSettings(), seen_on(qwen_7b, 4))
    assert "use a smaller base model, or a device with " in error.value.fix
    needed = float(error.value.fix.split("a device with ")[1].split(" GiB")[0])
    resolve(TrainSettings(), seen_on(qwen_7b, needed / 0.97 + 0.1))


def test_an_8_gib_card_is_refused_with_what_would_fit(qwen_7b: Path) -> None:
    seen = seen_on(qwen_7b, 8)
    with pytest.raises(UserError, match="training needs about"):
        resolve(TrainSettings(), seen)
    changes = settings_that_fit(TrainSettings(), seen)
    assert changes, "a smaller rank and shorter rows fit"
    for change in changes:
        resolve(TrainSettings(**change), seen)


def test_a_refusal_comes_before_the_model_is_loaded(qwen_7b: Path) -> None:
    lengths = [2000] * 500  # there are no weights in this folder, and no CPU has the memory for so many tokens
    with pytest.raises(UserError) as error:
        decide(TrainSettings(batch_size=100_000), qwen_7b, lengths * 200, lengths * 200)
    assert "--batch_size" in error.value.fix or "a smaller base model" in error.value.fix


def test_what_is_asked_for_is_kept(qwen_7b: Path) -> None:
    asked = {
        "max_length": 512,
        "batch_size": 3,
        "gradient_accumulation_steps": 5,
        "packing": False,
        "epochs": 7.0,
        "learning_rate": 3e-4,
        "lora_r": 5,
        "lora_alpha": 9,
        "lora_dropout": 0.2,
        "quantization": "int8",
        "gradient_checkpointing": True,
        "warmup_steps": 2,
    }
    plan, reasons = planned(seen_on(qwen_7b, 80), **asked)
    kept = vars(plan) | {"gradient_accumulation_steps": plan.accumulation}
    assert {name: kept[name] for name in asked} == asked
    assert all(reasons[name].startswith("as asked") for name in asked), reasons


def test_an_asked_batch_is_completed_to_sixteen_rows_and_an_asked_accumulation_too(qwen_7b: Path) -> None:
    seen = seen_on(qwen_7b, 80, (200,) * 4000)
    assert planned(seen, batch_size=2)[0].accumulation == 8
    assert planned(seen, batch_size=32)[0].accumulation == 1
    plan = planned(seen, gradient_accumulation_steps=8)[0]
    assert (plan.batch_size, plan.accumulation) == (2, 8)
    assert planned(seen, gradient_accumulation_steps=64)[0].rows_a_step == 64


def test_several_processes_share_the_rows_of_a_step(qwen_7b: Path) -> None:
    for processes, batch_size, accumulation in ((2, 8, 1), (8, 2, 1), (32, 1, 1)):
        plan, reasons = planned(seen_on(qwen_7b, 80, (200,) * 4000, processes=processes))
        assert (plan.batch_size, plan.accumulation) == (batch_size, accumulation)
        assert reasons["sharding"] == "the memory suffices without it"


def test_a_base_is_spread_only_where_not_even_4bit_fits(qwen_7b: Path) -> None:
    small = {"lora_r": 8, "max_length": 384}
    whole, _ = planned(seen_on(qwen_7b, 10, processes=8), **small)
    spread, reasons = planned(seen_on(qwen_7b, 8, processes=8), quantization="none", **small)
    assert (whole.quantization, whole.sharded) == ("nf4", False)
    assert (spread.quantization, spread.sharded) == ("none", True)
    assert "would need" in reasons["sharding"]
    assert planned(seen_on(qwen_7b, 80, processes=2), sharding="full")[0].sharded
    assert "there is one process" in planned(seen_on(qwen_7b, 80), sharding="full")[1]["sharding"]
    with pytest.raises(UserError, match="can't be spread"):
        planned(seen_on(qwen_7b, 80, processes=2), sharding="full", quantization="nf4")


def test_a_cpu_takes_4bit_only_when_asked(qwen_7b: Path) -> None:
    with pytest.raises(UserError) as error:
        planned(seen_on(qwen_7b, 16, device="cpu"))
    assert "nf4" not in error.value.fix
    plan, reasons = planned(seen_on(qwen_7b, 16, (100,) * 40, device="cpu"), quantization="nf4")
    assert plan.quantization == "nf4"
    assert "no less memory" in reasons["quantization"]


@pytest.mark.parametrize(
    ("lengths", "card_gib", "max_length", "said"),
    [
        ((100,) * 990 + (900,) * 10, 80, 960, "rounded up to 64; 0 of 1000"),
        ((100,) * 997 + (900,) * 3, 80, 128, "3 of 1000 rows are longer and dropped"),
        ((100,) * 90 + (9000,) * 10, 80, 4096, "the most on this device"),
        ((100,) * 90 + (9000,) * 10, 16, 2048, "10 of 100 rows"),
    ],
)
def test_the_longest_row_follows_from_the_lengths_and_the_card(
    lengths: tuple[int, ...], card_gib: int, max_length: int, said: str, qwen_7b: Path
) -> None:
    plan, reasons = planned(seen_on(qwen_7b, card_gib, lengths))
    assert plan.max_length == max_length
    assert said in reasons["max_length"]


def test_a_max_length_that_leaves_no_row_is_a_mistake(qwen_7b: Path) -> None:
    with pytest.raises(DataError) as error:
        planned(seen_on(qwen_7b, 80, (100, 200)), max_length=64)
    assert (error.value.where, error.value.fix) == ("--max_length", "set it to 100 or more, or shorten the rows")


@pytest.mark.parametrize(
    ("rows", "settings", "found"),
    [
        (500, {}, (16, 32, 0.05, 1e-4, 3)),
        (1_500, {}, (16, 32, 0, 2e-4, 3)),
        (2_000, {"epochs": 4}, (32, 64, 0, 1e-4, 4)),
        (6_000, {"use_rslora": True}, (32, 32, 0, 2e-4, 2)),
        (60_000, {}, (32, 64, 0, 2e-4, 1)),
        (60_000, {"use_rslora": True}, (64, 64, 0, 2e-4, 1)),
    ],
)
def test_rank_dropout_rate_and_epochs_follow_from_the_rows(
    rows: int, settings: dict[str, Any], found: tuple[float, ...], qwen_7b: Path
) -> None:
    plan, _ = planned(seen_on(qwen_7b, 80, (100,) * rows), **settings)
    assert (plan.lora_r, plan.lora_alpha, plan.lora_dropout, plan.learning_rate, plan.epochs) == found


def test_twenty_rows_give_enough_steps_and_the_reason_is_told(qwen_7b: Path) -> None:
    plan, reasons = planned(seen_on(qwen_7b, 80, (100,) * 21), warmup_steps=10)
    assert (plan.batch_size, plan.accumulation, plan.steps_an_epoch, plan.steps) == (2, 1, 11, 33)
    assert plan.warmup_steps == 3
    assert "so that an epoch of 21 rows has at least 8 steps" in reasons["batch_size"]
    assert "10 asked for; at most a tenth" in reasons["warmup_steps"]


def test_a_large_data_set_warms_up_for_three_hundredths_of_its_steps(qwen_7b: Path) -> None:
    plan, reasons = planned(seen_on(qwen_7b, 80, (100,) * 3_200), evaluations_per_epoch=4)
    assert (plan.steps_an_epoch, plan.steps, plan.warmup_steps, plan.evaluate_every) == (200, 600, 18, 50)
    assert "3 % of the 600 steps" in reasons["warmup_steps"]
    assert planned(seen_on(qwen_7b, 80, (100,) * 800), epochs=1.0)[0].warmup_steps == 5, "at least five"


def test_a_part_of_an_epoch_and_a_single_row_are_possible(qwen_7b: Path) -> None:
    assert planned(seen_on(qwen_7b, 80, (100,) * 1600), epochs=0.5)[0].steps == 50
    assert planned(seen_on(qwen_7b, 80, (100,)), epochs=0.01)[0].steps == 1


def test_padding_is_counted_in_the_rows_own_order() -> None:
    assert padding_share([1, 3, 2, 2], 2) == pytest.approx(2 / 10)
    assert padding_share([5, 1, 9], 1) == 0


def test_without_packing_the_padding_costs_memory(qwen_7b: Path) -> None:
    lengths = (2000,) + (100,) * 4000
    packed, padded = (planned(seen_on(qwen_7b, 80, lengths), packing=packing, max_length=2048)[0] for packing in (True, False))
    assert packed.batch_size == 8
    assert padded.batch_size < 8


def test_a_tenth_of_the_memory_stays_free(qwen_7b: Path) -> None:
    plan, choices = resolve(TrainSettings(), seen_on(qwen_7b, 24))
    value = str(next(choice.value for choice in choices if choice.name == "memory"))
    needed, free = (float(part.split()[0]) for part in value.split(" of "))
    assert value == f"{needed} GiB forecast of {free} GiB free"
    assert needed <= USABLE_SHARE * free + 0.05
    assert plan.gradient_checkpointing


def test_the_learning_rate_rises_linearly_and_falls_as_a_cosine_to_a_tenth() -> None:
    plan = plan_of(steps=100, warmup_steps=10)
    rates = [learning_rate_share(step, plan) for step in range(101)]
    assert rates[:3] == pytest.approx([1 / 11, 2 / 11, 3 / 11])
    assert max(rates) == rates[10] == pytest.approx(1)
    assert rates[55] == pytest.approx(0.55)
    assert rates[100] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_without_warm_up_the_first_step_has_the_full_rate() -> None:
    plan = plan_of(steps=18, warmup_steps=0)
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


def test_rows_that_are_all_longer_than_the_cap_are_refused_with_a_length_that_works(qwen_7b: Path) -> None:
    with pytest.raises(DataError, match="every training row is longer than 4096 tokens") as error:
        planned(seen_on(qwen_7b, 80, (5000, 6000)))
    assert "5000" in error.value.fix
