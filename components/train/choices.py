"""The choices that the step makes by itself, each with its reason in English and Chinese: printed, drawn and kept in the ledger.

What is asked for is kept, or its change is explained. The defaults by rows follow what the trainers in use have in common: QLoRA
(arXiv 2305.14314), unsloth, axolotl, LLaMA-Factory, and "LoRA Without Regret" for the small effective batch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

from components.common.device import Compute, Precision, choose_compute
from components.common.errors import DataError, UserError
from components.common.memory import device_memory
from components.train.config import Auto, Quantization, TrainSettings
from components.train.forecast import (
    BATCH_SIZES,
    GIB,
    MIN_STEPS_AN_EPOCH,
    ROWS_A_STEP,
    USABLE_SHARE,
    Seen,
    Used,
    Way,
    gib,
    read_shape,
    way_of,
    ways_to_train,
)
from components.train.plan import Choice, Plan

WARMUP_SHARE, LEAST_WARMUP, MOST_WARMUP_SHARE = 0.03, 5, 0.1
FEW_ROWS = 1_000
SMALLER_RANKS = (16, 8)
KEPT_SHARE = 0.995  # of the rows are not longer than max_length
LENGTH_UNIT = 64
LONGEST, LONGEST_ON_BIG_CARDS = 2048, 4096
BIG_CARD_BYTES = 22 * GIB  # cards sold as 24 GB say 22.5 to 24 GiB

Why = tuple[str, str]
AS_ASKED: Why = ("as asked", "按要求")
T = TypeVar("T", bound=str | int | float)


def decide(
    settings: TrainSettings, base: Path, lengths: Sequence[int], answer_lengths: Sequence[int], *, processes: int = 1
) -> tuple[Plan, list[Choice]]:
    """Resolve every `auto` from the rows, the base model and the device, and print each choice with its reason.

    Raises:
        UserError: it will not fit the memory, whatever is left to choose; the settings that would fit are named.
        DataError: every row is longer than the `max_length` that is asked for.
        ModelError: config.json or a weight file is broken.
    """
    shape = read_shape(base)
    compute, choices = choose_precision(settings.asked_precision, base)
    seen = Seen(shape, compute, device_memory(compute.device, processes), lengths, answer_lengths, processes)
    plan, more = resolve(settings, seen)
    for choice in [*choices, *more]:
        print(f"{choice.name}: {choice.value} ({choice.reason})", flush=True)
    return plan, [*choices, *more]


def resolve(settings: TrainSettings, seen: Seen) -> tuple[Plan, list[Choice]]:
    """The plan for what is seen, and every choice in it.

    Raises:
        UserError, DataError: see `decide`.
    """
    way, used, choices = _best_way(settings, seen)
    if not way.fits:
        raise _refusal(settings, seen, way)
    choices += _explain_batch(settings, seen, way, used) + _explain_memory(settings, seen, way, used)
    plan, steps = plan_steps(settings, way.plan, len(used.lengths))
    return plan, choices + steps


def choose_precision(asked: Precision, base: Path) -> tuple[Compute, list[Choice]]:
    """Device and precision to train with; fp16 only on a GPU, and never for Qwen, which overflows in it (d17)."""
    refused = ("", "")
    precision = asked
    if asked == "fp16":
        if _is_qwen(base):
            refused = ("fp16 was asked for, but Qwen models overflow in it", "要求 fp16，但 Qwen 模型在 fp16 下会溢出")
        elif choose_compute("fp16").device.type == "cpu":
            refused = ("fp16 was asked for, but a CPU can't train in it", "要求 fp16，但 CPU 不能用它训练")
        if refused[0]:
            precision = "auto"
    compute = choose_compute(precision)
    name = precision_name(compute)
    if precision != "auto":
        why = AS_ASKED
    elif name == "bf16":
        why = ("this device computes it natively", "此设备原生支持")
    else:
        why = ("this device has no native bf16", "此设备不原生支持 bf16")
    reason, reason_zh = ("; ".join(part) for part in zip(refused, why, strict=True)) if refused[0] else why
    import torch

    found = ("found", "已找到") if compute.device.type == "cuda" else ("no GPU found", "没有 GPU")
    return compute, [
        Choice("device", compute.device.type, *found),
        Choice("precision", name, f"{reason}; the LoRA weights stay in fp32", f"{reason_zh}；LoRA 权重保持 fp32"),
        Choice("threads", torch.get_num_threads(), "the CPUs that this process may use", "本进程可用的 CPU 数"),
    ]


def precision_name(compute: Compute) -> str:
    """bf16, fp16 or fp32."""
    return {"torch.bfloat16": "bf16", "torch.float16": "fp16", "torch.float32": "fp32"}[str(compute.dtype)]


def choose_max_length(asked: int | Auto, seen: Seen) -> Choice:
    """The longest row that is used: nearly all of them, up to a cap that the device and the model set.

    Raises:
        DataError: every row is longer.
    """
    ordered = sorted(seen.lengths)
    found = ordered[math.ceil(KEPT_SHARE * len(ordered)) - 1]
    big = seen.compute.device.type == "cuda" and seen.memory.total_bytes >= BIG_CARD_BYTES
    cap = min(LONGEST_ON_BIG_CARDS if big else LONGEST, seen.shape.longest)
    rounded = math.ceil(found / LENGTH_UNIT) * LENGTH_UNIT
    if asked != "auto":
        value, why = asked, AS_ASKED
    elif rounded > cap:
        value = cap
        why = (f"the most on this device; 99.5 % of the rows have up to {found}", f"此设备的上限；99.5% 的数据不超过 {found}")
    else:
        value = rounded
        why = (f"99.5 % of the rows have up to {found}, rounded up to {LENGTH_UNIT}", f"99.5% 的数据不超过 {found}，按 {LENGTH_UNIT} 取整")
    if value < ordered[0]:
        raise DataError(
            f"every training row is longer than {value} tokens",
            where="--max_length",
            fix=f"set it to {ordered[0]} or more, or shorten the rows",
        )
    dropped = sum(length > value for length in ordered)
    return Choice(
        "max_length",
        value,
        f"{why[0]}; {dropped} of {len(ordered)} rows are longer and dropped",
        f"{why[1]}；{len(ordered)} 条中有 {dropped} 条超长，不使用",
    )


def plan_steps(settings: TrainSettings, plan: Plan, rows: int) -> tuple[Plan, list[Choice]]:
    """Optimizer steps for so many training rows, the warm-up among them, and how often the validation loss is measured."""
    steps_an_epoch = math.ceil(rows / plan.rows_a_step)
    steps = max(1, round(plan.epochs * steps_an_epoch))
    most = int(steps * MOST_WARMUP_SHARE)
    wanted = max(LEAST_WARMUP, math.ceil(WARMUP_SHARE * steps)) if settings.warmup_steps == "auto" else settings.warmup_steps
    if wanted > most:
        said = "wanted" if settings.warmup_steps == "auto" else "asked for"
        warmup_why = (f"{wanted} {said}; at most a tenth of the {steps} steps", f"需要 {wanted}；最多为 {steps} 步的十分之一")
    elif settings.warmup_steps == "auto":
        warmup_why = (f"3 % of the {steps} steps, at least {LEAST_WARMUP}", f"{steps} 步的 3%，至少 {LEAST_WARMUP} 步")
    else:
        warmup_why = AS_ASKED
    evaluate_every = max(1, math.ceil(steps_an_epoch / settings.evaluations_per_epoch))
    often, patience = settings.evaluations_per_epoch, settings.patience
    stops = (f"; {patience} without a lower loss end the run", f"；连续 {patience} 次不下降则停止") if patience else ("", "")
    plan = replace(plan, steps_an_epoch=steps_an_epoch, steps=steps, warmup_steps=min(wanted, most), evaluate_every=evaluate_every)
    return plan, [
        Choice("steps", steps, f"{plan.epochs:g} epochs of {steps_an_epoch} steps", f"{plan.epochs:g} 轮，每轮 {steps_an_epoch} 步"),
        Choice("warmup_steps", plan.warmup_steps, *warmup_why),
        Choice("evaluate_every", evaluate_every, f"steps; {often} an epoch{stops[0]}", f"步；每轮 {often} 次{stops[1]}"),
    ]


def explain_quantization(quantization: Quantization, compute: Compute) -> Why:
    """What 4-bit or 8-bit costs, so that nobody finds out by waiting (d18). On the CPU: measured on SmolLM2-135M; else published."""
    name = precision_name(compute)
    on_cpu = compute.device.type == "cpu"
    if quantization == "nf4":
        what = (f"4-bit NF4, double quantisation, computes in {name}", f"4 位 NF4，双重量化，以 {name} 计算")
        cost = ("a quarter of the memory of the weights, at about 0.75–0.95 of the speed", "权重内存约为四分之一，速度约为 0.75–0.95 倍")
        if on_cpu:
            cost = ("on a CPU about the speed of bf16, and no less memory", "在 CPU 上速度与 bf16 相近，但不省内存")
    else:
        what = (f"8-bit LLM.int8(), computes in {name}", f"8 位 LLM.int8()，以 {name} 计算")
        cost = ("half of the memory of the weights; slower than 4-bit", "权重内存约为一半，比 4 位更慢")
        if on_cpu:
            cost = ("on a CPU about 0.7 of the speed of bf16, and no less memory", "在 CPU 上速度约为 bf16 的 0.7 倍，且不省内存")
    if name == "fp32":
        cost = (f"{cost[0]}; fp32 is far slower than bf16 would be", f"{cost[1]}；fp32 比 bf16 慢得多")
    return f"{what[0]}; {cost[0]}", f"{what[1]}；{cost[1]}"


def _best_way(settings: TrainSettings, seen: Seen) -> tuple[Way, Used, list[Choice]]:
    """The first way that fits, else the leanest; and the choices that follow from the rows alone."""
    longest = choose_max_length(settings.max_length, seen)
    pairs = [pair for pair in zip(seen.lengths, seen.answer_lengths, strict=True) if pair[0] <= int(longest.value)]
    used = Used(*(sorted(part, reverse=True) for part in zip(*pairs, strict=True)))
    draft, choices = _choose_by_rows(settings, seen, int(longest.value), [length for length, _ in pairs])
    ways = list(ways_to_train(settings, seen, draft, used))
    way = next((way for way in ways if way.fits), min(ways, key=lambda way: way.forecast.total_bytes))
    return way, used, [longest, *choices]


def _choose_by_rows(settings: TrainSettings, seen: Seen, max_length: int, lengths: Sequence[int]) -> tuple[Plan, list[Choice]]:
    """What follows from the rows that are used; the rest of the plan is a draft."""
    choices: list[Choice] = []
    rows = len(lengths)

    def take(name: str, asked: T | Auto, found: T, english: str, chinese: str) -> T:
        value = found if asked == "auto" else cast(T, asked)
        choices.append(Choice(name, shown(value), *((english, chinese) if asked == "auto" else AS_ASKED)))
        return value

    of_rows = (f"{rows} training rows", f"{rows} 条训练数据")
    epochs = take("epochs", settings.epochs, 3.0 if rows <= 5_000 else 2.0 if rows <= 50_000 else 1.0, *of_rows)
    many = rows > 50_000 and settings.use_rslora
    lora_r = take("lora_r", settings.lora_r, 16 if rows < 2_000 else 64 if many else 32, *of_rows)
    alpha, of_rank = (lora_r, ("r, with rsLoRA", "rsLoRA 取 r")) if settings.use_rslora else (2 * lora_r, ("2 r", "取 2 r"))
    padding = padding_share(lengths, BATCH_SIZES[0] if settings.batch_size == "auto" else settings.batch_size)
    of_padding = (
        f"padding would be {padding:.0%} of the tokens; no row sees another",
        f"填充会占 token 的 {padding:.0%}；各条数据互不可见",
    )
    few = rows < FEW_ROWS
    rate, of_epochs = 1e-4 if few or epochs > 3 else 2e-4, (f"{of_rows[0]}, {epochs:g} epochs", f"{of_rows[1]}，{epochs:g} 轮")
    return Plan(
        compute=seen.compute,
        precision=precision_name(seen.compute),
        quantization="none",
        max_length=max_length,
        batch_size=1,
        accumulation=1,
        packing=take("packing", settings.packing, True, *of_padding),
        gradient_checkpointing=False,
        epochs=epochs,
        steps_an_epoch=1,
        steps=1,
        evaluate_every=1,
        warmup_steps=0,
        learning_rate=take("learning_rate", settings.learning_rate, rate, *of_epochs),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        lora_r=lora_r,
        lora_alpha=take("lora_alpha", settings.lora_alpha, alpha, *of_rank),
        lora_dropout=take("lora_dropout", settings.lora_dropout, 0.05 if few else 0.0, *of_rows),
        use_rslora=settings.use_rslora,
        use_dora=settings.use_dora,
        patience=settings.patience,
        seed=settings.seed,
        processes=seen.processes,
    ), choices


def padding_share(lengths: Sequence[int], batch_size: int) -> float:
    """The share of padding when rows in their given order are padded to the longest of their micro-batch."""
    batches = [lengths[at : at + batch_size] for at in range(0, len(lengths), batch_size)]
    return 1 - sum(lengths) / sum(max(batch) * len(batch) for batch in batches)


def shown(value: str | float) -> str | int | float:
    """How a choice's value is printed and kept."""
    return ("on" if value else "off") if isinstance(value, bool) else value


