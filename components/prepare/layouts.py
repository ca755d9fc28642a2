"""Which columns hold what: a record of any usual layout → a question, its answer and the turns before them.

Known are question/answer columns under their usual names, alpaca (instruction, input, output), and conversations as sharegpt
(`from`, `value`) or messages (`role`, `content`). System turns are left out: the model's own system prompt takes their place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from components.common.dataset import Turn
from components.common.errors import DataError

QUESTION_COLUMNS = ("question", "问题", "提问", "ask", "query", "prompt", "title")
ANSWER_COLUMNS = ("answer", "回答", "答案", "回复", "response", "completion")
TURNS_COLUMNS = ("messages", "conversations", "conversation")
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}


class RejectedRow(Exception):  # noqa: N818 - a row that is left out, not a failure
    """This row can't be used; `reason` is a key of `clean.REASONS`."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Draft(NamedTuple):
    """A row before it is checked; its texts may be anything that the file held."""

    question: Any
    answer: Any
    history: list[Turn]


@dataclass(frozen=True)
class Layout:
    """How records are read.

    Attributes:
        name: question_answer, alpaca, sharegpt or messages.
        columns: part of the row (question, input, answer, history, turns) → column of the file.
    """

    name: str
    columns: dict[str, str]

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(f'{part} ← {column}' for part, column in self.columns.items())})"

    def draft(self, record: Any) -> Draft:
        """The parts of one record.

        Raises:
            RejectedRow: not a record, or its turns can't be read.
        """
        if not isinstance(record, dict):
            raise RejectedRow("wrong_shape")
        parts = {part: record.get(column) for part, column in self.columns.items()}
        if "turns" in parts:
            return last_exchange(_turns(parts["turns"]))
        question, extra = parts["question"], parts.get("input")
        if isinstance(question, str) and isinstance(extra, str) and extra.strip():
            question = f"{question}\n{extra}"
        history = _turns(parts.get("history") or [])
        if not history or not isinstance(question, str) or not isinstance(parts["answer"], str):
            return Draft(question, parts["answer"], [])
        return last_exchange([*history, Turn(role="user", content=question), Turn(role="assistant", content=parts["answer"])])


def detect_layout(records: Sequence[Any], where: str, *, question_column: str = "", answer_column: str = "") -> Layout:
    """The layout of a file, from its first records; a column that is named by the user wins.

    Raises:
        DataError: a named column is not there, or no known layout fits; names the columns that are.
    """
    objects = [record for record in records if isinstance(record, dict)]
    columns = list(dict.fromkeys(column for record in objects for column in record))
    found = ", ".join(map(str, columns[:20])) or "none"
    for flag, column in (("question_column", question_column), ("answer_column", answer_column)):
        if column and column not in columns:
            raise DataError(f"the data has no column {column!r}", where=where, fix=f"set --{flag} to one of: {found}")
    known = {str(column).strip().lower(): column for column in reversed(columns)}
    named = bool(question_column or answer_column)
    turns = next((known[name] for name in TURNS_COLUMNS if name in known), None)
    if turns and not named:
        style = next((turn for record in objects for turn in _list(record.get(turns)) if isinstance(turn, dict)), {})
        return Layout("sharegpt" if "from" in style else "messages", {"turns": turns})
    # A column of that name with text in it is a patient's history, not earlier turns.
    has_turns = any(_list(record.get(known.get("history"))) for record in objects)
    history = {"history": known["history"]} if has_turns else {}
    if {"instruction", "output"} <= known.keys() and not named:
        extra = {"input": known["input"]} if "input" in known else {}
        return Layout("alpaca", {"question": known["instruction"], **extra, "answer": known["output"], **history})
    question = question_column or next((known[name] for name in QUESTION_COLUMNS if name in known), "")
    answer = answer_column or next((known[name] for name in ANSWER_COLUMNS if name in known), "")
    if not question or not answer:
        raise DataError(
            f"no column is known as the {'answer' if question else 'question'}; the columns are: {found}",
            where=where,
            fix="name them with --question_column and --answer_column",
        )
    return Layout("question_answer", {"question": question, "answer": answer, **history})


def last_exchange(turns: Sequence[Turn]) -> Draft:
    """The last answer of a conversation, the question before it, and as history all the turns before that.

    Turns of the same speaker in a row become one, and a greeting before the first question is left out: chat templates
    want user and assistant in turn.

    Raises:
        RejectedRow: nobody asks, or nobody answers.
    """
    merged: list[Turn] = []
    for turn in turns:
        if merged and merged[-1]["role"] == turn["role"]:
            merged[-1] = Turn(role=turn["role"], content=f"{merged[-1]['content']}\n{turn['content']}")
        elif merged or turn["role"] == "user":
            merged.append(turn)
    if merged and merged[-1]["role"] == "user":
        merged.pop()
    if not merged:
        raise RejectedRow("missing_answer" if any(turn["role"] == "user" for turn in turns) else "missing_question")
    *history, question, answer = merged
    return Draft(question["content"], answer["content"], history)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _turns(value: Any) -> list[Turn]:
    """The turns with text of a conversation, system turns left out; pairs (question, answer) are two turns each."""
    if not isinstance(value, list):
        raise RejectedRow("wrong_turns")
    turns: list[Turn] = []
    for item in value:
        if isinstance(item, list) and len(item) == 2:
            spoken: list[tuple[Any, Any]] = list(zip(("user", "assistant"), item, strict=True))
        elif isinstance(item, dict):
            spoken = [(item.get("role", item.get("from")), item.get("content", item.get("value")))]
        else:
            raise RejectedRow("wrong_turns")
        for speaker, content in spoken:
            role = ROLES.get(speaker) if isinstance(speaker, str) else None
            if role is None or not isinstance(content, str):
                raise RejectedRow("wrong_turns")
            if role != "system" and content.strip():
                turns.append(Turn(role=role, content=content))
    return turns
