"""One model sits an exam: likelihoods equal whole logits, rotations are undone, nothing leaves the denominator, figures equal hand values."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from components.common.chat import ChatFormat
from components.common.engine import Engine
from components.common.errors import ModelError
from components.evaluate.compare import mcnemar, wilson_interval
from components.evaluate.exam_layouts import Exam, Question
from components.evaluate.exam_letters import Reading
from components.evaluate.exam_likelihood import letter_tokens, next_log_likelihoods
from components.evaluate.exam_scores import compare_exams, summarise
from components.evaluate.exams import (
    Asked,
    ExamResult,
    QuestionResult,
    longest_prompt_tokens,
    printed,
    prompt_count,
    prompt_text,
    run_exam,
    shifts,
)

FRUIT = Question("q:1", "哪个是水果？", {"A": "石头", "B": "木头", "C": "苹果", "D": "铁"}, "C", subject="常识")
EYES = Question("q:2", "How many eyes do people have?", {"A": "0", "B": "2", "C": "5"}, "B", subject="anatomy")
HANDS = Question("q:3", "洗手时应洗哪里？", {"A": "手心", "B": "手背", "C": "鼻尖"}, "AB", several=True, subject="护理")
ALL = Question("q:4", "哪些是颜色？", {"A": "红", "B": "绿", "C": "蓝", "D": "以上都是"}, "D", subject="常识")
LONG = Question("q:5", "水是湿的吗？" * 200, {"A": "是", "B": "否"}, "A")
EXAM = Exam([FRUIT, EYES, HANDS, ALL, LONG], {"no answer": ["q:9", "q:10"]}, "simple")
SETTINGS: dict[str, Any] = {"permutations": 4, "seed": 42, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def chat(tiny_model: Path) -> ChatFormat:
    return ChatFormat.of_tokenizer(AutoTokenizer.from_pretrained(tiny_model))


@pytest.fixture(scope="module")
def engine(tiny_model: Path, chat: ChatFormat) -> Iterator[Engine]:
    with Engine.load(tiny_model, chat=chat, precision="fp32", max_concurrency=4, max_prompt_tokens=400, max_new_tokens=16) as engine:
        yield engine


@pytest.fixture(scope="module")
def result(engine: Engine, chat: ChatFormat) -> ExamResult:
    return run_exam(engine, chat, EXAM, **SETTINGS)


# Likelihood


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_log_likelihoods_equal_the_plain_softmax_of_whole_logits(tiny_model: Path, chat: ChatFormat, batch_size: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    prompts = [chat.prompt_ids(tokenizer, prompt_text(question, 0)) for question in (EYES, FRUIT, HANDS, ALL)]
    tokens = letter_tokens(chat, tokenizer, "ABCD")
    with torch.inference_mode():
        expected = [model(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(-1)[tokens].tolist() for prompt in prompts]
    found = next_log_likelihoods(model, prompts, tokens, pad_id=chat.pad_id, batch_size=batch_size)
    for row, plain in zip(found, expected, strict=True):
        assert [math.exp(value) for value in row] == pytest.approx(plain, rel=1e-3)


def test_logits_of_whole_sequences_are_never_made(tiny_model: Path, chat: ChatFormat) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    shapes: list[tuple[int, ...]] = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))
    next_log_likelihoods(model, [[5, 6, 7], [5, 6, 7, 8, 9], [4]], [1, 2], pad_id=chat.pad_id, batch_size=2)
    assert shapes == [(2, 1, model.config.vocab_size), (1, 1, model.config.vocab_size)]


def test_a_rigged_model_is_right_exactly_where_its_letter_is_right(tiny_model: Path, chat: ChatFormat) -> None:
    """A head that likes the token of the printed C: the choice follows the position, so one rotation in four is right."""
    with Engine.load(tiny_model, chat=chat, precision="fp32", max_concurrency=4, max_prompt_tokens=400, max_new_tokens=8) as engine:
        favourite = letter_tokens(chat, engine.tokenizer, "ABCD")[2]

        def prefer(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            output[..., favourite] += 1000
            return output

        engine.model.lm_head.register_forward_hook(prefer)
        found = run_exam(engine, chat, Exam([FRUIT], {}, "simple"), **SETTINGS)
    (question,) = found.questions
    assert sorted(one.shift for one in question.asked) == [0, 1, 2, 3] and question.asked[0].shift == 0
    assert {one.shift: one.likeliest for one in question.asked} == {0: "C", 1: "D", 2: "A", 3: "B"}
    assert {one.shift: one.stated for one in question.asked} == {0: "C", 1: "D", 2: "A", 3: "B"}  # it writes "CCCCCCCC"
    assert question.rights("likelihood") == question.rights("generated") == [True, False, False, False]
    figures = summarise(found, confidence=0.95)["likelihood"]
    assert (figures["accuracy"], figures["written_order"]["accuracy"], figures["all_orders"]["accuracy"]) == (0.25, 1.0, 0.0)
    assert figures["letter_mass"] == pytest.approx(1)
    assert figures["positions"]["C"] == {"right_here": 1, "chosen": 4, "accuracy_here": 1.0}
    assert figures["positions"]["A"] == {"right_here": 1, "chosen": 0, "accuracy_here": 0.0}


def test_a_tokenizer_without_letters_is_refused(tiny_model: Path, chat: ChatFormat) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    with pytest.raises(ModelError, match="no token of its own"):
        letter_tokens(chat, tokenizer, ["A", "BAB"])
    with pytest.raises(ModelError, match="no token of its own"):
        letter_tokens(chat, tokenizer, ["A", "A "])


# Orders


def test_rotations_are_seeded_start_with_the_written_order_and_are_cyclic() -> None:
    assert shifts(FRUIT, 1, 42) == [0]
    assert sorted(shifts(FRUIT, 9, 42)) == [0, 1, 2, 3]
    assert shifts(FRUIT, 3, 42) == shifts(FRUIT, 3, 42)
    assert len({tuple(shifts(replace(FRUIT, text=str(number)), 2, 42)) for number in range(50)}) == 3
    for shift in range(4):
        assert [FRUIT.options[letter] for letter in printed(FRUIT, shift).values()] == [*FRUIT.options.values()][shift:] + [
            *FRUIT.options.values()
        ][:shift]


def test_the_prompt_prints_rotated_options_and_the_right_letter_follows() -> None:
    text = prompt_text(FRUIT, 2)
    assert text.endswith("哪个是水果？\n\nA. 苹果\nB. 铁\nC. 石头\nD. 木头")
    assert printed(FRUIT, 2)["A"] == FRUIT.answer
    assert prompt_text(EYES, 0).startswith("This is a multiple-choice question with one right answer.")
    assert prompt_text(HANDS, 0).startswith("以下是一道多项选择题")


@pytest.mark.parametrize("option", ["以上都是", "A和B", "A，B和C均对", "All of the above", "None of these", "Both A and B", "B/A＜1"])
def test_options_that_speak_of_other_options_are_not_moved(option: str) -> None:
    assert shifts(replace(FRUIT, options={**FRUIT.options, "D": option}), 4, 42) == [0]


@pytest.mark.parametrize("option", ["60岁以上", "DNA和RNA", "None", "B超", "above the knee", "all cells"])
def test_other_options_are_moved(option: str) -> None:
    assert len(shifts(replace(FRUIT, options={**FRUIT.options, "D": option}), 4, 42)) == 4


def test_letters_that_are_missing_in_the_file_are_closed_up_in_print() -> None:
    gap = Question("q", "问？", {"B": "甲", "C": "乙", "E": "丙"}, "E")
    assert printed(gap, 0) == {"A": "B", "B": "C", "C": "E"}
    assert printed(gap, 1) == {"A": "C", "B": "E", "C": "B"}


# The whole exam


def test_d24_every_question_stays_in_the_denominator(result: ExamResult) -> None:
    figures = summarise(result, confidence=0.95)
    assert figures["questions"] == figures["generated"]["questions"] == len(EXAM.questions)
    assert figures["likelihood"]["questions"] == 4  # not defined for several answers
    assert figures["skipped"] == {"no answer": 2}
    assert [len(one.asked) for one in result.questions] == [4, 3, 3, 1, 2]
    assert figures["prompts"] == prompt_count(EXAM, 4, 42) == 13
    assert figures["written_order_only"] == 1
    unparsed = figures["generated"]["unparsed"]
    assert sum(unparsed[reason] for reason in ("empty", "none", "ambiguous", "too_long")) == sum(
        not asked.stated for one in result.questions for asked in one.asked
    )
    assert unparsed["too_long"] == 2
    assert result.questions[4].rights("likelihood") == result.questions[4].rights("generated") == [False, False]


def test_the_tiny_model_that_knows_no_letters_gets_nothing_by_generation(result: ExamResult) -> None:
    assert all(one.rights("generated") == [False] * len(one.asked) for one in result.questions)
    assert all(asked.answer for one in result.questions[:4] for asked in one.asked)


def test_two_runs_are_identical(engine: Engine, chat: ChatFormat, result: ExamResult) -> None:
    done: list[int] = []
    again = run_exam(engine, chat, EXAM, **SETTINGS, on_done=done.append)
    assert again == result
    assert sum(done) == prompt_count(EXAM, 4, 42)


def test_blocks_do_not_change_the_result(engine: Engine, chat: ChatFormat, result: ExamResult, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("components.evaluate.exams.SLICE", 2)
    again = run_exam(engine, chat, EXAM, **SETTINGS)
    assert [[replace(asked, log_likelihoods=None) for asked in one.asked] for one in again.questions] == [
        [replace(asked, log_likelihoods=None) for asked in one.asked] for one in result.questions
    ]


def test_the_record_is_json(result: ExamResult) -> None:
    record = json.loads(json.dumps(result.as_dict(), allow_nan=False))
    first = record["questions"][0]
    assert first["gold"] == "C" and len(first["right_by_likelihood"]) == len(first["right_by_generated"]) == 4
    assert set(first["asked"][0]["log_likelihoods"]) == set("ABCD")
    json.dumps(summarise(result, confidence=0.95), allow_nan=False)


def test_the_longest_prompt_is_known_before_the_engine_starts(tiny_model: Path, chat: ChatFormat) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    longest = longest_prompt_tokens(EXAM, tokenizer, chat, permutations=4, seed=42)
    assert longest == max(len(chat.prompt_ids(tokenizer, prompt_text(LONG, shift))) for shift in (0, 1)) > 400


# Figures


def a_result(*rows: tuple[str, str]) -> ExamResult:
    """Questions with two options and the right answer A; what was stated in each order, "-" for nothing, and by likelihood."""
    questions = []
    for number, (stated, likeliest) in enumerate(rows):
        asked = []
        for shift, (one, other) in enumerate(zip(stated, likeliest, strict=True)):
            reading: Reading = "none" if one == "-" else "stated"
            asked.append(Asked(shift, {"A": -1.0, "B": -2.0}, other, one, one.strip("-"), reading))
        questions.append(QuestionResult(f"q:{number}", "even" if number % 2 == 0 else "odd", "AB", "A", False, asked))
    return ExamResult("simple", "digest", {}, questions)


def test_figures_equal_hand_values() -> None:
    figures = summarise(a_result(("AA", "AA"), ("AB", "BA"), ("-A", "BB"), ("A-", "AA")), confidence=0.95)
    generated = figures["generated"]
    assert generated["accuracy"] == pytest.approx((1 + 0.5 + 0.5 + 0.5) / 4)
    assert generated["written_order"]["accuracy"] == 0.75
    assert generated["all_orders"]["accuracy"] == 0.25
    assert generated["unparsed"] == {"empty": 0, "none": 2, "ambiguous": 0, "too_long": 0, "share": 0.25}
    # printed A is right in the first order and printed B in the second; A was stated there 3 and 2 times
    assert generated["positions"] == {
        "A": {"right_here": 4, "chosen": 3 + 1, "accuracy_here": 0.75},
        "B": {"right_here": 4, "chosen": 2, "accuracy_here": 0.5},
    }
    assert figures["likelihood"]["accuracy"] == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    assert figures["likelihood"]["letter_mass"] == pytest.approx(math.exp(-1) + math.exp(-2), abs=1e-6)
    assert figures["chance"] == 0.5
    assert figures["subjects"]["even"]["generated"]["accuracy"] == 0.75
    assert figures["subjects"]["odd"]["likelihood"]["questions"] == 2


def test_two_models_are_compared_on_the_same_questions() -> None:
    tuned = a_result(*[("AA", "AA")] * 9, ("BB", "BB"))
    base = a_result(*[("AA", "AA")] * 3, *[("B-", "AB")] * 6, ("AA", "AA"))
    found = compare_exams(tuned, base, confidence=0.95, seed=1)
    assert found["generated"]["difference"]["mean"] == pytest.approx(0.9 - 0.4)
    assert found["generated"]["difference"]["low"] < 0.5 < found["generated"]["difference"]["high"]
    assert found["generated"]["mcnemar"] == {"only_tuned": 6, "only_base": 1, "p_value": 0.125}
    assert found["likelihood"]["mcnemar"]["p_value"] == 1.0
    assert found == compare_exams(tuned, base, confidence=0.95, seed=1)


def test_results_of_different_exams_are_not_compared() -> None:
    with pytest.raises(ValueError, match="different exams"):
        compare_exams(a_result(("AA", "AA")), a_result(("A", "A")), confidence=0.95, seed=1)


@pytest.mark.parametrize(
    ("only_a", "only_b", "p_value"),
    [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 2 / 32), (6, 1, 2 * (1 + 7) / 128), (4, 4, 1.0), (10, 2, 2 * (1 + 12 + 66) / 4096)],
)
def test_mcnemar_equals_the_binomial_by_hand(only_a: int, only_b: int, p_value: float) -> None:
    right_a = [True] * only_a + [False] * only_b + [True, False] * 3
    right_b = [False] * only_a + [True] * only_b + [True, False] * 3
    assert mcnemar(right_a, right_b) == pytest.approx((only_a, only_b, p_value))


def test_mcnemar_holds_for_thousands_of_questions() -> None:
    assert mcnemar([True] * 3000 + [False] * 2000, [False] * 3000 + [True] * 2000).p_value < 1e-40
    with pytest.raises(ValueError, match=r"shorter|longer"):
        mcnemar([True], [True, False])


@pytest.mark.parametrize(
    ("right", "total", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (15, 148, 0.0624, 0.1605)],
)
def test_wilson_interval_equals_published_values(right: int, total: int, low: float, high: float) -> None:
    """Newcombe, "Two-sided confidence intervals for the single proportion", 1998, table I, method 3; the extremes by hand."""
    interval = wilson_interval(right, total, confidence=0.95)
    assert interval == pytest.approx((right / total, low, high), abs=6e-5)