def _explain_batch(settings: TrainSettings, seen: Seen, way: Way, used: Used) -> list[Choice]:
    """Why so many rows at a time, and in an optimizer step."""
    plan, rows = way.plan, len(used.lengths)
    few = rows < MIN_STEPS_AN_EPOCH * ROWS_A_STEP
    goal = (
        f"so that an epoch of {rows} rows has at least {MIN_STEPS_AN_EPOCH} steps",
        f"使 {rows} 条数据的每轮至少有 {MIN_STEPS_AN_EPOCH} 步",
    )
    twice = way_of(replace(plan, batch_size=2 * plan.batch_size), seen, used)
    if settings.batch_size != "auto":
        batch_why = AS_ASKED
    elif not twice.fits:
        batch_why = (f"{2 * plan.batch_size} at a time would need {twice.gib}", f"一次 {2 * plan.batch_size} 条需要 {twice.gib}")
    elif plan.batch_size == BATCH_SIZES[0]:
        batch_why = ("the most that is used; the memory suffices", "最大取值；内存足够")
    else:
        batch_why = goal if few else (f"an optimizer step takes {ROWS_A_STEP} rows", f"每个优化步 {ROWS_A_STEP} 条")
    step_why = (f"{plan.rows_a_step} rows in an optimizer step", f"每个优化步 {plan.rows_a_step} 条")
    if settings.gradient_accumulation_steps != "auto":
        step_why = AS_ASKED
    elif few:
        step_why = (f"{step_why[0]}, {goal[0]}", f"{step_why[1]}，{goal[1]}")
    return [Choice("batch_size", plan.batch_size, *batch_why), Choice("gradient_accumulation_steps", plan.accumulation, *step_why)]


