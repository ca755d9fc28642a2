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
from components.evaluate.exam_layouts import Exam, Question
from components.evaluate.exam_sitting import Sitting
from components.evaluate.exams import Asked, ExamResult, QuestionResult
from components.evaluate.gate import Rules, decide
from components.evaluate.held_out import HeldOut, HeldOutRow
from components.evaluate.overlap import Overlap
from components.evaluate.report import report_page
from components.evaluate.report_samples import SAMPLES, choose_samples, marked
from components.evaluate.results import build_results, exam_results, flat_metrics
from components.evaluate.rouge import Rouge
from components.evaluate.scores import by_stratum, compare, score_answers

ATTACK = "<script>alert('x')</script>"


def exam_of(right: int) -> ExamResult:
    """Ten questions in two orders, of which a model gets the first few right; the last answer can't be read."""
    questions = []
    for at in range(10):
        letter = "A" if at < right else "B"
        asked = [
            Asked(shift, {"A": -0.5, "B": -1.0}, letter, "x", letter if at < 9 else "", "stated" if at < 9 else "none") for shift in (0, 1)
        ]
        questions.append(QuestionResult(f"q:{at}", "内科" if at < 5 else "外科", "AB", "A", False, asked))
    return ExamResult("simple", "e" * 64, {"no answer": 3}, questions)


