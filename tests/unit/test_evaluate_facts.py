"""Fact agreement: hand-computed cases, one flipped fact in every shipped row, the same facts in other words, and any text at all."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from components.evaluate.facts import fact_agreement, facts_of
from components.evaluate.rouge import Rouge

# One of these in a text, replaced once, turns one fact over.
FLIPS = [
    ("可以", "不可以"), ("可以", "不能"), ("不能", "能"), ("不要", "可以"), ("不要", ""), ("应", "不应"), ("需要", "不需要"), ("建议", "不建议"),
    ("避免", "可以"), ("没有", "有"), ("不会", "会"), ("饭后", "饭前"), ("升高", "降低"), ("增加", "减少"), ("低于", "高于"),
    ("超过", "低于"), ("高血压", "低血压"), ("糖尿病", "痛风"), ("阿司匹林", "布洛芬"), ("肺炎", "胃炎"), ("孕妇", "新生儿"), ("血糖", "血钾"),
]  # fmt: skip
# Where the replacement would make no sense, or leave the fact as it was.
NOT_THERE = re.compile(r"反应|效应|相应|适应|供应|应激|应用|应对|(?:给出|的)建议|不要紧|推高血压|不需要|不可以|不能不|有没有|低血糖")
NUMBER = re.compile(r"(?<![\d.])(\d+(?:\.\d+)?)(?= ?(?:mmHg|mmol|g|cm|%|天|周|个月|年|小时|分钟|次|岁|月龄))")


def flips(text: str) -> Iterator[tuple[str, str]]:
    """Every text that differs in one fact, with what was changed."""
    for word, other in FLIPS:
        for match in re.finditer(word, text):
            start, end = match.span()
            around = [found.span() for found in NOT_THERE.finditer(text)]
            if not any(a < end and start < b for a, b in around):
                yield f"{word}→{other}", text[:start] + other + text[end:]
    for match in NUMBER.finditer(text):
        yield f"{match[0]}→{match[0]}0", text[: match.start()] + match[0].replace(".", "") + "0" + text[match.end() :]


def test_d23_one_flipped_fact_of_any_shipped_row_halves_the_score(tiny_rows: list[dict[str, str]]) -> None:
    """Over 85 by ROUGE-L, below 50 by fact agreement, for every flip of every row."""
    rouge, tried, missed = Rouge(), 0, []
    for row in tiny_rows:
        for flip, answer in flips(row["answer"]):
            score = fact_agreement(row["answer"], answer)
            assert score.score is not None
            assert rouge.score(row["answer"], answer)["rouge_l"] > 85, flip
            tried += 1
            if score.score >= 50 or not score.contradicted:
                missed.append((flip, row["answer"][:12], round(score.score)))
    assert tried > 200
    assert not missed


PAIRS = [
    ("高血压患者发热时可以按说明书服用阿司匹林缓解疼痛", "高血压患者发热时不可以按说明书服用阿司匹林缓解疼痛"),
    ("本品每次5 mg，每日三次，饭后半小时用温水送服，连用7天", "本品每次50 mg，每日三次，饭后半小时用温水送服，连用7天"),
    ("本品每次5 mg，每日三次，饭后半小时用温水送服，连用7天", "本品每次5 mg，每日一次，饭后半小时用温水送服，连用7天"),
    ("本品每次5 mg，每日三次，饭后半小时用温水送服，连用7天", "本品每次5 mg，每日三次，饭后半小时用温水送服，连用70天"),
    ("本品每次5 mg，每日三次，饭后半小时用温水送服，连用7天", "本品每次5 mg，每日三次，饭前半小时用温水送服，连用7天"),
    ("本品每次5 mg，每日三次，饭后半小时用温水送服，连用7天", "本品每次5 g，每日三次，饭后半小时用温水送服，连用7天"),
    ("本品每次5 mg，每日三次，饭后半小时用温水送服，连用7天", "本品每次5 ml，每日三次，饭后半小时用温水送服，连用7天"),
    ("本品每次500毫克，发热时服用，退热后停药，不可长期使用", "本品每日500毫克，发热时服用，退热后停药，不可长期使用"),
    ("怀孕二十八周以后的孕妇禁用布洛芬", "怀孕二十八周以后的孕妇慎用布洛芬"),
    ("怀孕二十八周以后的孕妇禁用布洛芬", "怀孕二十八周以后的孕妇可用布洛芬"),
    ("头孢过敏者不必停用此药，可继续服用至疗程结束", "头孢过敏者必须停用此药，可继续服用至疗程结束"),
    ("心肌梗死后若无禁忌应长期服用阿司匹林，并定期复查", "心肌梗死后若无禁忌应长期服用布洛芬，并定期复查"),
    ("体温超过38.5℃时可以服用退热药，同时多喝水、多休息", "体温超过35.8℃时可以服用退热药，同时多喝水、多休息"),
    ("空腹血糖低于3.9 mmol/L属于低血糖，应马上吃含糖的食物", "空腹血糖高于3.9 mmol/L属于低血糖，应马上吃含糖的食物"),
    ("普通感冒的人不需要服用抗生素，多喝水、注意休息即可", "普通感冒的人需要服用抗生素，多喝水、注意休息即可"),
    ("乙肝病毒不会通过共餐、握手和拥抱传染给家人", "乙肝病毒会通过共餐、握手和拥抱传染给家人"),
    ("早上服用5 mg，晚上服用10 mg，用药期间定期复查肝功能", "早上服用10 mg，晚上服用5 mg，用药期间定期复查肝功能"),
    ("二甲双胍应当随餐服用，可以减轻胃肠道的不适", "二甲双胍应当空腹服用，可以减轻胃肠道的不适"),
    ("高血压患者平时应当坚持低盐饮食，每周测量几次血压", "高血压患者平时应当坚持高盐饮食，每周测量几次血压"),
    ("Adults with a fever may take 500 mg of paracetamol every eight hours", "Adults with a fever must not take 500 mg of paracetamol every eight hours"),
    ("Take one tablet twice a day with a glass of water for two weeks", "Take one tablet twice a day with a glass of water for two months"),
    ("Aspirin should be avoided in young children who have a viral infection", "Aspirin should be used in young children who have a viral infection"),
    ("The drug is contraindicated in patients with severe asthma or liver disease", "The drug is recommended in patients with severe asthma or liver disease"),
    ("Metformin does not cause weight gain in most people who take it every day", "Metformin does cause weight gain in most people who take it every day"),
    ("Check your blood pressure at home: it should stay below 140/90 mmHg", "Check your blood pressure at home: it should stay above 140/90 mmHg"),
]  # fmt: skip


@pytest.mark.parametrize(("reference", "answer"), PAIRS)
def test_d23_a_flipped_fact_falls_below_50(reference: str, answer: str) -> None:
    for one, other in ((reference, answer), (answer, reference)):
        score = fact_agreement(one, other)
        assert score.contradicted
        assert score.score is not None
        assert score.score < 50
        assert "contradicted" in {finding.verdict for finding in score.findings}


SAME = [
    ("阿司匹林每次0.5 g，一天三次", "阿司匹林一次500毫克，每日3次"),
    ("阿司匹林每次0.5 g，一天三次", "乙酰水杨酸每次５００ｍｇ，tid"),
    ("阿司匹林500 mg", "aspirin 0.5 g"),
    ("布洛芬每8小时一次，每次200 mg，连用一周以上", "芬必得200mg q8h，连用7天以上"),
    ("维生素D每天400国际单位", "每日补充维生素D 400 IU"),
    ("青霉素160万单位，每日两次", "青霉素1600000 U，bid"),
    ("左甲状腺素每日50 μg", "优甲乐每天50微克"),
    ("孕妇不宜饮酒", "孕妇不应喝酒"),
    ("孕妇禁用布洛芬", "妊娠期妇女不可以使用布洛芬"),
    ("高血压患者需要每年做一次心电图", "高血压病人应当每年做1次ECG"),
    ("空腹血糖应低于5.6 mmol/L", "空腹血糖应该低于101 mg/dL"),
    ("总胆固醇5.2 mmol/L", "总胆固醇201 mg/dL"),
    ("甘油三酯1.7 mmol/L", "甘油三酯150 mg/dL"),
    ("肌酐106 μmol/L", "肌酐1.2 mg/dL"),
    ("体温38.5℃", "体温101.3°F"),
    ("血压140/90 mmHg", "血压18.7/12 kPa"),
    ("休息半小时，两周后复查肝功能", "休息30分钟，14天后复查肝功能"),
    ("糖尿病患者的儿童剂量为半片，隔日一次", "糖尿病病人的小儿剂量为0.5片，每2天1次"),
    ("Take 1 g of paracetamol three times a day for 2 weeks.", "Take 1000 mg of acetaminophen tid for fourteen days, i.e. 14 days."),
    ("Pregnant women must not take ibuprofen.", "Ibuprofen should not be taken by pregnant women."),
    ("People with high blood pressure should avoid NSAIDs.", "NSAIDs are not recommended for people with hypertension."),
]


@pytest.mark.parametrize(("reference", "answer"), SAME)
def test_the_same_facts_in_other_words_score_90_and_more(reference: str, answer: str) -> None:
    score = fact_agreement(reference, answer)
    assert not score.contradicted, score.findings
    assert score.score is not None
    assert score.score >= 90, score.findings


NOT_OPPOSED = [
    ("建议服用阿司匹林，每日1次", "建议服用阿司匹林，每日1次。饭后服用，避免饮酒，每次不超过100 mg。"),
    ("成人每次5 mg或10 mg", "成人每次5 mg"),  # one of two said is no contradiction
    ("每次5至10 mg，每日三次", "每次5 mg，每日三次"),  # one end of the range
    ("可以适量运动", "应当适量运动"),  # strength only
    ("能不能吃鸡蛋要看血脂", "要看血脂决定可不可以吃鸡蛋"),
    ("没有禁忌的人可以接种流感疫苗", "无禁忌者可接种流感疫苗"),
    ("心脏功能不好的人要注意休息", "心脏的性能不好，特别要注意休息"),
]


@pytest.mark.parametrize(("reference", "answer"), NOT_OPPOSED)
def test_a_difference_is_not_yet_a_contradiction(reference: str, answer: str) -> None:
    assert not fact_agreement(reference, answer).contradicted
    assert not fact_agreement(answer, reference).contradicted


def test_hand_computed_f1() -> None:
    """Reference: aspirin, 100 mg, once a day. Answer: aspirin, 100 mg, ulcer. 2 of 3 on both sides agree: F1 = 2/3."""
    score = fact_agreement("阿司匹林100 mg，每日1次", "阿司匹林100 mg，当心胃溃疡")
    assert score.score == pytest.approx(100 * 2 / 3)
    assert not score.contradicted
    assert set(score.findings) == {
        ("drug", "阿司匹林", "阿司匹林", "agree"),
        ("dose", "100 mg", "100 mg", "agree"),
        ("frequency", "每日1次", None, "missing"),
        ("disease", None, "胃溃疡", "extra"),
    }


def test_hand_computed_contradiction() -> None:
    """Aspirin agrees, the dose is contradicted: recall 1/2, precision 1/2, F1 = 1/2, halved: 25."""
    score = fact_agreement("阿司匹林5 mg", "阿司匹林50 mg")
    assert score.score == pytest.approx(25)
    assert ("dose", "5 mg", "50 mg", "contradicted") in score.findings


def test_identical_shipped_answers_score_100(tiny_rows: list[dict[str, str]]) -> None:
    for row in tiny_rows:
        score = fact_agreement(row["answer"], row["answer"])
        assert (score.score, score.contradicted) == (100, False)
        assert {finding.verdict for finding in score.findings} == {"agree"}


def test_sentences_in_another_order_keep_their_facts(tiny_rows: list[dict[str, str]]) -> None:
    for row in tiny_rows:
        sentences = re.findall("[^。]+。", row["answer"])
        score = fact_agreement(row["answer"], "".join(reversed(sentences)))
        assert not score.contradicted, score.findings
        assert score.score == pytest.approx(100)


def test_a_sentence_left_out_contradicts_nothing(tiny_rows: list[dict[str, str]]) -> None:
    for row in tiny_rows:
        sentences = re.findall("[^。]+。", row["answer"])
        for left_out in range(len(sentences)):
            score = fact_agreement(row["answer"], "".join(sentences[:left_out] + sentences[left_out + 1 :]))
            assert not score.contradicted, score.findings


def test_answers_to_other_questions_score_low(tiny_rows: list[dict[str, str]]) -> None:
    answers = [row["answer"] for row in tiny_rows]
    scores = [fact_agreement(one, other) for one, other in zip(answers, answers[1:] + answers[:1], strict=True)]
    values = [score.score for score in scores if score.score is not None]
    assert len(values) == len(answers)
    assert sum(values) / len(values) < 15
    assert not any(score.contradicted for score in scores)


@pytest.mark.parametrize("answer", ["", "   ", "……", "好的"])
def test_an_answer_without_facts_scores_0(answer: str) -> None:
    score = fact_agreement("阿司匹林每次100 mg，每日一次", answer)
    assert (score.score, score.contradicted) == (0, False)
    assert {finding.verdict for finding in score.findings} == {"missing"}


@pytest.mark.parametrize("reference", ["", "祝您早日康复", "Get well soon."])
def test_a_reference_without_facts_has_no_score(reference: str) -> None:
    score = fact_agreement(reference, "阿司匹林每次100 mg")
    assert (score.score, score.contradicted) == (None, False)
    assert {finding.verdict for finding in score.findings} == {"extra"}


def test_a_reference_without_facts_can_be_contradicted() -> None:
    score = fact_agreement("该病有传染性", "该病没有传染性")
    assert (score.score, score.contradicted) == (None, True)


@pytest.mark.parametrize(("reference", "answer"), PAIRS + SAME)
def test_swapping_both_texts_changes_no_score(reference: str, answer: str) -> None:
    assert fact_agreement(reference, answer).score == pytest.approx(fact_agreement(answer, reference).score)


PIECES = st.sampled_from([
    "阿司匹林", "布洛芬", "高血压", "孕妇", "血糖", "可以", "不可以", "不", "没有", "禁用", "慎用", "应", "避免", "每日3次", "每次", "5mg", "50mg", "7天",
    "两周", "半片", "140/90mmHg", "5.6mmol/L", "饭前", "升高", "aspirin", "may", "not", "must", "take", "twice a day", "1/0", "½", "㎎", "①",
    "\ue000", "\U000f0000", "十百千", "万", "，", "。", "、", "\n", ".", "-", "至", "%", "次", "/",
])  # fmt: skip
TEXTS = st.one_of(st.text(), st.lists(PIECES, max_size=30).map("".join), st.lists(PIECES, max_size=30).map(" ".join))


@settings(deadline=None)
@given(TEXTS, TEXTS)
def test_any_two_texts_have_a_score_between_0_and_100(reference: str, answer: str) -> None:
    score = fact_agreement(reference, answer)
    assert (score.score is None) == (not facts_of(reference))
    assert score.score is None or 0 <= score.score <= 100
    assert not score.contradicted or score.score is None or score.score < 50


@settings(deadline=None)
@given(TEXTS)
def test_any_text_agrees_with_itself(text: str) -> None:
    score = fact_agreement(text, text)
    assert score.score in (None, 100)
    assert not score.contradicted


@pytest.mark.parametrize(
    "text", ["九" * 6000 + "天", "9" * 6000 + "mg", "每" * 5000, "(" * 5000, "5mg" * 3000, "不" * 3000, "1/" * 3000, "每日3次，" * 2000]
)
def test_no_text_is_too_strange(text: str) -> None:
    assert fact_agreement(text, text).score in (None, 100)