def _explain_memory(settings: TrainSettings, seen: Seen, way: Way, used: Used) -> list[Choice]:
    """Why this checkpointing, quantisation and sharding, and the memory it all needs."""
    plan = way.plan
    smallest = replace(plan, batch_size=1 if settings.batch_size == "auto" else plan.batch_size)
    plain = way_of(replace(smallest, gradient_checkpointing=False), seen, used)
    whole = way_of(
        replace(smallest, gradient_checkpointing=settings.gradient_checkpointing is not False, quantization="none", sharded=False),
        seen,
        used,
    )
    enough = ("the memory suffices without it", "不开启内存也足够")
    if settings.gradient_checkpointing != "auto":
        checkpointing_why = AS_ASKED
    elif plan.gradient_checkpointing:
        checkpointing_why = (f"without it: {plain.gib}; about a third slower", f"不开启需要 {plain.gib}；约慢三分之一")
    else:
        checkpointing_why = enough
    base_why = (f"the base in {plan.precision} would need {whole.gib}", f"{plan.precision} 底座需要 {whole.gib}")
    asked = settings.asked_quantization
    quantization_why = AS_ASKED
    if asked == "auto" and plan.quantization == "none":
        quantization_why = ("on a CPU it saves no memory and no time", "在 CPU 上不省内存也不省时间") if seen.on_cpu else enough
    elif plan.quantization != "none":
        first = base_why if asked == "auto" else AS_ASKED
        cost = explain_quantization(plan.quantization, seen.compute)
        quantization_why = (f"{first[0]}; {cost[0]}", f"{first[1]}；{cost[1]}")
    choices = [
        Choice("gradient_checkpointing", shown(plan.gradient_checkpointing), *checkpointing_why),
        Choice("quantization", plan.quantization, *quantization_why),
    ]
    if seen.processes > 1 or settings.sharding != "auto":
        sharding_why = AS_ASKED if settings.sharding != "auto" else base_why if plan.sharded else enough
        if settings.sharding == "full" and not plan.sharded:
            sharding_why = ("full was asked for, but there is one process", "要求 full，但只有一个进程")
        choices.append(Choice("sharding", "full" if plan.sharded else "none", *sharding_why))
    return [*choices, _memory_choice(way)]


