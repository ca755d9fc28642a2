"""Multiple-choice exams in the layouts in which they are published → questions of one kind.

The layout is found by the keys of a file's first row (their case does not matter):

    simple     question, options {letter: text}, answer "B" or "ABD", subject optional
    cmb        question, option {letter: text}, answer, question_type, exam_subject
    cmexam     Question, Options ("A text\\nB text" or [{key, value}]), Answer
    medqa      question, options {letter: text}, answer_idx; Chinese and English
    medmcqa    question, opa … opd, cop (index of the answer from 0 or from 1: the whole file tells which), subject_name
    cmmlu      Question, A … D, Answer; a file for each subject
    pubmedqa   question, contexts, final_decision or answer: yes, no or maybe

A one-character option is an option. A row without an answer ("NULL" in the published test files) cannot be scored: it is skipped and counted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from components.common.errors import DataError
from components.evaluate.exam_files import ExamRow, exam_files, read_exam_rows
from components.evaluate.sample import sample_indices

MAX_OPTIONS = 10
_NO_ANSWER = frozenset({"", "null", "none", "nan", "na", "n/a"})
_SUBJECT_KEYS = ("subject", "exam_subject", "subject_name", "meta_info")
_MARKER = re.compile(r"(?:^|\n|\\n)\s*[(（]?([A-J])(?:[)）.、:：．]|\s)")
_YES_NO_MAYBE = {"A": "yes", "B": "no", "C": "maybe"}


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        name: file name and line (or position), the question's identity.
        text: the stem, with the abstract before it where the layout has one.
        options: text by letter, in the written order.
        answer: the right letters, sorted: "B", or "ABD" where several are right.
        several: whether the exam says that more than one option may be right.
        subject: empty where the layout has none.
    """

    name: str
    text: str
    options: dict[str, str]
    answer: str
    several: bool = False
    subject: str = ""


@dataclass(frozen=True)
class Exam:
    """Questions that can be scored.

    Attributes:
        skipped: the names of rows that can't be scored, by reason.
        layout: names of the layouts found, such as "cmb" or "cmmlu, simple".
    """

    questions: list[Question]
    skipped: dict[str, list[str]]
    layout: str

    def sample(self, size: int, seed: int) -> Exam:
        """A seeded sample of the questions, in their order; all of them for size 0."""
        chosen = sample_indices(len(self.questions), size, seed)
        return replace(self, questions=[self.questions[index] for index in chosen])


class _UnanswerableError(Exception):
    """A row of the right layout that can't be scored."""


class _WrongLayoutError(Exception):
    """A row that lacks what its layout needs; the message says what was expected."""


def load_exam(path: Path) -> Exam:
    """All questions of a file, or of every exam file directly in a folder.

    Args:
        path: .jsonl, .json or .csv, each also with .gz; or a folder of them.

    Raises:
        DataError: missing, not UTF-8, broken, of an unknown layout, or without one question that has an answer.
    """
    questions: list[Question] = []
    skipped: dict[str, list[str]] = {}
    layouts: dict[str, None] = {}
    files = exam_files(path)
    for file in files:
        rows = read_exam_rows(file)
        layout = _detect(rows[0], file)
        parse = _medmcqa_parser(rows, file) if layout == "medmcqa" else _PARSERS[layout]
        layouts[layout] = None
        stem = file.name.split(".")[0] if len(files) > 1 else ""
        for row in rows:
            try:
                questions.append(_question(parse, row, f"{file.name}:{row.line}", stem))
            except _UnanswerableError as reason:
                skipped.setdefault(str(reason), []).append(f"{file.name}:{row.line}")
            except _WrongLayoutError as expected:
                raise DataError(
                    f"a row does not fit the {layout} layout of the first row: {expected}",
                    where=f"{file}, line {row.line}",
                    fix="mend or delete the row",
                ) from None
    if not questions:
        reasons = "; ".join(f"{len(names)} rows skipped: {reason}" for reason, names in skipped.items())
        raise DataError(
            f"no question can be scored: {reasons}", where=str(path), fix="use a split with answers: published test files often have none"
        )
    return Exam(questions, skipped, ", ".join(layouts))


_Parsed = tuple[Any, Any, Any]  # text, options by letter, answer as written
_Parser = Callable[[dict[str, Any]], _Parsed]


def _question(parse: _Parser, row: ExamRow, name: str, stem: str) -> Question:
    text, written_options, written_answer = parse(row.values)
    if not isinstance(text, str) or not text.strip():
        raise _WrongLayoutError("the question must be a text")
    options = _options(written_options)
    answer = _letters(written_answer, options)
    if len(options) < 2:
        raise _UnanswerableError("fewer than two options")
    kind = str(row.values.get("question_type") or "")
    several = len(answer) > 1 or "多" in kind
    subject = next((str(row.values[key]).strip() for key in _SUBJECT_KEYS if row.values.get(key)), stem)
    return Question(name, text.strip(), options, answer, several, subject)


def _options(written: Any) -> dict[str, str]:
    """Text by letter; empty texts are padding and go, one-character texts stay."""
    if isinstance(written, str):
        written = _split_options(written)
    elif isinstance(written, list) and all(isinstance(one, dict) and {"key", "value"} <= set(one) for one in written):
        written = {one["key"]: one["value"] for one in written}
    if not isinstance(written, Mapping):
        raise _WrongLayoutError('the options must be {"A": "…", "B": "…"}')
    options = {str(letter).strip().upper(): "" if text is None else str(text).strip() for letter, text in written.items()}
    wrong = [letter for letter in options if not re.fullmatch("[A-Z]", letter)]
    if wrong or len(options) != len(written):
        raise _WrongLayoutError(f"every option needs a letter of its own, not {', '.join(map(repr, wrong or written))}")
    options = {letter: text for letter, text in options.items() if text}
    if len(options) > MAX_OPTIONS:
        raise _WrongLayoutError(f"at most {MAX_OPTIONS} options")
    return options


