"""The split: by question, the same in every run, and stable while data grows."""

from __future__ import annotations

import random

import pytest

from components.common.dataset import SPLITS, Row
from components.common.errors import DataError
from components.prepare.config import PrepareSettings
from components.prepare.split import Split, group_of, position, split_rows

SALT = PrepareSettings.default("split_salt")


def rows(questions: list[str]) -> list[Row]:
    return [Row(question=question, answer=f"answer {line}", history=[], line=line) for line, question in enumerate(questions, 1)]


def split(data: list[Row], *, validation: float = 0.1, test: float = 0.2, salt: str = SALT) -> Split:
    return split_rows(data, validation_fraction=validation, test_fraction=test, salt=salt, where="rows")


def sides(result: Split) -> dict[int, str]:
    return {row["line"]: name for name, members in result.rows.items() for row in members}


def test_d21_a_question_is_never_on_two_sides() -> None:
    """However it is written, and also when conversations share only their opening."""
    spellings = ["什么是COPD {}？", "什么是copd{}", " 什么是 ＣＯＰＤ {}?", "什么是COPD{}！"]
    data = rows([random.Random(i).choice(spellings).format(i % 200) for i in range(2000)])
    for number in range(200):
        opening = {"role": "user", "content": f"什么是copd{number}"}
        turns = [opening, {"role": "assistant", "content": "慢阻肺。"}]
        data.append(Row(question="谢谢", answer="不客气", history=turns, line=3000 + number))  # type: ignore[typeddict-item]
    result = split(data)
    groups = {name: {group_of(row) for row in members} for name, members in result.rows.items()}
    assert sum(map(len, groups.values())) == len(set().union(*groups.values())) == 200
    assert sum(map(len, result.rows.values())) == len(data)
    assert result.groups == {name: len(members) for name, members in groups.items()}


def test_a_row_keeps_its_side_when_data_grows() -> None:
    data = rows([f"问题 {i}" for i in range(3000)])
    before = sides(split(data[:300]))
    after = sides(split(random.Random(0).sample(data, len(data))))
    assert all(after[line] == side for line, side in before.items())


def test_a_larger_test_share_takes_nothing_out_of_it() -> None:
    data = rows([f"问题 {i}" for i in range(1000)])
    small, large = sides(split(data, test=0.1)), sides(split(data, test=0.3))
    assert all(large[line] == "test" for line, side in small.items() if side == "test")


def test_the_shares_are_those_asked_for() -> None:
    result = split(rows([f"问题 {i}" for i in range(10_000)]), validation=0.05, test=0.3)
    shares = {name: len(members) / 10_000 for name, members in result.rows.items()}
    assert shares == pytest.approx({"train": 0.65, "validation": 0.05, "test": 0.3}, abs=0.02)


def test_the_salt_decides_the_split() -> None:
    data = rows([f"问题 {i}" for i in range(200)])
    assert sides(split(data)) == sides(split(data))
    assert sides(split(data)) != sides(split(data, salt="another"))


def test_the_position_is_known() -> None:
    """sha256("salt\\ngroup") begins with 8846c6f79ca5541b: another hash would move every row of every user."""
    assert position("group", "salt") == pytest.approx(0x8846C6F79CA5541B / 2**64, abs=1e-15)


@pytest.mark.parametrize("count", [3, 4, 5, 8])
def test_no_split_is_empty(count: int) -> None:
    for attempt in range(100):
        result = split(rows([f"问题 {attempt} {i}" for i in range(count)]))
        assert all(result.rows[name] for name in SPLITS)
        assert sum(map(len, result.rows.values())) == count


def test_the_nearest_question_fills_an_empty_split() -> None:
    data = rows([f"问题 {i}" for i in range(400)])
    in_train = sides(split(data))
    training = [row for row in data if in_train[row["line"]] == "train"][:10]
    result = split(training)
    ordered = sorted(training, key=lambda row: position(group_of(row), SALT))
    assert result.moved == [(ordered[0]["question"], "train", "test"), (ordered[1]["question"], "train", "validation")]
    assert [row["line"] for row in result.rows["test"]] == [ordered[0]["line"]]


def test_rows_keep_the_order_of_the_file() -> None:
    result = split(rows([f"问题 {i % 50}" for i in range(500)]))
    for members in result.rows.values():
        assert [row["line"] for row in members] == sorted(row["line"] for row in members)


@pytest.mark.parametrize("questions", [["a"], ["a", "b", "A?"]])
def test_too_few_questions_are_refused(questions: list[str]) -> None:
    with pytest.raises(DataError, match="different question"):
        split(rows(questions))


def test_the_shipped_rows_have_a_sensible_split(tiny_rows: list[dict[str, str]]) -> None:
    """30 rows, five a topic: every topic is trained on, and every topic is held out somewhere."""
    result = split(rows([row["question"] for row in tiny_rows]))
    assert {name: len(members) for name, members in result.rows.items()} == {"train": 21, "validation": 3, "test": 6}
    topics = {name: {(row["line"] - 1) // 5 for row in members} for name, members in result.rows.items()}
    assert topics["train"] == topics["test"] | topics["validation"] == set(range(6))
