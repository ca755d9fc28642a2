"""Intervals and the decision: each rule can fail, and honest models pass."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from components.common.errors import UserError
from components.evaluate.compare import Interval, paired_interval
from components.evaluate.config import EvaluateSettings
from components.evaluate.gate import Rules, decide
from components.evaluate.gate_bounds import Reason
from components.evaluate.metrics import parse_guarded, parse_minimums
from components.evaluate.scores import Comparison, compare

GUARDED = parse_guarded(EvaluateSettings.default("guarded"))
FACTS = {"fact_agreement": 60.0, "fact_contradiction": 0.1}
GOOD = {"nll": 2.0, "rouge_l": 30.0, "bertscore": 0.7, "degenerate": 0.1, "never_stopped": 0.1, **FACTS}
BASE = {"nll": 3.0, "rouge_l": 20.0, "bertscore": 0.6, "degenerate": 0.5, "never_stopped": 1.0, **FACTS}


def interval(*values: float) -> Interval:
    return Interval(*values)


BETTER = {
    "nll": interval(-1.0, -1.2, -0.8),
    "rouge_l": interval(10, 5, 15),
    "bertscore": interval(0.1, 0.05, 0.15),
    "degenerate": interval(-0.4, -0.6, -0.2),
    "never_stopped": interval(-0.9, -1, -0.8),
    "fact_agreement": interval(5, 2, 8),
    "fact_contradiction": interval(-0.1, -0.2, 0.0),
}
EQUAL_EXAM = {
    "questions": 40,
    "difference": {"mean": 0.0, "low": -0.1, "high": 0.1},
    "mcnemar": {"only_tuned": 2, "only_base": 2, "p_value": 1.0},
}


def verdict(**changes: Any) -> tuple[str, dict[str, Reason]]:
    given: dict[str, Any] = {"tuned": GOOD, "base": BASE, "differences": BETTER, "rows": 50, "leaked": [], "exam": None} | changes
    bounds: dict[str, Any] = {"tolerance": 0.02, "confidence": 0.95, "guarded": GUARDED, "minimums": {}, "maximums": {}}
    rules = Rules(**{name: changes.get(name, default) for name, default in bounds.items()})
    means = [
        None if given[model] is None else {name: interval(mean, mean - 0.05, mean + 0.05) for name, mean in given[model].items()}
        for model in ("tuned", "base")
    ]
    scored = dict.fromkeys(GOOD, given["rows"]) | changes.get("scored", {})
    comparison = Comparison(means[0] or {}, means[1], given["differences"], scored)
    decision, reasons = decide(comparison, rules, rows=given["rows"], leaked=given["leaked"], exam=given["exam"])
    return decision, {reason.rule: reason for reason in reasons}


def failed(reasons: dict[str, Reason]) -> set[str]:
    return {name for name, reason in reasons.items() if not reason.passed}


def test_a_better_model_is_promoted() -> None:
    decision, reasons = verdict()
    assert decision == "promote"
    assert set(reasons) == {"base_given", "enough_rows", "finite", "better_nll", "held_out", *(f"not_worse_{name}" for name in GUARDED)}


def test_d39_each_rule_can_hold_a_model() -> None:
    worse = {
        "better_nll": BETTER | {"nll": interval(-0.1, -0.3, 0.0)},
        "not_worse_rouge_l": BETTER | {"rouge_l": interval(-5, -8, -2.1)},
        "not_worse_bertscore": BETTER | {"bertscore": interval(-0.1, -0.2, -0.03)},
        "not_worse_degenerate": BETTER | {"degenerate": interval(0.3, 0.1, 0.5)},
        "not_worse_never_stopped": BETTER | {"never_stopped": interval(0.3, 0.021, 0.5)},
        "not_worse_fact_agreement": BETTER | {"fact_agreement": interval(-5, -8, -2.1)},
        "not_worse_fact_contradiction": BETTER | {"fact_contradiction": interval(0.3, 0.021, 0.5)},
    }
    for rule, differences in worse.items():
        decision, reasons = verdict(differences=differences)
        assert decision == "hold"
        assert failed(reasons) == {rule}
    worse_exam = EQUAL_EXAM | {"difference": {"mean": -0.1, "low": -0.2, "high": -0.021}}
    others: dict[str, dict[str, Any]] = {
        "exam_not_worse_likelihood": {"exam": {"likelihood": worse_exam, "generated": EQUAL_EXAM}},
        "exam_not_worse_generated": {"exam": {"likelihood": None, "generated": worse_exam}},
        "minimum_rouge_l": {"minimums": {"rouge_l": 30.1}},
        "maximum_degenerate": {"maximums": {"degenerate": 0.09, "never_stopped": 0.5}},
        "base_given": {"base": None, "differences": {}},
        "enough_rows": {"rows": 2},
        "finite": {"tuned": GOOD | {"rouge_l": math.nan}},
        "held_out": {"leaked": [3, 7]},
    }
    for rule, changes in others.items():
        decision, reasons = verdict(**changes)
        assert decision == "hold"
        assert failed(reasons) == {rule}


def test_a_loss_within_the_tolerance_or_the_noise_does_not_hold() -> None:
    for differences in (
        BETTER | {"rouge_l": interval(-1.5, -2.5, -1.9)},  # its upper end is within 2 of 100
        BETTER | {"bertscore": interval(-0.05, -0.2, 0.1)},  # not significant
        BETTER | {"degenerate": interval(0.2, 0.0, 0.5)},
    ):
        assert verdict(differences=differences)[0] == "promote"
    assert verdict(differences=BETTER | {"rouge_l": interval(-1.5, -1.9, -1.1)}, tolerance=0.01)[0] == "hold"


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_number_that_is_not_finite_holds(broken: float) -> None:
    nothing = interval(math.nan, math.nan, math.nan)
    decision, reasons = verdict(tuned=GOOD | {"nll": broken}, differences=BETTER | {"nll": nothing})
    assert decision == "hold"
    assert "nll of the tuned model" in reasons["finite"].english
    assert failed(reasons) == {"finite", "better_nll"}
    decision, reasons = verdict(base=BASE | {"bertscore": broken}, differences=BETTER | {"bertscore": nothing})
    assert failed(reasons) == {"finite", "not_worse_bertscore"}


def test_few_rows_say_so() -> None:
    for rows, words in ((2, "at least 3"), (1, "Only 1 "), (3, "narrower"), (19, "narrower")):
        assert words in verdict(rows=rows)[1]["enough_rows"].english
    assert verdict(rows=3)[0] == "promote"
    assert "narrower" not in verdict(rows=20)[1]["enough_rows"].english


def test_d25_a_reason_names_the_number_the_interval_and_the_bound_in_both_languages() -> None:
    _, reasons = verdict()
    for name in ("nll", *GUARDED):
        reason = reasons["better_nll" if name == "nll" else f"not_worse_{name}"]
        shown = f"{BETTER[name].mean:+.4g} [{BETTER[name].low:+.4g}, {BETTER[name].high:+.4g}]"
        bound = {"nll": "0", "rouge_l": "−2", "fact_agreement": "−2", "bertscore": "−0.02"}.get(name, "+0.02")
        for sentence in (reason.english, reason.chinese):
            assert shown in sentence and bound in sentence and "95%" in sentence


def test_unknown_leakage_is_said() -> None:
    decision, reasons = verdict(leaked=None)
    assert decision == "promote"
    assert reasons["held_out"].english.startswith("Not checked")


def test_the_interval_of_equal_differences_is_a_point() -> None:
    assert paired_interval([3, 4, 5], [1, 2, 3], confidence=0.95, seed=1) == Interval(2, 2, 2)


def test_the_interval_is_that_of_the_normal_theory_for_many_rows() -> None:
    """The mean of n normal differences: ± 1.96 · s / √n; a tenth of the width is the bootstrap's own noise."""
    generator = np.random.default_rng(0)
    base = generator.normal(0, 5, 400)
    tuned = base + generator.normal(0.5, 2, 400)  # paired: the spread between rows must not count
    result = paired_interval(tuned.tolist(), base.tolist(), confidence=0.95, seed=42)
    half = 1.96 * float(np.std(tuned - base)) / math.sqrt(400)
    assert result.mean == pytest.approx(np.mean(tuned - base))
    assert result.low == pytest.approx(result.mean - half, abs=half / 10)
    assert result.high == pytest.approx(result.mean + half, abs=half / 10)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(7)
    samples = generator.exponential(1.0, (100, 60)) - 1.0  # skewed, true mean 0
    intervals = [paired_interval(sample.tolist(), [0.0] * 60, confidence=0.9, seed=1) for sample in samples]
    covered = sum(one.low <= 0 <= one.high for one in intervals)
    assert 80 <= covered <= 97


