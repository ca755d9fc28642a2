"""The decision: promote the tuned model, or hold it, with a reason for each rule.

A rejected model is a result, not a failure: the run stays green, and the reasons are in the report.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from components.evaluate.compare import Interval
from components.evaluate.gate_bounds import MIN_ROWS, Reason, at_least, at_most, better_nll, exam_not_worse, not_worse
from components.evaluate.scores import Comparison

FEW_ROWS = 20  # below, an interval is too narrow for its confidence

Decision = Literal["promote", "hold"]


@dataclass(frozen=True)
class Rules:
    """The bounds of the gate.

    Attributes:
        tolerance: how much worse than the base a guarded metric or an exam may be, as a share of its range.
        confidence: of every interval.
        guarded: metrics that may not be significantly worse than the base's beyond the tolerance.
        minimums: the least mean of a metric.
        maximums: the largest mean of a metric; 1 for a share: no bound.
    """

    tolerance: float
    confidence: float
    guarded: tuple[str, ...]
    minimums: dict[str, float]
    maximums: dict[str, float]


def decide(
    comparison: Comparison, rules: Rules, *, rows: int, leaked: Sequence[int] | None, exam: Mapping[str, Any] | None = None
) -> tuple[Decision, list[Reason]]:
    """Apply the rules.

    Args:
        leaked: lines of held-out rows whose question was trained on; None when that can't be known.
        exam: `exam_scores.compare_exams` of both models; None without an exam or a base.
    """
    reasons = [_base_given(comparison.base is not None), _enough_rows(rows), _finite(comparison)]
    if comparison.base is not None:
        reasons.append(better_nll(comparison.differences["nll"], rules.confidence))
        reasons += [not_worse(name, comparison, rows, rules.tolerance, rules.confidence) for name in rules.guarded]
        ways = [(way, compared) for way, compared in (exam or {}).items() if compared]
        reasons += [exam_not_worse(way, compared, rules.tolerance, rules.confidence) for way, compared in ways]
    reasons += [at_least(name, comparison, bound, rules.confidence) for name, bound in rules.minimums.items()]
    reasons += [at_most(name, comparison, bound, rules.confidence) for name, bound in rules.maximums.items() if bound < 1]
    reasons.append(_held_out(leaked))
    return ("promote" if all(reason.passed for reason in reasons) else "hold"), reasons


def _base_given(given: bool) -> Reason:
    if given:
        return Reason("base_given", True, "A base model was given to compare with.", "已提供用于比较的基础模型。")
    return Reason(
        "base_given",
        False,
        "No base model was given, so nothing shows that tuning helped: name one with --base_model.",
        "未提供基础模型，无法证明微调有效：请用 --base_model 指定。",
    )


def _enough_rows(rows: int) -> Reason:
    if rows < MIN_ROWS:
        return Reason(
            "enough_rows",
            False,
            f"Only {rows} held-out row(s) were used; at least {MIN_ROWS} are needed for an interval.",
            f"只用了 {rows} 条留出数据；至少需要 {MIN_ROWS} 条才能给出区间。",
        )
    few = rows < FEW_ROWS
    return Reason(
        "enough_rows",
        True,
        f"{rows} held-out rows were used, at least {MIN_ROWS} are needed"
        + (f"; with fewer than {FEW_ROWS} the intervals are narrower than they claim." if few else "."),
        f"使用了 {rows} 条留出数据，至少需要 {MIN_ROWS} 条" + (f"；少于 {FEW_ROWS} 条时，区间比其标称的更窄。" if few else "。"),
    )


def _finite(comparison: Comparison) -> Reason:
    models: list[tuple[str, str, dict[str, Interval]]] = [("tuned", "微调", comparison.tuned), ("base", "基础", comparison.base or {})]
    broken = [(en, zh, name) for en, zh, means in models for name, interval in means.items() if not math.isfinite(interval.mean)]
    if broken:
        english = ", ".join(f"{name} of the {en} model" for en, _, name in broken)
        chinese = "、".join(f"{zh}模型的 {name}" for _, zh, name in broken)
        return Reason("finite", False, f"Not a finite number: {english}.", f"不是有限的数：{chinese}。")
    return Reason("finite", True, "Every metric is a finite number.", "所有指标都是有限的数。")


def _held_out(leaked: Sequence[int] | None) -> Reason:
    if leaked is None:
        return Reason(
            "held_out",
            True,
            "Not checked: the data has no training split, so nobody knows whether these questions were trained on.",
            "未检查：数据没有训练集，无法知道这些问题是否参与过训练。",
        )
    if leaked:
        lines = ", ".join(map(str, leaked[:5])) + (", …" if len(leaked) > 5 else "")
        return Reason(
            "held_out",
            False,
            f"{len(leaked)} held-out question(s) are in the training split too (source lines {lines}): run the prepare step again.",
            f"有 {len(leaked)} 个留出问题也在训练集中（源文件第 {lines} 行）：请重新运行 prepare 步骤。",
        )
    return Reason("held_out", True, "No held-out question is in the training split.", "留出问题均不在训练集中。")