def results_of(rows: int = 3, *, with_base: bool = True, nll: float = 1.0, with_exam: bool = False) -> dict[str, Any]:
    """Results of invented answers, made by the real code."""
    references = ["放心，慢慢来。", "不可以服用阿司匹林。", "每日2次，每次5mg。"]
    answers = [f"放心吧{ATTACK}", "可以服用阿司匹林。", "每日2次，每次5mg。"]
    conversation = ((Message("user", ATTACK),), [1, 2, 3], [False, True, True])
    held_out = HeldOut(
        [
            HeldOutRow(line, f"问题{line}{ATTACK}", references[line % 3 - 1], *conversation, f"chinese, {('short', 'long')[line % 2]}")
            for line in range(1, rows + 1)
        ],
        available=rows + 5,
        too_long=[99],
        leaked=None,
    )
    texts = [answers[at % 3] for at in range(rows)]
    tuned = Answers([Completion([1, 2], "stop")] * rows, texts, [nll] * rows, {}, exam_of(8) if with_exam else None)
    base = Answers([Completion([1] * 9, "length")] * rows, ["下次 " * 50] * rows, [4.0 + at for at in range(rows)], {}, exam_of(5))
    tuned_scored = score_answers(held_out.rows, tuned, Rouge(), Overlap(), "tuned")
    base_scored = score_answers(held_out.rows, base, Rouge(), Overlap(), "base") if with_base else None
    how: dict[str, Any] = {"confidence": 0.9, "seed": 1}
    base_scores = base_scored.scores if base_scored else None
    comparison = compare(tuned_scored.scores, base_scores, **how)
    sitting = Sitting(Exam([Question("q:1", "?", {"A": "1", "B": "2"}, "A")], {}, "simple"), 12, None, 2, 1, 9, 8)  # type: ignore[arg-type]
    exam = exam_results(sitting, "exam.jsonl", tuned_scored, base_scored, **how) if with_exam else None
    rules = Rules(tolerance=0.02, confidence=0.9, guarded=("rouge_l", "never_stopped"), minimums={}, maximums={"degenerate": 0.5})
    return build_results(
        verdict=decide(comparison, rules, rows=rows, leaked=None, exam=exam["comparison"] if exam else None),
        model={"uri": "file:///m", "digest": "a" * 64, "chat_digest": "b" * 64},
        base={"name": "base", "digest": "c" * 64} if with_base else None,
        data={"path": "dataset", "digest": "d" * 64},
        settings={"confidence": 0.9, "seed": 1, "bertscore_model": "", "exam_permutations": 2},
        held_out=held_out,
        comparison=comparison,
        strata=by_stratum([row.stratum for row in held_out.rows], tuned_scored.scores, base_scores, **how),
        tuned_scored=tuned_scored,
        base_scored=base_scored,
        exam=exam,
        bertscore={"encoder": "base model", "digest": "c" * 64, "layers": 12, "window_tokens": 2048, "windowed_texts": 2},
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
    assert page.count("<polyline") == 2  # NLL
    assert page.count("stroke-dasharray") == 7  # medians: ROUGE-L 2, facts 2, lengths 3


def test_what_a_model_wrote_stays_text() -> None:
    page = report_page(results_of())
    assert "<script" not in page
    assert page.count("&lt;script&gt;") == 7  # question and history of three rows, the tuned answer of one


def test_the_page_needs_nothing_from_outside() -> None:
    assert not re.findall(r"""(?:src|href)\s*=|url\(|@import|https?://""", report_page(results_of()))


def test_d25_the_page_shows_no_difference_without_its_interval() -> None:
    results = results_of()
    page = report_page(results)
    for metric in results["metrics"].values():
        difference = metric["difference"]
        assert f"[{difference['low']:+.4g}, {difference['high']:+.4g}]" in page
    assert not re.search(r"\[[+-]", report_page(results_of(with_base=False)))


def test_at_most_twenty_samples() -> None:
    page = report_page(results_of(SAMPLES + 5))
    assert f"{SAMPLES} of {SAMPLES + 5} rows" in page
    assert len(re.findall(r"问题\d+&lt;", page)) == SAMPLES


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


def test_rows_without_facts_are_counted_and_contradictions_shown() -> None:
    results = results_of(6)
    metric = results["metrics"]["fact_agreement"]
    assert metric["rows"] < 6 and metric["tuned"] is not None
    assert flat_metrics(results)["rows_fact_agreement"] == metric["rows"]
    assert any(row["tuned"]["scores"]["fact_agreement"] is None for row in results["rows"])
    contradicted = [row for row in results["rows"] if row["tuned"]["scores"]["fact_contradiction"]]
    assert contradicted and all(any(fact["verdict"] == "contradicted" for fact in row["tuned"]["facts"]) for row in contradicted)
    page = report_page(results)
    assert "Contradicted (reference ↔ answer)" in page and "矛盾（参考 ↔ 答案）" in page
    assert f"on {metric['rows']} of 6 rows" in page


def test_no_row_with_facts_still_makes_a_page() -> None:
    results = results_of(1)
    assert results["metrics"]["fact_agreement"]["rows"] == 0 and results["metrics"]["fact_agreement"]["tuned"] is None
    report_page(results)
    json.dumps(results, allow_nan=False)


def test_the_exam_is_in_the_results_the_numbers_the_gate_and_the_page() -> None:
    results = results_of(6, with_exam=True)
    exam = results["exam"]
    assert exam["tuned"]["likelihood"]["accuracy"] == 0.8 and exam["base"]["likelihood"]["accuracy"] == 0.5
    assert len(exam["questions"]["tuned"]) == len(exam["questions"]["base"]) == 10
    flat = flat_metrics(results)
    assert flat["difference_exam_likelihood_mean"] == pytest.approx(0.3)
    assert flat["difference_exam_likelihood_low"] <= 0.3 <= flat["difference_exam_likelihood_high"]
    assert {"exam_not_worse_likelihood", "exam_not_worse_generated"} <= {reason["rule"] for reason in results["reasons"]}
    page = report_page(results)
    for text in ("McNemar p", "内科", "外科", "按选项位置", "Guessing: 0.5", "10 of 12 questions", "读不出字母"):
        assert text in page
    difference = exam["comparison"]["likelihood"]["difference"]
    assert f"[{difference['low']:+.4g}, {difference['high']:+.4g}]" in page
    alone = results_of(6, with_exam=True, with_base=False)
    assert alone["exam"]["comparison"] is None and alone["exam"]["questions"]["base"] is None
    assert not re.search(r"\[[+-]", report_page(alone))


def test_strata_have_their_rows_and_scores() -> None:
    results = results_of(6)
    assert {name: stratum["rows"] for name, stratum in results["strata"].items()} == {"chinese, long": 3, "chinese, short": 3}
    assert set(results["strata"]["chinese, long"]["metrics"]) == {"nll", "rouge_l", "fact_agreement"}
    assert "chinese, long" in report_page(results) and "中文，长" in report_page(results)


def test_samples_are_the_contradicted_the_worst_the_best_and_random_ones() -> None:
    results = results_of(60)
    chosen = choose_samples(results)
    assert chosen == choose_samples(results)
    assert len({row for _, row in chosen}) == len(chosen) == SAMPLES
    groups = {group: [row for one, row in chosen if one == group] for group in ("contradicted", "worst", "best", "random")}
    assert {len(rows) for rows in groups.values()} == {5}
    score = {row: results["rows"][row]["tuned"]["scores"]["rouge_l"] for _, row in chosen}
    assert all(results["rows"][row]["tuned"]["scores"]["fact_contradiction"] for row in groups["contradicted"])
    assert max(score[row] for row in groups["worst"]) < min(score[row] for row in groups["best"]) == 100


def test_what_differs_is_marked_by_characters_in_chinese_and_words_in_english() -> None:
    plain = re.compile(r"<span[^>]*>(.*?)</span>")
    reference, answer = marked("不可以服用阿司匹林", "可以服用阿司匹林")
    assert plain.findall(reference) == ["不"] and plain.findall(answer) == []
    reference, answer = marked("Take 5 mg daily", "Take 50 mg daily")
    assert plain.findall(reference) == ["5"] and plain.findall(answer) == ["50"]
    assert plain.findall(marked("头痛", "休息")[1]) == ["休息"]
    assert "<script>" not in "".join(marked(ATTACK, "a" + ATTACK)) and marked("", "") == ("", "")
    assert "<span" not in marked("长" * 2000, "短")[0]
