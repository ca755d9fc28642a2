"""Intervals and the decision: each rule can fail, and honest models pass."""

from __future__ import annotations

import math

import numpy as np
import pytest

from components.evaluate.compare import Interval, paired_interval
from components.evaluate.gate import GUARDED, Reason, decide
from components.evaluate.scores import compare

GOOD = {"nll": 2.0, "rouge_l": 30.0, "bertscore": 0.7, "degenerate": 0.1, "never_stopped": 0.1}
BASE = {"nll": 3.0, "rouge_l": 20.0, "bertscore": 0.6, "degenerate": 0.5, "never_stopped": 1.0}


def interval(*values: float) -> Interval:
    return Interval(*values)


BETTER = {
    "nll": interval(-1.0, -1.2, -0.8),
    "rouge_l": interval(10, 5, 15),
    "bertscore": interval(0.1, 0.05, 0.15),
    "degenerate": interval(-0.4, -0.6, -0.2),
    "never_stopped": interval(-0.9, -1, -0.8),
}


def verdict(**changes: object) -> tuple[str, dict[str, Reason]]:
    given = {"tuned": GOOD, "base": BASE, "differences": BETTER, "rows": 50, "leaked": [], "tolerance": 0.02, "confidence": 0.95} | changes
    decision, reasons = decide(given.pop("tuned"), given.pop("base"), given.pop("differences"), **given)  # type: ignore[arg-type]
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
    }
    for rule, differences in worse.items():
        decision, reasons = verdict(differences=differences)
        assert decision == "hold"
        assert failed(reasons) == {rule}
    others: dict[str, dict[str, object]] = {
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
        bound = {"nll": "0", "rouge_l": "−2", "bertscore": "−0.02"}.get(name, "+0.02")
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
    assert (comparison.tuned, comparison.base, comparison.differences) == ({"nll": 2.0}, None, {})