def test_d20_the_same_seed_gives_the_same_interval() -> None:
    values = np.random.default_rng(3).normal(0, 1, 50).tolist()
    once, again = (paired_interval(values, [0.0] * 50, confidence=0.95, seed=5) for _ in range(2))
    assert once == again
    assert once != paired_interval(values, [0.0] * 50, confidence=0.95, seed=6)


def test_a_nan_row_has_no_interval() -> None:
    assert all(math.isnan(value) for value in paired_interval([1, math.nan, 3], [0, 0, 0], confidence=0.95, seed=1))


def test_more_rows_than_one_block_of_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(3).normal(0, 1, 50).tolist()
    whole = paired_interval(values, [0.0] * 50, confidence=0.95, seed=5)
    monkeypatch.setattr("components.evaluate.compare._BLOCK", 30)  # less than one row of draws
    small = paired_interval(values, [0.0] * 50, confidence=0.95, seed=5)
    assert small.mean == whole.mean
    assert small.low == pytest.approx(whole.low, abs=0.02)


def test_compare_without_a_base_has_no_difference() -> None:
    comparison = compare([{"nll": 1.0}, {"nll": 3.0}], None, confidence=0.95, seed=1)
    assert comparison.tuned["nll"].mean == 2.0
    assert (comparison.base, comparison.differences, comparison.rows) == (None, {}, {"nll": 2})


