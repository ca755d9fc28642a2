"""Answers that went wrong are counted, and answers that went right are not; lengths of both."""

from __future__ import annotations

import pytest

from components.evaluate.degeneration import chinese_share, degeneration, repeated_4grams
from components.evaluate.lengths import length_statistics


@pytest.mark.parametrize("text", ["盐吃多了不好，" * 30, "drink more water and rest " * 20, "下次 " * 100])
def test_d19_a_loop_is_degenerate(text: str) -> None:
    scores = degeneration("高血压怎么办？", text, "length")
    assert scores["repeated_4grams"] > 0.9
    assert scores["degenerate"] == 1
    assert scores["never_stopped"] == 1


def test_d19_repeated_4grams_by_hand() -> None:
    assert repeated_4grams("一二三四五") == 0  # 2 different 4-grams
    assert repeated_4grams("一二三四一二三四") == pytest.approx(1 - 4 / 5)  # 5 4-grams, the last equals the first
    assert repeated_4grams("一二三") == 0  # too short to have one
    assert repeated_4grams("") == 0


def test_d19_no_row_of_the_shipped_data_is_degenerate(tiny_rows: list[dict[str, str]]) -> None:
    for row in tiny_rows:
        scores = degeneration(row["question"], row["answer"], "stop")
        assert scores.pop("repeated_4grams") < 0.15, row
        assert set(scores.values()) == {0.0}, row


@pytest.mark.parametrize(
    ("question", "answer", "copied"),
    [
        ("哪些症状提示可能出现了心力衰竭？", "哪些症状提示可能出现了心力衰竭", True),
        ("糖尿病患者能不能吃水果？", "糖尿病患者能不能吃水果？糖尿病患者能不能吃水果？", True),
        ("What is asthma?", "What is asthma", True),
        ("糖尿病患者能不能吃水果？", "糖尿病患者能不能吃水果？ mendatang pacient " * 5, True),  # seen in an untuned model
        ("头痛", "头痛。", True),
        ("糖尿病患者能不能吃水果？", "糖尿病患者可以吃水果，但要选含糖少的品种，每次不超过一个拳头大小。", False),
        ("头痛怎么办？", "休息", False),
        ("头痛怎么办？", "", False),
    ],
)
def test_d19_a_copy_of_the_question_is_noticed(question: str, answer: str, copied: bool) -> None:
    assert degeneration(question, answer, "stop")["copies_question"] == copied


@pytest.mark.parametrize(
    ("question", "answer", "wrong"),
    [
        ("什么是COPD？", "COPD是慢性阻塞性肺疾病。", False),
        ("什么是高血压？", "Hypertension means a high pressure in the arteries.", True),
        ("What is hypertension?", "高血压是指动脉压力偏高。", True),
        ("What is hypertension?", "High blood pressure (高血压) means a raised pressure.", False),
        ("发病率是多少？", "0.13%", False),  # numbers have no language
        ("什么是高血压？", "", False),  # counted as empty
    ],
)
def test_the_wrong_language_is_noticed(question: str, answer: str, wrong: bool) -> None:
    assert degeneration(question, answer, "stop")["wrong_language"] == wrong


def test_chinese_share_counts_a_latin_word_as_one() -> None:
    assert chinese_share("服用aspirin") == pytest.approx(2 / 3)
    assert chinese_share("aspirin daily") == 0
    assert chinese_share("120/80") is None


def test_an_empty_answer_is_only_empty() -> None:
    scores = degeneration("头痛怎么办？", " \n", "stop")
    assert {name for name, value in scores.items() if value} == {"empty"}


def test_length_statistics_by_hand() -> None:
    statistics = length_statistics([10, 20, 30, 40, 50], [1, 2, 3, 4, 5], [10, 10, 10, 10, 10])
    assert statistics["characters"] == {"mean": 30, "median": 30, "p5": 12, "p10": 14, "p25": 20, "p75": 40, "p90": 46, "p95": 48}
    assert statistics["tokens"] == {"mean": 3, "median": 3, "p5": 1.2, "p10": 1.4, "p25": 2, "p75": 4, "p90": 4.6, "p95": 4.8}
    assert statistics["ratio_to_reference"] == 3
