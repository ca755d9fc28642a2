"""ROUGE in Chinese and English: known answers, and equality with the library where the library is right."""

from __future__ import annotations

import itertools
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer

from components.evaluate.rouge import ChineseTokenizer, Cut, Rouge, characters

ENGLISH = (
    ("High blood pressure usually has no symptoms.", "Most people with high blood pressure have no symptoms at all."),
    ("Take 2.5 mg twice daily, not more than 5 mg/day.", "Take 2.5mg two times a day."),
    ("Call 911 at once.", "Drink water."),
)
NAMES = {"rouge_1": "rouge1", "rouge_2": "rouge2", "rouge_l": "rougeL"}
MIXED = "高血压不能吃药5.0mg/ ABC。，\n①é🙂"


@pytest.mark.parametrize("cut", ["characters", "jieba"])
@pytest.mark.parametrize(
    "text",
    ["高血压患者每天吃盐应少于5 g，血压控制在140/90 mmHg以下。", "Keep your blood pressure below 140/90 mmHg.", "B超显示CRP为3.5mg/L"],
)
def test_d11_identical_text_scores_100(cut: Cut, text: str) -> None:
    assert Rouge(cut).score(text, text) == pytest.approx({"rouge_1": 100, "rouge_2": 100, "rouge_l": 100})


@pytest.mark.parametrize("cut", ["characters", "jieba"])
def test_d11_a_shared_reading_is_not_a_shared_answer(cut: Cut) -> None:
    """rouge-score alone keeps nothing but `120 80mmhg` of both sentences, and gives 100."""
    reference, answer = "正常血压低于120/80mmHg。", "我朋友上周量得120/80mmHg，医生让他复查！"
    assert RougeScorer(["rouge1"]).score(reference, answer)["rouge1"].fmeasure == 1.0
    scores = Rouge(cut).score(reference, answer)
    assert 0 < scores["rouge_1"] < 30
    assert scores["rouge_l"] < 30


def test_d11_hand_computed_chinese() -> None:
    """糖尿病可以治疗 / 糖尿病不能治愈: 7 characters each; 4 in common (糖尿病治), 2 pairs (糖尿, 尿病) of 6, longest subsequence 4."""
    scores = Rouge().score("糖尿病可以治疗", "糖尿病不能治愈")
    assert scores == pytest.approx({"rouge_1": 100 * 4 / 7, "rouge_2": 100 * 2 / 6, "rouge_l": 100 * 4 / 7})


def test_d11_hand_computed_with_numbers_and_words() -> None:
    """每 日 2次 → 每, 日, 2, 次, of 4 tokens 3 are shared; the dose is one token, so 5mg and 50mg share nothing."""
    assert Rouge().score("每日2次", "每日3次")["rouge_1"] == pytest.approx(75)
    assert Rouge().score("服5mg", "服50mg")["rouge_1"] == pytest.approx(50)


def _library(reference: str, answer: str, tokenizer: ChineseTokenizer | None = None) -> dict[str, float]:
    """rouge-score's own counting, n-gram by n-gram and with a table of subsequences: the plain twin of ours."""
    scores = RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=tokenizer).score(reference, answer)
    return {name: 100 * scores[library_name].fmeasure for name, library_name in NAMES.items()}


@pytest.mark.parametrize(("reference", "answer"), ENGLISH)
def test_english_equals_the_library(reference: str, answer: str) -> None:
    assert Rouge().score(reference, answer) == pytest.approx(_library(reference, answer), abs=1e-9)


@given(st.text(st.characters(max_codepoint=0x24F)), st.text(st.characters(max_codepoint=0x24F)))
def test_any_latin_text_equals_the_library(reference: str, answer: str) -> None:
    assert Rouge().score(reference, answer) == pytest.approx(_library(reference, answer), abs=1e-9)


@given(st.text(st.sampled_from(MIXED), max_size=60), st.text(st.sampled_from(MIXED), max_size=60))
def test_any_chinese_text_equals_the_library_with_our_tokenizer(reference: str, answer: str) -> None:
    expected = _library("药" + reference, answer, ChineseTokenizer())
    assert Rouge().score("药" + reference, answer) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("cut", ["characters", "jieba"])
def test_the_shipped_rows_equal_the_library(cut: Cut, tiny_rows: list[dict[str, str]]) -> None:
    for row, other in itertools.pairwise(tiny_rows):
        library = _library(row["answer"], other["answer"], ChineseTokenizer(cut))
        assert Rouge(cut).score(row["answer"], other["answer"]) == pytest.approx(library, abs=1e-9)


def test_a_long_answer_takes_little_memory() -> None:
    """The library's table of 20,000 × 20,000 subsequences would take gigabytes, and minutes."""
    tracemalloc.start()
    try:
        scores = Rouge().score("血压高要少吃盐" * 3000, "血压高不能吃盐" * 3000)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert scores["rouge_l"] == pytest.approx(100 * 5 / 7, abs=0.1)
    assert peak_bytes < 64 << 20


def test_few_texts_are_kept() -> None:
    for number in range(200):
        Rouge().score(f"血压{number}", f"血糖{number}")
    assert characters.cache_info().currsize <= 32


@given(st.text(st.sampled_from(MIXED), max_size=40))
def test_scores_stay_in_range_and_equal_texts_agree(text: str) -> None:
    scores = Rouge().score(text, text)
    assert all(0 <= value <= 100 for value in scores.values())
    if ChineseTokenizer().tokenize(text):
        assert scores["rouge_1"] in (0, pytest.approx(100))


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("血压140 mmHg", ["血", "压", "140mmhg"]),
        ("１２０／８０ｍｍＨｇ", ["120/80mmhg"]),
        ("2.5mg/kg，38.5℃，100%", ["2.5mg/kg", "38.5°c", "100%"]),
        ("HbA1c与COVID-19", ["hba1c", "与", "covid-19"]),
        ("5次 good", ["5", "次", "good"]),
        ("每次5g，1.5小时", ["每", "次", "5g", "1.5", "小", "时"]),
        ("。！？ \n", []),
    ],
)
def test_numbers_units_and_words_stay_whole(text: str, tokens: list[str]) -> None:
    assert ChineseTokenizer().tokenize(text) == tokens


def test_jieba_cuts_words() -> None:
    assert ChineseTokenizer("jieba").tokenize("糖尿病患者服用阿司匹林100 mg") == ["糖尿病", "患者", "服用", "阿司匹林", "100mg"]


def test_an_empty_or_foreign_answer_scores_0() -> None:
    for answer in ("", "。", "completely different"):
        assert set(Rouge().score("多喝水", answer).values()) == {0.0}
    assert set(Rouge().score("drink water", "多喝水").values()) == {0.0}