def test_rows_without_a_value_are_in_no_mean_and_no_difference() -> None:
    tuned: list[dict[str, float | None]] = [{"fact_agreement": value} for value in (80.0, None, 40.0)]
    base: list[dict[str, float | None]] = [{"fact_agreement": value} for value in (50.0, None, 30.0)]
    comparison = compare(tuned, base, confidence=0.95, seed=1)
    assert (comparison.tuned["fact_agreement"].mean, comparison.rows) == (60.0, {"fact_agreement": 2})
    assert comparison.base is not None and comparison.base["fact_agreement"].mean == 40.0
    assert comparison.differences["fact_agreement"].mean == 20.0
    nothing = compare([{"fact_agreement": None}] * 3, [{"fact_agreement": None}] * 3, confidence=0.95, seed=1)
    assert (nothing.tuned, nothing.base, nothing.differences, nothing.rows) == ({}, {}, {}, {"fact_agreement": 0})


def test_a_share_has_wilsons_interval() -> None:
    comparison = compare([{"degenerate": 0.0}] * 20, None, confidence=0.95, seed=1)
    assert comparison.tuned["degenerate"] == pytest.approx((0.0, 0.0, 0.1611), abs=1e-4)  # a bootstrap would claim [0, 0]


def test_a_guarded_metric_on_too_few_rows_is_said_to_be_unchecked() -> None:
    decision, reasons = verdict(scored={"fact_agreement": 2})
    assert decision == "promote"
    assert "not checked" in reasons["not_worse_fact_agreement"].english and "未检查" in reasons["not_worse_fact_agreement"].chinese
    missing = {name: value for name, value in BETTER.items() if name != "bertscore"}
    assert "not checked" in verdict(differences=missing, scored={"bertscore": 0})[1]["not_worse_bertscore"].english
    assert "12 of 50 rows" in verdict(scored={"fact_agreement": 12})[1]["not_worse_fact_agreement"].english


def test_absolute_bounds_name_the_number_its_interval_and_the_bound() -> None:
    decision, reasons = verdict(minimums={"rouge_l": 20, "fact_agreement": 60}, maximums={"degenerate": 0.1, "never_stopped": 1.0})
    assert decision == "promote"
    assert "maximum_never_stopped" not in reasons  # 1 is no bound
    assert "30 [29.95, 30.05] on 50 rows (95% interval); it is at least 20." in reasons["minimum_rouge_l"].english
    assert "30 [29.95, 30.05]" in reasons["minimum_rouge_l"].chinese and "不低于 20" in reasons["minimum_rouge_l"].chinese
    assert "0.1 [0.05, 0.15]" in reasons["maximum_degenerate"].english and "at most 0.1" in reasons["maximum_degenerate"].english
    held, reasons = verdict(maximums={"degenerate": 0.05}, base=None, differences={})
    assert held == "hold" and failed(reasons) == {"base_given", "maximum_degenerate"}  # a bound needs no base
    unscored = {name: value for name, value in GOOD.items() if name != "fact_agreement"}
    assert failed(verdict(tuned=unscored, minimums={"fact_agreement": 1})[1]) == {"minimum_fact_agreement"}


def test_an_exam_reason_has_the_interval_the_bound_and_the_p_value() -> None:
    reason = verdict(exam={"likelihood": EQUAL_EXAM, "generated": EQUAL_EXAM})[1]["exam_not_worse_likelihood"]
    for sentence in (reason.english, reason.chinese):
        assert "+0 [-0.1, +0.1]" in sentence and "−0.02" in sentence and "p = 1" in sentence and "95%" in sentence
    few = verdict(exam={"likelihood": EQUAL_EXAM | {"questions": 2}, "generated": None})[1]
    assert "not checked" in few["exam_not_worse_likelihood"].english and "exam_not_worse_generated" not in few


def test_guarded_metrics_are_configurable() -> None:
    differences = BETTER | {"rouge_l": interval(-50, -60, -40)}
    assert verdict(differences=differences)[0] == "hold"
    assert verdict(differences=differences, guarded=("bertscore",))[0] == "promote"
    assert parse_guarded("none") == ()


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("minimums", "rouge=20", "no metric is called 'rouge'"),
        ("minimums", "rouge_l", "not name=number"),
        ("minimums", "rouge_l=many", "not name=number"),
        ("minimums", "rouge_l=101", "between 0 and 100"),
        ("minimums", "rouge_l=nan", "between 0 and 100"),
        ("minimums", "degenerate=0.1", "lower is better"),
        ("guarded", "rouge_l,nothing", "no metric is called 'nothing'"),
        ("max_degenerate", "1.5", "less than or equal to 1"),
    ],
)
def test_rules_that_cannot_be_used(flag: str, value: str, words: str) -> None:
    with pytest.raises(UserError) as error:
        EvaluateSettings.parse("evaluate", [f"--{flag}", value])
    assert words in error.value.where and f"--{flag}" in error.value.where


def test_minimums_are_read() -> None:
    assert parse_minimums("rouge_l=20, fact_agreement = 60.5") == {"rouge_l": 20.0, "fact_agreement": 60.5}
    assert parse_minimums("") == parse_minimums("none") == {}
