"""Every published layout of a multiple-choice exam is read, and what cannot be scored is said."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from components.common.errors import DataError
from components.evaluate.exam_layouts import Question, load_exam

Write = Callable[..., Path]

SIMPLE = {"question": "成人正常体温约是多少摄氏度？", "options": {"A": "27", "B": "37"}, "answer": "B", "subject": "常识"}
CMB = {
    "exam_type": "自拟",
    "exam_subject": "护理",
    "question": "洗手时应洗哪里？",
    "question_type": "多项选择题",
    "option": {"A": "手心", "B": "手背", "C": "指缝", "D": "鼻尖", "E": ""},
    "answer": "ABC",
}
MEDQA = {
    "question": "Which of these is a fruit?",
    "answer": "Apple",
    "options": {"A": "Stone", "B": "Apple"},
    "answer_idx": "B",
    "meta_info": "step1",
}
MEDMCQA = {"question": "How many eyes do people have?", "opa": "1", "opb": "2", "opc": "3", "opd": "4", "cop": 2, "subject_name": "Anatomy"}
PUBMEDQA = {
    "question": "Is water wet?",
    "contexts": ["We looked at water.", "It was wet."],
    "final_decision": "yes",
    "long_answer": "Water is wet.",
}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_file(name: str, content: Any) -> Path:
        """Rows as .jsonl, .json or .csv, whichever the name says; bytes and text as they are."""
        path = tmp_path / name
        kind = name.removesuffix(".gz").rsplit(".", 1)[1]
        if isinstance(content, list) and kind == "jsonl":
            content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
        elif isinstance(content, list) and kind == "csv":
            buffer = io.StringIO()
            writer = csv.DictWriter(buffer, list(content[0]))
            writer.writeheader()
            writer.writerows(content)
            content = buffer.getvalue()
        elif not isinstance(content, str | bytes):
            content = json.dumps(content, ensure_ascii=False, indent=1)
        raw = content if isinstance(content, bytes) else content.encode("utf-8")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(raw) if name.endswith(".gz") and not isinstance(content, bytes) else raw)
        return path

    return write_file


def only(path: Path, layout: str) -> Question:
    exam = load_exam(path)
    assert (exam.layout, exam.skipped, len(exam.questions)) == (layout, {}, 1)
    return exam.questions[0]


@pytest.mark.parametrize("name", ["own.jsonl", "own.jsonl.gz", "own.json", "own.json.gz"])
def test_our_own_simple_layout(write: Write, name: str) -> None:
    question = only(write(name, [SIMPLE]), "simple")
    assert question == Question(f"{name}:1", SIMPLE["question"], {"A": "27", "B": "37"}, "B", False, "常识")  # type: ignore[arg-type]


def test_cmb_with_several_answers_and_padding(write: Write) -> None:
    question = only(write("CMB-val.json", [CMB]), "cmb")
    assert (question.options, question.answer, question.several) == ({"A": "手心", "B": "手背", "C": "指缝", "D": "鼻尖"}, "ABC", True)
    assert question.subject == "护理"


def test_cmb_question_of_several_answers_with_one_right_answer(write: Write) -> None:
    assert only(write("a.json", [CMB | {"answer": "A"}]), "cmb").several


@pytest.mark.parametrize(
    "options",
    [
        "A 手心\nB 手背\nC 都\\neq",
        "A 手心\\nB 手背\\nC 都\\neq",
        "(A) 手心\n(B) 手背\n(C) 都\\neq",
        "A. 手心\nB. 手背\nC. 都\\neq",
        [{"key": "A", "value": "手心"}, {"key": "B", "value": "手背"}, {"key": "C", "value": "都\\neq"}],
    ],
)
def test_cmexam_options_in_one_text(write: Write, options: Any) -> None:
    question = only(write("a.jsonl", [{"Question": "洗手时应洗哪里？", "Options": options, "Answer": "A"}]), "cmexam")
    assert question.options == {"A": "手心", "B": "手背", "C": "都\\neq"}


def test_cmexam_csv_with_line_breaks_in_a_cell(write: Write) -> None:
    rows = [{"Question": "问", "Options": "A 甲\nB 乙", "Answer": "B", "Explanation": ""}] * 2
    exam = load_exam(write("val.csv", rows))
    assert [(one.name, one.answer) for one in exam.questions] == [("val.csv:2", "B"), ("val.csv:4", "B")]


def test_cmexam_text_that_starts_with_a_letter_is_no_marker(write: Write) -> None:
    row = {"question": "问", "options": "A 甲\nB 乙\nA 型血\nC 丙", "answer": "C"}
    assert only(write("a.jsonl", [row]), "cmexam").options == {"A": "甲", "B": "乙\nA 型血", "C": "丙"}


def test_medqa(write: Write) -> None:
    question = only(write("test.jsonl", [MEDQA]), "medqa")
    assert (question.answer, question.options["B"], question.subject) == ("B", "Apple", "step1")


def test_medmcqa_index_counts_from_one_in_its_own_files(write: Write) -> None:
    exam = load_exam(write("dev.json", "\n".join(json.dumps(row) for row in (MEDMCQA, MEDMCQA | {"cop": 4}))))
    assert [one.answer for one in exam.questions] == ["B", "D"]
    assert exam.questions[0].subject == "Anatomy"


def test_medmcqa_index_counts_from_zero_on_the_hub_and_minus_one_is_none(write: Write) -> None:
    exam = load_exam(write("validation.jsonl", [MEDMCQA, MEDMCQA | {"cop": 0}, MEDMCQA | {"cop": -1}]))
    assert [one.answer for one in exam.questions] == ["C", "A"]
    assert exam.skipped == {"no answer": ["validation.jsonl:3"]}


@pytest.mark.parametrize("indices", [[1, 2, 3], [0, 4]])
def test_medmcqa_index_that_could_be_either_is_refused(write: Write, indices: list[int]) -> None:
    with pytest.raises(DataError, match="from 0 or from 1"):
        load_exam(write("a.jsonl", [MEDMCQA | {"cop": index} for index in indices]))


def test_cmmlu_folder_takes_subjects_from_file_names(write: Write, tmp_path: Path) -> None:
    row = {"": "0", "Question": "人有几只眼睛？", "A": "1", "B": "2", "C": "3", "D": "4", "Answer": "B"}
    write("cmmlu/anatomy.csv", [row])
    write("cmmlu/nutrition.csv", [row, row])
    exam = load_exam(tmp_path / "cmmlu")
    assert exam.layout == "cmmlu"
    assert [(one.name, one.subject, one.answer) for one in exam.questions] == [
        ("anatomy.csv:2", "anatomy", "B"),
        ("nutrition.csv:2", "nutrition", "B"),
        ("nutrition.csv:3", "nutrition", "B"),
    ]


@pytest.mark.parametrize(
    "content",
    [
        [PUBMEDQA],
        {"123": {"QUESTION": "Is water wet?", "CONTEXTS": PUBMEDQA["contexts"], "final_decision": "yes"}},
        [{"question": "Is water wet?", "context": {"contexts": PUBMEDQA["contexts"]}, "final_decision": "yes"}],
        [{"question": "Is water wet?", "contexts": PUBMEDQA["contexts"], "answer": "Yes"}],
    ],
)
def test_pubmedqa(write: Write, content: Any) -> None:
    question = only(write("pqal.json", content), "pubmedqa")
    assert question.text == "We looked at water.\nIt was wet.\nIs water wet?"
    assert (question.options, question.answer) == ({"A": "yes", "B": "no", "C": "maybe"}, "A")


def test_d24_one_character_options_are_kept(write: Write) -> None:
    row = {"question": "几？", "option": {"A": "0", "B": "无", "C": 0, "D": "3", "E": " "}, "answer": "C"}
    assert only(write("a.json", [row]), "cmb").options == {"A": "0", "B": "无", "C": "0", "D": "3"}


@pytest.mark.parametrize("answer", [None, "", "NULL", "null", "NaN"])
def test_d24_a_row_without_an_answer_is_skipped_and_counted(write: Write, answer: str | None) -> None:
    exam = load_exam(write("a.jsonl", [SIMPLE | {"answer": answer}, SIMPLE, SIMPLE | {"answer": "D"}]))
    assert [one.name for one in exam.questions] == ["a.jsonl:2"]
    assert exam.skipped == {"no answer": ["a.jsonl:1"], "the answer is not one of the options": ["a.jsonl:3"]}


def test_a_file_where_every_answer_is_missing_is_refused(write: Write) -> None:
    with pytest.raises(DataError, match="2 rows skipped: no answer") as caught:
        load_exam(write("test.json", [CMB | {"answer": "NULL"}] * 2))
    assert "published test files" in caught.value.fix


@pytest.mark.parametrize(
    ("name", "content", "what", "where"),
    [
        ("a.jsonl", '{"question": "q", "options": {"A": "x", "B": "y"}, "answer": "A"}\n{broken\n', "not JSON", "line 2"),
        ("a.json", '[{"question": "q"},\n', "not JSON", "line 2"),
        ("a.jsonl", "[1, 2]\n", "must be a JSON object", "line 1"),
        ("a.jsonl", "\n\n", "no row", "a.jsonl"),
        ("a.csv", "Question,A,B,Answer\n", "no row", "a.csv"),
        ("a.csv", "Question,A,B,Answer\nq,x,y,A\nq,x,y,A,z\n", "more cells", "line 3"),
        ("a.jsonl", '{"question": "几？"}\n'.encode("gb18030"), "not UTF-8", "line 1"),
        ("a.jsonl", [{"query": "q", "label": 1}], "no exam layout that we know", "line 1"),
        ("a.jsonl", [SIMPLE, {"question": "q", "answer": "A"}], "does not fit the simple layout", "line 2"),
        ("a.jsonl", [SIMPLE, SIMPLE | {"options": ["x", "y"]}], "the options must be", "line 2"),
        ("a.jsonl", [SIMPLE, SIMPLE | {"options": {"1": "x", "2": "y"}}], "a letter of its own", "line 2"),
        ("a.jsonl", [SIMPLE, SIMPLE | {"question": 5}], "the question must be a text", "line 2"),
        ("a.jsonl", [SIMPLE, SIMPLE | {"answer": 1}], "the answer must be letters", "line 2"),
        ("a.jsonl", [PUBMEDQA, PUBMEDQA | {"final_decision": "perhaps"}], "yes, no or maybe", "line 2"),
        ("a.jsonl", [MEDMCQA | {"cop": 4}, MEDMCQA | {"cop": "B"}], "from 1 to 4", "line 2"),
        ("a.jsonl.gz", b"no gzip", "no whole gzip", "a.jsonl.gz"),
        ("a.xlsx", b"PK", "is a .jsonl, .json or .csv", "a.xlsx"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_place(write: Write, name: str, content: Any, what: str, where: str) -> None:
    with pytest.raises(DataError) as caught:
        load_exam(write(name, content))
    assert what in caught.value.what
    assert where in caught.value.where
    assert caught.value.fix


def test_a_missing_path_and_an_empty_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="missing"):
        load_exam(tmp_path / "nothing.jsonl")
    with pytest.raises(DataError, match="no exam file"):
        load_exam(tmp_path)


def test_a_sample_is_seeded_and_keeps_the_order(write: Write) -> None:
    exam = load_exam(write("a.jsonl", [SIMPLE | {"question": f"第{number}题？"} for number in range(20)]))
    chosen = [one.text for one in exam.sample(5, 1).questions]
    assert len(chosen) == 5 and chosen == sorted(chosen, key=[one.text for one in exam.questions].index)
    assert chosen == [one.text for one in exam.sample(5, 1).questions] != [one.text for one in exam.sample(5, 2).questions]
    assert exam.sample(0, 1) == exam
