"""The rules of the gate that hold a number against a bound: better, not worse than the base, at least, at most."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from components.evaluate.compare import Interval
from components.evaluate.metrics import METRICS
from components.evaluate.scores import Comparison

MIN_ROWS = 3  # below, an interval says nothing

_WAYS = {"likelihood": ("likeliest letter", "最可能的字母"), "generated": ("written letter", "写出的字母")}


class Reason(NamedTuple):
    """What one rule found; the decision is promote when every rule passed."""

    rule: str
    passed: bool
    english: str
    chinese: str


def better_nll(difference: Interval, confidence: float) -> Reason:
    """The reference answers became likelier: the interval of the difference is wholly below 0."""
    passed = difference.high < 0
    return Reason(
        "better_nll",
        passed,
        f"The NLL of held-out answers changed by {_change(difference)} nats per token ({confidence:.0%} interval); "
        + ("its upper end is below 0: the tuned model is better." if passed else "its upper end must be below 0."),
        f"留出答案的负对数似然变化 {_change(difference)} nat/词元（{confidence:.0%} 区间）；"
        + ("上端小于 0：微调后的模型更好。" if passed else "其上端必须小于 0。"),
    )


def not_worse(name: str, comparison: Comparison, rows: int, tolerance: float, confidence: float) -> Reason:
    """A metric's interval is not wholly on the worse side of the tolerance; a metric defined on too few rows is not checked.

    Args:
        rows: all held-out rows, of which the metric may be defined on some.
    """
    metric, scored = METRICS[name], comparison.rows.get(name, 0)
    if name not in comparison.differences or scored < MIN_ROWS <= rows:
        return _unchecked(f"not_worse_{name}", metric.english, metric.chinese, scored)
    some = (f" on {scored} of {rows} rows", f"（{rows} 条中的 {scored} 条）") if scored < rows else ("", "")
    return _compared(
        f"not_worse_{name}",
        metric.english + some[0],
        metric.chinese + some[1],
        comparison.differences[name],
        tolerance * (metric.width or 1.0),
        confidence,
        lower_is_better=metric.better == "lower",
    )


def exam_not_worse(way: str, compared: Mapping[str, Any], tolerance: float, confidence: float) -> Reason:
    """The accuracy of an exam, by one way of scoring, is not significantly lower than the base's beyond the tolerance.

    Args:
        compared: one value of `exam_scores.compare_exams`.
    """
    english, chinese = (f"{word}{name}" for word, name in zip(("Exam accuracy by the ", "考试正确率："), _WAYS[way], strict=True))
    questions, p_value = compared["questions"], compared["mcnemar"]["p_value"]
    if questions < MIN_ROWS:
        return _unchecked(f"exam_not_worse_{way}", english, chinese, questions)
    difference = Interval(*(math.nan if value is None else value for value in compared["difference"].values()))
    return _compared(
        f"exam_not_worse_{way}",
        f"{english} ({questions} questions, McNemar p = {p_value:.3g})",
        f"{chinese}（{questions} 题，McNemar p = {p_value:.3g}）",
        difference,
        tolerance,
        confidence,
        lower_is_better=False,
    )


def at_least(name: str, comparison: Comparison, bound: float, confidence: float) -> Reason:
    """The tuned model's mean reaches a minimum; a mean of no rows does not."""
    return _bounded(f"minimum_{name}", name, comparison, bound, confidence, ("at least", "不低于", "低于"), sign=1)


def at_most(name: str, comparison: Comparison, bound: float, confidence: float) -> Reason:
    """The tuned model's mean is within a maximum, whatever the base does."""
    return _bounded(f"maximum_{name}", name, comparison, bound, confidence, ("at most", "不高于", "高于"), sign=-1)


def _bounded(rule: str, name: str, comparison: Comparison, bound: float, confidence: float, words: tuple[str, ...], sign: int) -> Reason:
    metric, mean = METRICS[name], comparison.tuned.get(name)
    if mean is None:
        return Reason(
            rule,
            False,
            f"{metric.english} could be scored on no row; {words[0]} {bound:g} is asked for.",
            f"{metric.chinese}没有可评分的数据；要求{words[1]} {bound:g}。",
        )
    passed = sign * mean.mean >= sign * bound
    shown = f"{mean.mean:.4g} [{mean.low:.4g}, {mean.high:.4g}]"
    rows = comparison.rows[name]
    return Reason(
        rule,
        passed,
        f"{metric.english} of the tuned model is {shown} on {rows} rows ({confidence:.0%} interval); "
        + (f"it is {words[0]} {bound:g}." if passed else f"it must be {words[0]} {bound:g}."),
        f"微调模型的{metric.chinese}为 {shown}（{rows} 条，{confidence:.0%} 区间）；"
        + (f"{words[1]} {bound:g}。" if passed else f"{words[2]} {bound:g}，未达到要求。"),
    )


def _compared(
    rule: str, english: str, chinese: str, difference: Interval, bound: float, confidence: float, *, lower_is_better: bool
) -> Reason:
    if lower_is_better:
        passed, limit, side = not difference.low > bound, f"+{bound:g}", ("above", "高于")
    else:
        passed, limit, side = not difference.high < -bound, f"−{bound:g}", ("below", "低于")
    passed = passed and math.isfinite(difference.mean)
    return Reason(
        rule,
        passed,
        f"{english} changed by {_change(difference)} ({confidence:.0%} interval); it is "
        + (f"not wholly {side[0]} {limit}." if passed else f"wholly {side[0]} {limit}: worse than the base."),
        f"{chinese}变化 {_change(difference)}（{confidence:.0%} 区间）；"
        + (f"并非整体{side[1]} {limit}。" if passed else f"整体{side[1]} {limit}：比基础模型差。"),
    )


def _unchecked(rule: str, english: str, chinese: str, scored: int) -> Reason:
    return Reason(
        rule,
        True,
        f"{english}: not checked, it could be scored {scored} time(s) and an interval needs at least {MIN_ROWS}.",
        f"{chinese}：未检查，可评分 {scored} 次，区间至少需要 {MIN_ROWS} 次。",
    )


def _change(interval: Interval) -> str:
    return f"{interval.mean:+.4g} [{interval.low:+.4g}, {interval.high:+.4g}]"