def _memory_choice(way: Way) -> Choice:
    parts = way.forecast
    of = (
        (parts.weights_bytes, "weights", "权重"),
        (parts.lora_bytes + parts.optimizer_bytes, "LoRA and optimizer", "LoRA 与优化器"),
        (parts.activations_bytes, f"activations of {way.tokens} tokens", f"{way.tokens} 个 token 的激活"),
        (parts.logits_bytes, "head", "输出层"),
        (parts.overhead_bytes, "libraries", "程序库"),
    )
    english, chinese = (mark.join(f"{part[at]} {gib(int(part[0]))}" for part in of) for at, mark in ((1, ", "), (2, "，")))
    return Choice(
        "memory", f"{way.gib} forecast of {gib(way.memory.free_bytes)} free", f"{english}; a tenth stays free", f"{chinese}；留出一成"
    )


def _refusal(settings: TrainSettings, seen: Seen, way: Way) -> UserError:
    """Why nothing fits, and what would."""
    plan = way.plan
    changes = settings_that_fit(settings, seen)
    ways = [_flags(change, settings, seen) for change in changes] + ["a smaller base model"]
    ways.append(f"a device with {gib(way.forecast.total_bytes / USABLE_SHARE)} of free memory")
    return UserError(
        f"training needs about {way.gib} of memory at the least, and {gib(seen.memory.free_bytes)} are free",
        where=f"{seen.compute.device.type}, batch_size {plan.batch_size}, max_length {plan.max_length}, quantization {plan.quantization}, "
        f"gradient_checkpointing {shown(plan.gradient_checkpointing)}",
        fix=f"use {', or '.join(ways)}",
    )