def _split_options(text: str) -> dict[str, str]:
    """Options written in one text, each behind its letter; a letter that does not come after the last one is text, not a marker."""
    marks: list[re.Match[str]] = []
    for mark in _MARKER.finditer(text):
        if not marks or mark[1] > marks[-1][1]:
            marks.append(mark)
    if not marks:
        raise _WrongLayoutError('the options must be written as "A text", a line each')
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    return {mark[1]: text[mark.end() : end] for mark, end in zip(marks, ends, strict=True)}


def _letters(written: Any, options: Mapping[str, str]) -> str:
    if written is None or str(written).strip().casefold() in _NO_ANSWER:
        raise _UnanswerableError("no answer")
    if not isinstance(written, str):
        raise _WrongLayoutError(f"the answer must be letters, not {written!r}")
    letters = sorted(set(re.sub(r"[\s,，、;；()（）.]", "", written.upper())))
    if not letters or any(letter not in options for letter in letters):
        raise _UnanswerableError("the answer is not one of the options")
    return "".join(letters)


def _detect(row: ExamRow, file: Path) -> str:
    keys = set(row.values)
    yes_no = str(row.values.get("answer")).strip().casefold() in _YES_NO_MAYBE.values()
    if {"question", "opa", "opb", "cop"} <= keys:
        return "medmcqa"
    if {"question", "option"} <= keys:
        return "cmb"
    if {"question", "options", "answer_idx"} <= keys:
        return "medqa"
    if {"question", "final_decision"} <= keys or ({"question"} <= keys and yes_no and "options" not in keys):
        return "pubmedqa"
    if {"question", "a", "b", "answer"} <= keys:
        return "cmmlu"
    if {"question", "options", "answer"} <= keys:
        return "simple" if isinstance(row.values["options"], Mapping) else "cmexam"
    raise DataError(
        f"this is no exam layout that we know: the first row has {', '.join(sorted(keys)) or 'no keys'}",
        where=f"{file}, line {row.line}",
        fix='write each question as {"question": "…", "options": {"A": "…", "B": "…"}, "answer": "B"}, one a line in a .jsonl file; '
        "also known: CMB, CMExam, MedQA, MedMCQA, CMMLU, PubMedQA",
    )


def _plain(options: str, answer: str) -> _Parser:
    def parse(row: dict[str, Any]) -> _Parsed:
        if options not in row:
            raise _WrongLayoutError(f"no {options}")
        return row.get("question"), row[options], row.get(answer)

    return parse


def _cmmlu(row: dict[str, Any]) -> _Parsed:
    options = {letter: row[letter] for letter in "abcdefghij" if row.get(letter) is not None}
    return row.get("question"), options, row.get("answer")


def _pubmedqa(row: dict[str, Any]) -> _Parsed:
    contexts = row.get("contexts") or row.get("context") or []
    if isinstance(contexts, Mapping):
        contexts = contexts.get("contexts") or []
    paragraphs = [contexts] if isinstance(contexts, str) else [str(one) for one in contexts]
    question = row.get("question")
    if not isinstance(question, str):
        raise _WrongLayoutError("the question must be a text")
    decision = row.get("final_decision", row.get("answer"))
    if decision is None or str(decision).strip().casefold() in _NO_ANSWER:
        return question, _YES_NO_MAYBE, None
    letter = next((letter for letter, word in _YES_NO_MAYBE.items() if word == str(decision).strip().casefold()), None)
    if letter is None:
        raise _WrongLayoutError(f"the answer must be yes, no or maybe, not {decision!r}")
    return "\n".join([*paragraphs, question]), _YES_NO_MAYBE, letter


def _medmcqa_parser(rows: Iterable[ExamRow], file: Path) -> _Parser:
    """MedMCQA counts its answers from 1 in its own files and from 0, with −1 for none, on the hub: a 0 or a 4 anywhere in the file tells."""
    indices = {_index(row.values.get("cop")) for row in rows}
    if bool(indices & {0, -1}) == (4 in indices):
        raise DataError(
            "it is not clear whether `cop` counts from 0 or from 1: "
            + ("both are in the file" if 4 in indices else "neither 0 nor 4 occurs"),
            where=str(file),
            fix="give the whole file, or write the answers as letters in our simple layout",
        )
    letters = dict(enumerate("ABCD", 1 if 4 in indices else 0))

    def parse(row: dict[str, Any]) -> _Parsed:
        index = _index(row.get("cop"))
        if index not in letters and index not in (None, -1):
            raise _WrongLayoutError(f"`cop` must be a number from {min(letters)} to {max(letters)}, not {row.get('cop')!r}")
        answer = letters.get(index) if isinstance(index, int) else None
        return row.get("question"), {letter: row.get(f"op{letter.lower()}") for letter in "ABCD"}, answer

    return parse


def _index(written: Any) -> int | str | None:
    """An index as a number; None for none; anything else as it is written, so that it can be shown."""
    text = "" if written is None else str(written).strip().removesuffix(".0")
    if text.casefold() in _NO_ANSWER:
        return None
    return int(text) if re.fullmatch(r"-?\d+", text) else text


_PARSERS: dict[str, _Parser] = {
    "simple": _plain("options", "answer"),
    "cmb": _plain("option", "answer"),
    "cmexam": _plain("options", "answer"),
    "medqa": _plain("options", "answer_idx"),
    "cmmlu": _cmmlu,
    "pubmedqa": _pubmedqa,
}
