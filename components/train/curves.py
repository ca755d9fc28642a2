"""The page of the loss curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from components.common.html import Html, both, card, line_chart, page, table
from components.train.recipe import Run
from components.train.rows import Data

SMOOTHING = 0.8
SHOWN_LINES = 50


def curves_page(run: Run, data: Data, info: dict[str, Any]) -> str:
    """A self-contained page in English and Chinese: loss lines, what was kept, choices with reasons, dropped rows.

    Args:
        info: the run's ledger.
    """
    body = [
        f"<h1>{both('Training', '训练')}</h1>",
        f'<p class="soft">{both("Loss in nats per token of the answers; lower is better.", "答案每个词元的损失（奈特），越低越好。")}</p>',
        _verdict(run),
        card(both("Loss", "损失"), _chart(run)),
        card(both("Epochs", "各轮"), _epochs(run)),
        card(both("Facts", "概况"), _facts(info)),
        card(both("Choices", "自动选择"), _choices(info["choices"])),
    ]
    if data.train.dropped_lines or data.validation.dropped_lines:
        body.append(card(both("Rows longer than max_length, not used", "超过 max_length 而未使用的数据"), _dropped(data)))
    return page("Training · 训练", body)


def smoothed(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Exponential moving average without the bias of its start, as TensorBoard draws it (arXiv 1412.6980, section 3)."""
    line, mean, weight = [], 0.0, 0.0
    for x, y in points:
        mean, weight = SMOOTHING * mean + (1 - SMOOTHING) * y, SMOOTHING * weight + (1 - SMOOTHING)
        line.append((x, mean / weight))
    return line


def _chart(run: Run) -> str:
    raw: list[tuple[float, float]] = [(step.number, step.loss) for step in run.steps]
    validation = [(0.0, run.validation_loss_base), *((float(point.step), point.validation_loss) for point in run.checkpoints)]
    series: dict[str, Sequence[tuple[float, float]]] = {
        "train · 训练": raw,
        "smoothed · 平滑": smoothed(raw),
        "validation · 验证": [point for point in validation if math.isfinite(point[1])],
    }
    return line_chart(series, x_label="optimizer step · 优化步")


def _verdict(run: Run) -> str:
    before, after = run.validation_loss_base, run.best.validation_loss
    lines = []
    if run.stopped_because:
        lines.append(("bad", f"Stopped early: {run.stopped_because}.", "训练提前停止：损失或梯度不是有限数。"))
    if after < before:
        lines.append(("good", f"Validation loss {before:.4f} → {after:.4f}.", f"验证损失 {before:.4f} → {after:.4f}。"))
    else:
        lines.append(("bad", f"Worse than the base model: {before:.4f} → {after:.4f}.", f"比基础模型更差：{before:.4f} → {after:.4f}。"))
    return "".join(f'<p class="{tone}">{both(english, chinese)}</p>' for tone, english, chinese in lines)


def _epochs(run: Run) -> str:
    header = ["step 步", "training loss 训练损失", "validation loss 验证损失", "kept 保留"]
    rows = [
        [point.step, f"{point.train_loss:.4f}", f"{point.validation_loss:.4f}", "✓" if point.step == run.best.step else ""]
        for point in run.checkpoints
    ]
    return table(header, [[0, "", f"{run.validation_loss_base:.4f}", ""], *rows], numeric=(0, 1, 2))


def _facts(info: dict[str, Any]) -> str:
    settings, rows, seconds = info["settings"], info["rows"], info["seconds"]
    facts = (
        ("base model", "基础模型", info["base_model"]),
        ("data digest", "数据摘要", info["data_digest"]),
        (
            "rows: training, validation, dropped",
            "数据：训练、验证、未使用",
            f"{rows['train']['used']}, {rows['validation']['used']}, {info['metrics']['rows_dropped']}",
        ),
        ("peak learning rate", "最高学习率", f"{settings['learning_rate']:g}"),
        (
            "LoRA rank, alpha, dropout",
            "LoRA 秩、alpha、dropout",
            f"{settings['lora_r']}, {settings['lora_alpha']}, {settings['lora_dropout']:g}",
        ),
        ("tokens, of which trained on", "词元，其中参与训练", f"{info['tokens']:,}, {info['trainable_tokens']:,}"),
        ("tokens per second, padding not counted", "每秒词元（不含填充）", info["metrics"]["tokens_per_second"]),
        ("seconds: loading, training", "秒：加载、训练", f"{seconds['load']:.0f}, {seconds['train']:.0f}"),
        (
            "peak memory, GiB",
            "内存峰值（GiB）",
            ", ".join(f"{name} {size / 2**30:.1f}" for name, size in info["peak_memory_bytes"].items()),
        ),
        ("versions", "版本", ", ".join(f"{name} {number}" for name, number in info["versions"].items())),
    )
    return table(["name 名称", "value 值"], ((Html(both(english, chinese)), value) for english, chinese, value in facts))


def _choices(choices: Sequence[dict[str, Any]]) -> str:
    rows = [[choice["name"], choice["value"], Html(both(choice["reason"], choice["reason_zh"]))] for choice in choices]
    return table(["name 名称", "value 值", "reason 原因"], rows)


def _dropped(data: Data) -> str:
    rows = []
    for name, split in (("train 训练", data.train), ("validation 验证", data.validation)):
        lines = split.dropped_lines
        more = " …" if len(lines) > SHOWN_LINES else ""
        rows.append([name, len(lines), ", ".join(map(str, lines[:SHOWN_LINES])) + more])
    return table(["split 划分", "rows 条数", "source lines 源文件行号"], rows, numeric=(1,))
