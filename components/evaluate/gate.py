"""The decision: promote the tuned model, or hold it, with a reason for each rule.

A rejected model is a result, not a failure: the run stays green, and the reasons are in the report.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from components.evaluate.compare import Interval
from components.evaluate.metrics import METRICS

MIN_ROWS = 3  # below, an interval says nothing
FEW_ROWS = 20  # below, an interval is too narrow for its confidence
GUARDED = ("rouge_l", "bertscore", "degenerate", "never_stopped")

Decision = Literal["promote", "hold"]


class Reason(NamedTuple):
    """What one rule found; the decision is promote when every rule passed."""

    rule: str
    passed: bool
    english: str
    chinese: str


def decide(
    tuned: Mapping[str, float],
    base: Mapping[str, float] | None,
    differences: Mapping[str, Interval],
    *,
    rows: int,
    leaked: Sequence[int] | None,
    tolerance: float,
    confidence: float,
) -> tuple[Decision, list[Reason]]:
    """Apply the rules.

    Args:
        tuned, base: mean of each metric; `base` is None when there is nothing to compare with.
        differences: tuned − base of each metric; empty without a base.
        leaked: lines of held-out rows whose question was trained on; None when that can't be known.
        tolerance: how much worse than the base a guarded metric may be, as a share of its range.
    """
    reasons = [_base_given(base is not None), _enough_rows(rows), _finite(tuned, base)]
    if differences:
        reasons.append(_better_nll(differences["nll"], confidence))
        reasons += [_not_worse(name, differences[name], tolerance, confidence) for name in GUARDED if name in differences]
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


def _finite(tuned: Mapping[str, float], base: Mapping[str, float] | None) -> Reason:
    models = [("tuned", "微调", tuned)] + ([("base", "基础", base)] if base is not None else [])
    broken = [(en, zh, name) for en, zh, means in models for name, value in means.items() if not math.isfinite(value)]
    if broken:
        english = ", ".join(f"{name} of the {en} model" for en, _, name in broken)
        chinese = "、".join(f"{zh}模型的 {name}" for _, zh, name in broken)
        return Reason("finite", False, f"Not a finite number: {english}.", f"不是有限的数：{chinese}。")
    return Reason("finite", True, "Every metric is a finite number.", "所有指标都是有限的数。")


def _better_nll(difference: Interval, confidence: float) -> Reason:
    passed = difference.high < 0
    return Reason(
        "better_nll",
        passed,
        f"The NLL of held-out answers changed by {_shown(difference)} nats per token ({confidence:.0%} interval); "
        + ("its upper end is below 0: the tuned model is better." if passed else "its upper end must be below 0."),
        f"留出答案的负对数似然变化 {_shown(difference)} nat/词元（{confidence:.0%} 区间）；"
        + ("上端小于 0：微调后的模型更好。" if passed else "其上端必须小于 0。"),
    )


def _not_worse(name: str, difference: Interval, tolerance: float, confidence: float) -> Reason:
    metric = METRICS[name]
    bound = tolerance * (metric.width or 1.0)
    if metric.better == "higher":
        passed, limit = not difference.high < -bound, f"−{bound:g}"
    else:
        passed, limit = not difference.low > bound, f"+{bound:g}"
    passed = passed and math.isfinite(difference.mean)
    side = ("below", "低于") if metric.better == "higher" else ("above", "高于")
    return Reason(
        f"not_worse_{name}",
        passed,
        f"{metric.english} changed by {_shown(difference)} ({confidence:.0%} interval); it is "
        + (f"not wholly {side[0]} {limit}." if passed else f"wholly {side[0]} {limit}: worse than the base."),
        f"{metric.chinese}变化 {_shown(difference)}（{confidence:.0%} 区间）；"
        + (f"并非整体{side[1]} {limit}。" if passed else f"整体{side[1]} {limit}：比基础模型差。"),
    )


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


def _shown(interval: Interval) -> str:
    return f"{interval.mean:+.4g} [{interval.low:+.4g}, {interval.high:+.4g}]"
