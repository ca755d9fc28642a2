"""BLEU, chrF and exact match: hand-computed cases, and equality with sacrebleu."""

from __future__ import annotations

import itertools
import math

import pytest
import sacrebleu
from hypothesis import given
from hypothesis import strategies as st
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
from sacrebleu.tokenizers.tokenizer_re import TokenizerRegexp
from sacrebleu.tokenizers.tokenizer_zh import TokenizerZh

from components.evaluate.lengths import length_statistics
from components.evaluate.overlap import CHINESE_RUN, Overlap
from components.evaluate.rouge import is_chinese

CHINESE = "高血压患者每天吃盐应少于5克，血压控制在140/90mmHg以下。"
MIXED = "高血压不能吃药5.0mg/ -ABC。，\n\u2003\u3000①é🙂𠀀&lt;\x1c"


@pytest.fixture(scope="module")
def overlap() -> Overlap:
    return Overlap()


def test_hand_computed_chinese_bleu(overlap: Overlap) -> None:
    """糖尿病可以治疗 / 糖尿病不能治愈: 4 of 7 characters, 2 of 6 pairs, 1 of 5 triples, none of 4 quadruples, which counts as 0.5."""
    expected = 100 * math.exp(sum(map(math.log, (4 / 7, 2 / 6, 1 / 5, 0.5 / 4))) / 4)
    assert overlap.score("糖尿病可以治疗", "糖尿病不能治愈")["bleu"] == pytest.approx(expected)


def test_hand_computed_english_bleu_with_its_brevity_penalty(overlap: Overlap) -> None:
    """3 words of 5, all in place; there is no quadruple, so three orders count: precision 1, penalty exp(1 − 5/3)."""
    assert overlap.score("drink water and rest well", "drink water and")["bleu"] == pytest.approx(100 * math.exp(1 - 5 / 3))


def test_hand_computed_chrf(overlap: Overlap) -> None:
    """abc / abd, orders 1 to 3: precision and recall are 2/3, 1/2 and 0, on average 7/18; F2 of equals is the same."""
    assert overlap.score("abc", "abd")["chrf"] == pytest.approx(100 * 7 / 18)


@pytest.mark.parametrize(
    ("reference", "answer", "tokenizer"),
    [
        (CHINESE, "高血压患者应少吃盐，每天不超过5克。", "zh"),
        ("Take 2.5 mg twice daily, not more than 5 mg/day.", "Take 2.5 mg two times a day.", "13a"),
        ("Take aspirin.", "服用阿司匹林", "13a"),
    ],
)
def test_it_equals_sacrebleu(overlap: Overlap, reference: str, answer: str, tokenizer: str) -> None:
    scores = overlap.score(reference, answer)
    assert scores["bleu"] == pytest.approx(sacrebleu.sentence_bleu(answer, [reference], tokenize=tokenizer).score)
    assert scores["chrf"] == pytest.approx(sacrebleu.sentence_chrf(answer, [reference]).score)


@given(st.text(st.sampled_from(MIXED), max_size=60), st.text(st.sampled_from(MIXED), max_size=60))
def test_any_text_equals_sacrebleu(reference: str, answer: str) -> None:
    for one, tokenizer in ((reference, "zh" if is_chinese(reference) else "13a"), ("药" + reference, "zh")):
        scores = Overlap().score(one, answer)
        expected = min(100, sacrebleu.sentence_bleu(answer, [one], tokenize=tokenizer).score)
        assert scores["bleu"] == pytest.approx(expected, abs=1e-9)
        assert scores["chrf"] == pytest.approx(sacrebleu.sentence_chrf(answer, [one]).score, abs=1e-9)


def test_the_shipped_rows_equal_sacrebleu(overlap: Overlap, tiny_rows: list[dict[str, str]]) -> None:
    for row, other in itertools.pairwise(tiny_rows):
        scores = overlap.score(row["answer"], other["answer"])
        bleu = sacrebleu.sentence_bleu(other["answer"], [row["answer"]], tokenize="zh").score
        assert scores["bleu"] == pytest.approx(bleu, abs=1e-9)
        assert scores["chrf"] == pytest.approx(sacrebleu.sentence_chrf(other["answer"], [row["answer"]]).score, abs=1e-9)


def test_the_same_characters_are_chinese_as_in_sacrebleu() -> None:
    ours = {code for code in range(0x110000) if CHINESE_RUN.match(chr(code))}
    assert ours == {code for code in range(0x110000) if TokenizerZh._is_chinese_char(chr(code))}


def test_d11_the_usual_tokenizer_would_score_chinese_0(overlap: Overlap) -> None:
    reference, answer = "多喝水多休息", "多喝水多休息吧"
    assert sacrebleu.sentence_bleu(answer, [reference], tokenize="13a").score == 0
    assert overlap.score(reference, answer)["bleu"] > 70


@pytest.mark.parametrize(
    ("reference", "answer", "equal"),
    [
        ("每日2次，饭后服用。", "每日 2次,饭后服用", 1),
        ("Take 2.5 mg DAILY.", "take 2.5mg daily", 1),
        ("服5mg", "服50mg", 0),
        ("血压<140", "血压>140", 0),
        ("可以吃", "不可以吃", 0),
        ("take 5 mg", "take 5 mg 不要", 0),
        ("？！", "？！", 1),
        ("？！", "。", 0),
    ],
)
def test_exact_match(overlap: Overlap, reference: str, answer: str, equal: int) -> None:
    assert overlap.score(reference, answer)["exact_match"] == equal


@given(st.text(st.sampled_from("高血压不能吃药5.0mg/ ABC。，\n①é🙂"), max_size=40), st.text(max_size=20))
def test_scores_stay_in_range_and_equal_texts_agree(text: str, other: str) -> None:
    overlap = Overlap()
    for scores in (overlap.score(text, other), overlap.score(other, text)):
        assert 0 <= scores["bleu"] <= 100 and 0 <= scores["chrf"] <= 100.001
    assert overlap.score(text, text)["exact_match"] == 1


def test_an_empty_answer_scores_0(overlap: Overlap) -> None:
    assert set(overlap.score("多喝水", "").values()) == {0.0}


def test_texts_are_not_kept(overlap: Overlap) -> None:
    for tokenizer in (tokenizers := (Tokenizer13a, TokenizerRegexp, TokenizerZh)):
        tokenizer.__call__.cache_clear()
    for text in (CHINESE, "Drink water."):
        overlap.score(text, text)
    assert all(tokenizer.__call__.cache_info().currsize == 0 for tokenizer in tokenizers)


def test_length_statistics_are_hand_computed() -> None:
    statistics = length_statistics(list(range(0, 101)), [7] * 101, [50] * 100 + [0])
    expected = {"mean": 50, "median": 50, "p5": 5, "p10": 10, "p25": 25, "p75": 75, "p90": 90, "p95": 95}
    assert statistics["characters"] == pytest.approx(expected)
    assert set(statistics["tokens"].values()) == {7.0}
    assert statistics["ratio_to_reference"] == pytest.approx(0.99)  # of the 100 rows whose reference is not empty
