"""The page of a training: its curves, its self-test, what it took, and why it went as it did."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from components.common.html import Html, both, card, escape, folded, line_chart, page, table
from components.train.rows import Data
from components.train.run import Run

SMOOTHING = 0.8
SHOWN_LINES = 50
SHOWN_POINTS = 1000  # of a curve: more than a screen has columns
GIB = 2**30
STEP_AXIS = "optimizer step · 优化步"
LAYOUT = (
    "<style>.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(420px,1fr));gap:0 14px}.charts svg{overflow:visible}.charts svg text{font-size:17px}"
    ".tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(180px,1fr));gap:12px;margin:14px 0}"
    ".tile{background:var(--paper);border:1px solid var(--line);border-radius:8px;padding:12px 16px}"
    ".tile b{display:block;font-size:21px;font-weight:600;font-variant-numeric:tabular-nums}</style>"
)
# The Chinese of what other modules say in English.
CHINESE = {
    "end of turn is learned": "学习了轮次结束符",
    "packed rows are apart": "打包的数据互不可见",
    "finite loss": "损失是有限数",
    "packed equals unpacked": "打包与不打包的损失一致",
    "padded equals unpacked": "填充与不填充的损失一致",
    "every LoRA layer gets a gradient": "每个 LoRA 层都有梯度",
    "a CPU tells no power here": "此处无法得知 CPU 的功率",
    "a CPU has no published 16-bit peak": "CPU 没有公布的 16 位峰值",
    "the base is a mixture of experts": "基础模型是混合专家模型",
    "computed in fp32; the peaks are those of 16 bits": "以 fp32 计算，而峰值是 16 位的",
}


def curves_page(run: Run, data: Data, info: dict[str, Any]) -> str:
    """A self-contained page in English and Chinese.

    Args:
        info: the run's ledger.
    """
    body = [
        LAYOUT,
        f"<h1>{both('Training', '训练')}</h1>",
        f'<p class="soft">{both("Loss in nats per token of the answers; lower is better.", "答案每个词元的损失（奈特），越低越好。")}</p>',
        _verdict(run),
        _tiles(info),
        card(both("Loss", "损失"), _loss_chart(run)),
        _small_charts(run),
    ]
    if info["self_test"]:
        body.append(card(both("Self-test before the first step", "训练前自检"), _self_test(info["self_test"])))
    body += [
        card(both("What it took", "资源消耗"), _resources(info)),
        card(both("Choices", "自动选择"), _choices(info["choices"])),
        folded(both("Where it comes from", "来源"), _origin(info)),
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


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most about a thousand finite points: of each stretch its lowest and its highest, so that no spike is lost."""
    finite = [point for point in points if math.isfinite(point[1])]
    size = math.ceil(2 * len(finite) / SHOWN_POINTS)
    if size <= 2:
        return finite
    stretches = (finite[at : at + size] for at in range(0, len(finite), size))
    return [point for part in stretches for point in sorted({min(part, key=lambda p: p[1]), max(part, key=lambda p: p[1])})]


def _loss_chart(run: Run) -> str:
    raw: list[tuple[float, float]] = [(step.number, step.loss) for step in run.steps]
    validation = [(0.0, run.validation_loss_base), *((float(point.step), point.validation_loss) for point in run.evaluations)]
    series = {"train · 训练": raw, "smoothed · 平滑": smoothed(raw), "validation · 验证": validation}
    return line_chart({name: thinned(line) for name, line in series.items()}, x_label=STEP_AXIS)


def _small_charts(run: Run) -> str:
    curves = (
        ("Gradient norm before clipping", "裁剪前的梯度范数", "grad_norm", [(step.number, step.grad_norm) for step in run.steps]),
        ("Learning rate", "学习率", "learning_rate · 10⁻⁴", [(step.number, step.learning_rate * 1e4) for step in run.steps]),
        (
            "Thousand tokens per second",
            "每秒千词元",
            "tokens/s / 1000",
            [(step.number, step.tokens / step.seconds / 1e3) for step in run.steps],
        ),
    )
    cards = [card(both(english, chinese), line_chart({name: thinned(line)}, x_label=STEP_AXIS)) for english, chinese, name, line in curves]
    cards.append(card(both("Evaluations", "各次评估"), _evaluations(run)))
    return '<div class="charts">' + "".join(f"<div>{content}</div>" for content in cards) + "</div>"


def _verdict(run: Run) -> str:
    before, after = run.validation_loss_base, run.kept.validation_loss
    lines = []
    if run.stopped_because:
        lines.append(("bad", f"Stopped early: {run.stopped_because}.", "训练提前停止：损失或梯度不是有限数。"))
    if after < before:
        lines.append(("good", f"Validation loss {_loss(before)} → {_loss(after)}.", f"验证损失 {_loss(before)} → {_loss(after)}。"))
    else:
        lines.append(
            ("bad", f"Worse than the base model: {_loss(before)} → {_loss(after)}.", f"比基础模型更差：{_loss(before)} → {_loss(after)}。")
        )
    if run.finished_early:
        lines.append(("soft", f"Finished early: {run.finished_early}.", "提前结束：验证损失已不再下降。"))
    if run.resumed_from:
        steps = ", ".join(map(str, run.resumed_from))
        lines.append(("soft", f"Resumed from the checkpoint of step {steps}.", f"从第 {steps} 步的检查点恢复。"))
    for note in run.out_of_memory:
        lines.append(("warn", f"Out of memory at {note}.", "显存不足，已自动减小微批；有效批大小不变。"))
    return "".join(f'<p class="{tone}">{both(english, chinese)}</p>' for tone, english, chinese in lines)


