"""Rows are normalised, checked and de-duplicated; what is left out is counted and listed with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from components.prepare.clean import METER_ROWS, REASONS, Cleaned, Limits, clean_rows, normalise, text_key
from components.prepare.layouts import Layout

LAYOUT = Layout("question_answer", {"question": "question", "answer": "answer", "history": "history"})
LIMITS = Limits(min_question_chars=2, max_question_chars=100, min_answer_chars=3, max_answer_chars=200)


def clean(records: list[Any], folder: Path) -> Cleaned:
    return clean_rows(enumerate(records, 1), LAYOUT, LIMITS, folder / "rejects.jsonl", lambda lines: None)


def row(question: Any = "什么是流感？", answer: Any = "流感病毒引起的急性感染。", **more: Any) -> dict[str, Any]:
    return {"question": question, "answer": answer, **more}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  a\r\nb\rc\n", "a\nb\nc"),
        ("ＬＤＬ １２０ｍｇ", "LDL 120mg"),
        ("\u0065\u0301", "\u00e9"),
        ("a\x00b\x07\u200bc\ufeff\u202ed\ud800e", "abcde"),
        ("，。？（）％", "，。？（）％"),
        ("👨\u200d👩", "👨\u200d👩"),
        ("tab\tkept", "tab\tkept"),
        ("10² ½ ㎎", "10² ½ ㎎"),
    ],
)
def test_text_is_normalised(text: str, expected: str) -> None:
    assert normalise(text) == expected
    assert normalise(expected) == expected
    normalise(text).encode("utf-8")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"answer": "aaa"}, "missing_question"),
        (row(answer=None), "missing_answer"),
        (row(question=" \n\u200b"), "empty_question"),
        (row(answer=""), "empty_answer"),
        (row(question=3), "question_not_text"),
        (row(answer=["流感"]), "answer_not_text"),
        (row(question="痛"), "question_too_short"),
        (row(question="长" * 101), "question_too_long"),
        (row(history=[["长" * 60, "长" * 60]]), "question_too_long"),
        (row(answer="是。"), "answer_too_short"),
        (row(answer="长" * 201), "answer_too_long"),
        (row(answer="  什么是流感。"), "question_equals_answer"),
        ("text", "wrong_shape"),
        (row(history=[{"role": "judge", "content": "x"}]), "wrong_turns"),
    ],
)
def test_a_bad_row_is_left_out_with_its_reason(tmp_path: Path, record: Any, reason: str) -> None:
    cleaned = clean([row(), record], tmp_path)
    assert [kept["line"] for kept in cleaned.rows] == [1]
    assert cleaned.rejected == {reason: 1}
    assert reason in REASONS
    listed = [json.loads(line) for line in (tmp_path / "rejects.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [(item["line"], item["reason"]) for item in listed] == [(2, reason)]


def test_the_same_row_is_kept_once(tmp_path: Path) -> None:
    cleaned = clean([row("Flu A?", "It is a virus."), row("other", "answer"), row("flu  a?", "it is\na virus. ")], tmp_path)
    assert [kept["line"] for kept in cleaned.rows] == [1, 2]
    assert cleaned.rejected == {"duplicate": 1}


def test_rows_that_differ_in_what_matters_are_all_kept(tmp_path: Path) -> None:
    """Another answer, another dose, or other turns before the question."""
    records = [
        row(),
        row(answer="另一个回答。"),
        row(answer="每次3.5毫克"),
        row(answer="每次35毫克"),
        row(answer="每次-35毫克"),
        row(history=[["感冒？", "不是。"]]),
    ]
    assert len(clean(records, tmp_path).rows) == len(records)


def test_rows_keep_their_turns_normalised(tmp_path: Path) -> None:
    cleaned = clean([row(history=[["ｑ１ ", "a１"]])], tmp_path)
    assert cleaned.rows[0]["history"] == [{"role": "user", "content": "q1"}, {"role": "assistant", "content": "a1"}]


def test_an_excerpt_is_short_and_writable(tmp_path: Path) -> None:
    clean([row(answer="\ud800" + "长" * 5_000_000)], tmp_path)
    listed = (tmp_path / "rejects.jsonl").read_text(encoding="utf-8")
    assert len(listed) < 300
    assert "什么是流感？ | 长长" in listed


def test_progress_is_told_now_and_then(tmp_path: Path) -> None:
    told: list[int] = []
    clean_rows(enumerate([row()] * (2 * METER_ROWS), 1), LAYOUT, LIMITS, tmp_path / "rejects.jsonl", told.append)
    assert told == [METER_ROWS, METER_ROWS]


def test_a_text_key_ignores_case_width_space_and_punctuation() -> None:
    assert text_key("什么是 ＣＯＰＤ？") == text_key("什么是copd") == "什么是copd"
    assert text_key("？？") != text_key("！")
