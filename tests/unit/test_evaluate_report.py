"""The report: readable in both languages, self-contained, and safe whatever the model wrote."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest

from components.common.chat import Message
from components.common.engine import Completion
from components.evaluate.answers import Answers
from components.evaluate.gate import decide
from components.evaluate.held_out import HeldOut, HeldOutRow
from components.evaluate.report import SAMPLES, report_page
from components.evaluate.results import build_results, flat_metrics
from components.evaluate.rouge import Rouge
from components.evaluate.scores import compare, score_answers

ATTACK = "<script>alert('x')</script>"


def results_of(rows: int = 3, *, with_base: bool = True, nll: float = 1.0) -> dict[str, Any]:
    """Results of invented answers, made by the real code."""
    held_out = HeldOut(
        [
            HeldOutRow(line, f"问题{line}{ATTACK}", "多喝水，多休息。", (Message("user", ATTACK),), [1, 2, 3], [False, True, True])
            for line in range(1, rows + 1)
        ],
        available=rows + 5,
        too_long=[99],
        leaked=None,
    )
    tuned = Answers([Completion([1, 2], "stop")] * rows, [f"多喝水{ATTACK}"] * rows, [nll] * rows, {})
    base = Answers([Completion([1] * 9, "length")] * rows, ["下次 " * 50] * rows, [4.0 + at for at in range(rows)], {})
    tuned_scored = (tuned, score_answers(held_out.rows, tuned, Rouge(), "tuned"))
    base_scored = (base, score_answers(held_out.rows, base, Rouge(), "base")) if with_base else None
    comparison = compare(tuned_scored[1], base_scored[1] if base_scored else None, confidence=0.9, seed=1)
    verdict = decide(comparison.tuned, comparison.base, comparison.differences, rows=rows, leaked=None, tolerance=0.02, confidence=0.9)
    return build_results(
        verdict=verdict,
        model={"uri": "file:///m", "digest": "a" * 64, "chat_digest": "b" * 64},
        base={"name": "base", "digest": "c" * 64} if with_base else None,
        data={"path": "dataset", "digest": "d" * 64},
        settings={"confidence": 0.9, "seed": 1, "bertscore_model": ""},
        held_out=held_out,
        comparison=comparison,
        tuned_scored=tuned_scored,
        base_scored=base_scored,
        bertscore={"encoder": "base model", "digest": "c" * 64, "layers": 12, "window_tokens": 2048, "cut_texts": 2},
        timings={"total_s": 12.3},
    )


def test_the_page_shows_the_decision_the_numbers_and_the_answers_in_both_languages() -> None:
    results = results_of()
    page = report_page(results)
    assert "promote" in page and "发布" in page
    for reason in results["reasons"]:
        assert reason["chinese"] in page
    for text in (
        "90% interval",
        "90% 区间",
        "a" * 64,
        "b" * 64,
        "c" * 64,
        "d" * 64,
        "never stopped",
        "未停止",
        "2 texts",
        "2 段文本",
        "3 of 8",
        "99",
    ):
        assert text in page, text
    assert page.count("<polyline") == 5  # NLL: 2, lengths: 3


def test_what_a_model_wrote_stays_text() -> None:
    page = report_page(results_of())
    assert "<script" not in page
    assert page.count("&lt;script&gt;") == 9  # question, history and tuned answer of three rows


def test_the_page_needs_nothing_from_outside() -> None:
    assert not re.findall(r"""(?:src|href)\s*=|url\(|@import|https?://""", report_page(results_of()))


def test_d25_the_page_shows_no_difference_without_its_interval() -> None:
    results = results_of()
    page = report_page(results)
    for metric in results["metrics"].values():
        difference = metric["difference"]
        assert f"[{difference['low']:+.4g}, {difference['high']:+.4g}]" in page
    assert report_page(results_of(with_base=False)).count("[") == 0


def test_at_most_twenty_samples() -> None:
    page = report_page(results_of(SAMPLES + 5))
    assert f"{SAMPLES} of {SAMPLES + 5} rows" in page
    assert f"问题{SAMPLES}&lt;" in page and f"问题{SAMPLES + 1}&lt;" not in page


def test_one_row_and_no_base_still_make_a_page() -> None:
    results = results_of(1, with_base=False)
    assert results["decision"] == "hold"
    page = report_page(results)
    assert "hold" in page and "暂缓发布" in page and "--base_model" in page


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_numbers_that_are_not_finite_are_null_and_hold(broken: float) -> None:
    results = results_of(nll=broken)
    assert results["decision"] == "hold"
    assert results["metrics"]["nll"]["tuned"] is None
    assert results["metrics"]["nll"]["difference"] == {"mean": None, "low": None, "high": None}
    json.dumps(results, allow_nan=False)
    assert not any(name.startswith(("tuned_nll", "difference_nll")) for name in flat_metrics(results))
    assert "Not a finite number" in report_page(results)


def test_flat_metrics_are_finite_numbers() -> None:
    numbers = flat_metrics(results_of())
    assert numbers["rows"] == 3 and numbers["promoted"] == 1
    assert all(isinstance(value, (int, float)) and math.isfinite(value) for value in numbers.values())