def _tiles(info: dict[str, Any]) -> str:
    speed, used = info["speed"], info["utilisation"]
    share = used["peak_share"]
    tiles = (
        (f"{info['steps']:,}", f"steps; step {info['best_step']} is kept", f"步；保留第 {info['best_step']} 步"),
        (f"{info['tokens']:,}", f"tokens, {info['trainable_tokens']:,} of them learned", f"词元，其中学习 {info['trainable_tokens']:,}"),
        (f"{speed.get('tokens_per_second', 0):,.0f}", "tokens per second", "每秒词元"),
        (_duration(info["seconds"]["total"]), "wall time", "总用时"),
        (f"{max(info['peak_memory_bytes'].values()) / GIB:.1f} GiB", "peak memory", "内存峰值"),
        ("–" if share is None else f"{share:.1%}", "of the card's peak", "占显卡峰值"),
    )
    shown = tiles if share is not None else tiles[:-1]
    return (
        '<div class="tiles">'
        + "".join(f'<div class="tile"><b>{escape(value)}</b>{both(en, zh)}</div>' for value, en, zh in shown)
        + "</div>"
    )


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 120 else f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def _evaluations(run: Run) -> str:
    header = ["step 步", "training loss 训练损失", "validation loss 验证损失", "kept 保留"]
    rows = [
        [point.step, _loss(point.train_loss), _loss(point.validation_loss), "✓" if point.step == run.kept.step else ""]
        for point in run.evaluations
    ]
    return table(header, [[0, "–", _loss(run.validation_loss_base), ""], *rows], numeric=(0, 1, 2))


def _said(english: str) -> Html:
    return Html(both(english, CHINESE[english]) if english in CHINESE else escape(english))


def _loss(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "–"


def _self_test(checks: Sequence[dict[str, Any]]) -> str:
    passed, failed = f'<span class="good">✓ {both("passed", "通过")}</span>', f'<span class="bad">✗ {both("failed", "未通过")}</span>'
    rows = [[_said(check["name"]), Html(passed if check["passed"] else failed), check["detail"]] for check in checks]
    return table(["check 检查", "result 结果", "detail 说明"], rows)


def _resources(info: dict[str, Any]) -> str:
    seconds, speed, used = info["seconds"], info["speed"], info["utilisation"]
    phases = ", ".join(f"{name} {_duration(value)}" for name, value in seconds.items() if name != "total")
    facts = [
        (
            "tokens per second: all, learned, median step",
            "每秒词元：全部、学习、单步中位数",
            ", ".join(f"{value:,.0f}" for value in speed.values()),
        ),
        ("wall time of the phases", "各阶段用时", phases),
        ("peak memory", "内存峰值", ", ".join(f"{name} {size / GIB:.2f} GiB" for name, size in info["peak_memory_bytes"].items())),
        ("hours: accelerator, CPU core", "小时：加速卡、CPU 核", f"{info['hours']['accelerator']:g}, {info['hours']['cpu_core']:g}"),
        ("energy", "能耗", _energy(info["energy_wh"], info["energy_note"])),
    ]
    if info["memory_forecast_bytes"] is not None:
        facts.insert(3, ("memory that was expected before the start", "启动前的内存预测", f"{info['memory_forecast_bytes'] / GIB:.2f} GiB"))
    if used["flops_per_second"] is not None:
        share = f"{used['peak_share']:.1%} · {used['card']}" if used["peak_share"] is not None else _said(used["why_no_share"])
        facts.append(("operations per second", "每秒浮点运算", f"{used['flops_per_second'] / 1e12:,.3g} TFLOP/s"))
        facts.append(("share of the peak", "占峰值比例", share))
        facts.append(("how it is counted", "计算方式", used["formula"]))
    return _facts(facts)


def _energy(energy_wh: float | None, note: str) -> str:
    return _said(note) if energy_wh is None else f"{energy_wh:,.1f} Wh {note}"


def _origin(info: dict[str, Any]) -> str:
    rows, plan = info["rows"], info["plan"]
    facts = [
        ("base model", "基础模型", f"{info['base_model']} · {info['base_fingerprint']}"),
        ("data digest", "数据摘要", info["data_digest"]),
        ("chat format digest", "对话格式摘要", info["chat_digest"]),
        ("code version", "代码版本", " · ".join(filter(None, info["code"].values()))),
        (
            "rows: training, validation, dropped",
            "数据：训练、验证、未使用",
            f"{rows['train']['used']}, {rows['validation']['used']}, {info['metrics']['rows_dropped']}",
        ),
        ("plan", "计划", ", ".join(f"{name} {value}" for name, value in plan.items() if name != "compute")),
        ("device", "设备", plan["compute"]["reason"]),
        ("versions", "版本", ", ".join(f"{name} {number}" for name, number in info["versions"].items())),
    ]
    if info["mlflow"]:
        facts.append(("MLflow run", "MLflow 运行", f"{info['mlflow']['run_id']} · {info['mlflow']['uri']} {info['mlflow']['problem']}"))
    return _facts(facts)


def _facts(facts: Sequence[tuple[str, str, str]]) -> str:
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
