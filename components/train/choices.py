"""The choices that the step makes by itself, each with its reason in English and Chinese: printed, drawn and kept in the ledger."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import NamedTuple

from components.common.device import Compute, Precision, choose_compute
from components.train.config import TrainSettings

MIN_STEPS_AN_EPOCH = 8
WARMUP_SHARE = 0.1


class Choice(NamedTuple):
    """A value that the program chose, or the user's value where it could be kept."""

    name: str
    value: str | int | float
    reason: str
    reason_zh: str


class Plan(NamedTuple):
    """How the rows become optimizer steps."""

    batch_size: int
    accumulation: int
    steps_an_epoch: int
    steps: int
    warmup_steps: int


class Decided(NamedTuple):
    """Where and how to train, and every choice behind it."""

    compute: Compute
    plan: Plan
    choices: list[Choice]


def decide(settings: TrainSettings, base: Path, rows: int) -> Decided:
    """Choose device, precision and steps for so many training rows, and print each choice with its reason."""
    compute, choices = choose_precision(settings.asked_precision, base)
    plan, planned = plan_steps(settings, rows)
    choices += planned
    if settings.load_in_4bit:
        choices.append(explain_4bit(compute))
    for choice in choices:
        print(f"{choice.name}: {choice.value} ({choice.reason})", flush=True)
    return Decided(compute, plan, choices)


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
        why = ("as asked", "按要求")
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


def plan_steps(settings: TrainSettings, rows: int) -> tuple[Plan, list[Choice]]:
    """Optimizer steps for so many rows: a small data set accumulates and warms up less, or it would hardly be trained."""
    batches = math.ceil(rows / settings.batch_size)
    accumulation = max(1, min(settings.gradient_accumulation_steps, batches // MIN_STEPS_AN_EPOCH))
    steps_an_epoch = math.ceil(batches / accumulation)
    steps = max(1, round(settings.epochs * steps_an_epoch))
    warmup = min(settings.warmup_steps, int(steps * WARMUP_SHARE))
    kept = ("as asked", "按要求")
    fewer = (
        f"{settings.gradient_accumulation_steps} asked for; fewer, because {rows} rows give only {batches} batches an epoch",
        f"要求 {settings.gradient_accumulation_steps}；{rows} 条数据每轮只有 {batches} 批，因此减少",
    )
    shorter = (
        f"{settings.warmup_steps} asked for; at most a tenth of the {steps} steps",
        f"要求 {settings.warmup_steps}；最多为 {steps} 步的十分之一",
    )
    return Plan(settings.batch_size, accumulation, steps_an_epoch, steps, warmup), [
        Choice("gradient_accumulation_steps", accumulation, *(kept if accumulation == settings.gradient_accumulation_steps else fewer)),
        Choice(
            "steps", steps, f"{settings.epochs:g} epochs of {steps_an_epoch} steps", f"{settings.epochs:g} 轮，每轮 {steps_an_epoch} 步"
        ),
        Choice("warmup_steps", warmup, *(kept if warmup == settings.warmup_steps else shorter)),
    ]


def explain_4bit(compute: Compute) -> Choice:
    """What 4-bit costs, so that nobody finds out by waiting (d18)."""
    name = precision_name(compute)
    if compute.device.type == "cpu":
        cost = ("on a CPU about the speed of bf16, and no less memory", "在 CPU 上速度与 bf16 相近，但不省内存")
    else:
        cost = ("a quarter of the memory of the weights, at about 0.75–0.95 of the speed", "权重内存约为四分之一，速度约为 0.75–0.95 倍")
    return Choice("load_in_4bit", "NF4", f"double quantisation, computes in {name}; {cost[0]}", f"双重量化，以 {name} 计算；{cost[1]}")


def _is_qwen(base: Path) -> bool:
    return "qwen" in str(json.loads((base / "config.json").read_text(encoding="utf-8")).get("model_type", "")).lower()