def settings_that_fit(settings: TrainSettings, seen: Seen) -> list[dict[str, Any]]:
    """Changes of the settings, each of which makes it fit: single ones that keep half of the rows; else all of them together."""
    steps: list[list[dict[str, Any]]] = []
    if settings.batch_size != "auto":
        steps.append([{"batch_size": size} for size in BATCH_SIZES if size < settings.batch_size])
    if settings.gradient_checkpointing is False:
        steps.append([{"gradient_checkpointing": True}])
    if settings.asked_quantization in ("none", "int8") and settings.sharding != "full" and not seen.on_cpu:
        steps.append([{"quantization": "nf4", "load_in_8bit": False}])
    if settings.sharding == "none" and seen.processes > 1:
        steps.append([{"sharding": "auto"}])
    rank = _best_way(settings, seen)[0].plan.lora_r
    steps.append([{"lora_r": smaller} for smaller in SMALLER_RANKS if smaller < rank])
    longest = int(choose_max_length(settings.max_length, seen).value)
    units = range((longest - 1) // LENGTH_UNIT, 0, -1)
    shorter: list[dict[str, Any]] = [{"max_length": unit * LENGTH_UNIT} for unit in units if unit * LENGTH_UNIT >= min(seen.lengths)]
    median = sorted(seen.lengths)[len(seen.lengths) // 2]
    steps_alone = [*steps, [change for change in shorter if change["max_length"] >= median]]

    def first_that_fits(changes: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        return next(([change] for change in changes if _best_way(settings.model_copy(update=change), seen)[0].fits), [])

    leanest = {name: value for changes in steps for name, value in (changes or [{}])[-1].items()}
    return (
        [change for changes in steps_alone for change in first_that_fits(changes)]
        or first_that_fits([leanest])
        or first_that_fits([leanest | change for change in shorter])
    )


def _flags(change: dict[str, Any], settings: TrainSettings, seen: Seen) -> str:
    """A change as flags, and the rows it costs."""
    flags = " ".join(f"--{name} {str(value).lower()}" for name, value in change.items() if name != "load_in_8bit")
    if "load_in_8bit" in change and settings.load_in_8bit:
        flags += " instead of --load_in_8bit"
    if "max_length" in change:
        flags += f" (drops {sum(length > change['max_length'] for length in seen.lengths)} of {len(seen.lengths)} rows)"
    return flags


def _is_qwen(base: Path) -> bool:
    return "qwen" in str(json.loads((base / "config.json").read_text(encoding="utf-8")).get("model_type", "")).lower()
