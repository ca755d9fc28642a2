"""Every usual layout of records becomes a question, an answer and the turns before them."""

from __future__ import annotations

from typing import Any

import pytest

from components.common.dataset import Turn
from components.common.errors import DataError
from components.prepare.layouts import Draft, RejectedRow, detect_layout


def draft(record: Any, **columns: str) -> Draft:
    return detect_layout([record], "rows.jsonl", **columns).draft(record)


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("question", "answer"),
        ("Question", " Answer "),
        ("问题", "回答"),
        ("问题", "答案"),
        ("提问", "回复"),
        ("ask", "answer"),
        ("title", "answer"),
        ("query", "response"),
        ("prompt", "completion"),
    ],
)
def test_usual_column_names_are_known(question: str, answer: str) -> None:
    record = {"department": "内科", question: "q", answer: "a"}
    layout = detect_layout([record], "rows.csv")
    assert layout.name == "question_answer"
    assert layout.draft(record) == Draft("q", "a", [])
    assert str(layout) == f"question_answer (question ← {question}, answer ← {answer})"


def test_the_fuller_question_column_wins() -> None:
    assert draft({"title": "short", "ask": "the whole question", "answer": "a"}).question == "the whole question"


def test_any_two_columns_can_be_named() -> None:
    record = {"question": "no", "answer": "no", "left": "q", "right": "a"}
    assert draft(record, question_column="left", answer_column="right") == Draft("q", "a", [])
    assert draft(record, question_column="left") == Draft("q", "no", [])
    chat = {"messages": [], "left": "q", "right": "a"}
    assert draft(chat, question_column="left", answer_column="right") == Draft("q", "a", [])


def test_a_named_column_that_is_not_there_is_refused() -> None:
    with pytest.raises(DataError, match="no column 'Frage'") as caught:
        draft({"question": "q", "answer": "a"}, question_column="Frage")
    assert caught.value.fix == "set --question_column to one of: question, answer"


def test_unknown_columns_are_listed() -> None:
    with pytest.raises(DataError, match="no column is known as the question; the columns are: links, rechts") as caught:
        draft({"links": "q", "rechts": "a"})
    assert "--question_column" in caught.value.fix
    with pytest.raises(DataError, match="no column is known as the answer"):
        draft({"question": "q"})
    with pytest.raises(DataError, match="the columns are: none"):
        detect_layout(["text", ["list"]], "rows.jsonl")


def test_alpaca() -> None:
    record = {"instruction": "翻译", "input": "flu", "output": "流感", "history": []}
    layout = detect_layout([record], "rows.json")
    assert layout.name == "alpaca"
    assert layout.draft(record) == Draft("翻译\nflu", "流感", [])
    assert layout.draft({"instruction": "q", "input": "", "output": "a"}) == Draft("q", "a", [])
    assert layout.draft({"instruction": "q", "output": "a"}) == Draft("q", "a", [])


def test_sharegpt() -> None:
    turns = [("system", "s"), ("human", "q1"), ("gpt", "a1"), ("human", "q2"), ("gpt", "a2")]
    record = {"id": 1, "conversations": [{"from": speaker, "value": text} for speaker, text in turns]}
    layout = detect_layout([record], "rows.json")
    assert layout.name == "sharegpt"
    assert layout.draft(record) == Draft("q2", "a2", [{"role": "user", "content": "q1"}, {"role": "assistant", "content": "a1"}])


def messages(*turns: tuple[str, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def test_messages() -> None:
    record = messages(("user", "q"), ("assistant", "a"))
    assert detect_layout([record], "x").name == "messages"
    assert draft(record) == Draft("q", "a", [])


def test_a_conversation_is_put_in_turn() -> None:
    """A greeting before the first question, two turns of one speaker, and a last question without an answer."""
    record = messages(
        ("assistant", "您好"), ("user", "q1"), ("user", "more"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2"), ("user", "谢谢")
    )
    assert draft(record) == Draft("q2", "a2", [{"role": "user", "content": "q1\nmore"}, {"role": "assistant", "content": "a1"}])


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (messages(("user", "q")), "missing_answer"),
        (messages(("assistant", "a")), "missing_question"),
        (messages(), "missing_question"),
        (messages(("user", "q"), ("tool", "{}"), ("assistant", "a")), "wrong_turns"),
        (messages(("user", "q"), ("assistant", None)), "wrong_turns"),
        (messages(("user", "q"), ("assistant", ["part"])), "wrong_turns"),
        ({"messages": "user: q"}, "wrong_turns"),
        ({"messages": None}, "wrong_turns"),
        ({"messages": [3]}, "wrong_turns"),
        ({"messages": [{"role": ["user"], "content": "q"}]}, "wrong_turns"),
        (["not", "an", "object"], "wrong_shape"),
        (None, "wrong_shape"),
    ],
)
def test_what_is_no_conversation_is_left_out(record: Any, reason: str) -> None:
    layout = detect_layout([messages(("user", "q"), ("assistant", "a"))], "x")
    with pytest.raises(RejectedRow) as caught:
        layout.draft(record)
    assert caught.value.reason == reason


def test_earlier_turns_beside_the_question_are_kept() -> None:
    first = [Turn(role="user", content="q1"), Turn(role="assistant", content="a1")]
    assert draft({"question": "q2", "answer": "a2", "history": first}) == Draft("q2", "a2", first)
    assert draft({"instruction": "q2", "output": "a2", "history": [["q1", "a1"]]}) == Draft("q2", "a2", first)


def test_a_patients_history_is_no_earlier_turn() -> None:
    assert draft({"question": "q", "answer": "a", "history": "diabetes since 2010"}) == Draft("q", "a", [])


def test_the_layout_comes_from_all_of_the_first_records() -> None:
    layout = detect_layout([["broken"], {"question": "q"}, {"question": "q", "answer": "a"}], "x")
    assert layout.columns == {"question": "question", "answer": "answer"}
