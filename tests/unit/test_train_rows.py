"""Rows → ids and mask → batches: nothing is cut, nothing is lost, the end of a turn is learned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from components.common.chat import ChatFormat
from components.common.errors import DataError
from components.train.rows import Data, Split, encode, encode_splits, read_splits, within


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture(scope="module")
def chat(tokenizer: PreTrainedTokenizerBase) -> ChatFormat:
    return ChatFormat.of_tokenizer(tokenizer)


def as_dataset(rows: list[dict[str, str]]) -> Dataset:
    return Dataset.from_list([{**row, "history": [], "line": line} for line, row in enumerate(rows, 1)])


def used(rows: Dataset, tokenizer: PreTrainedTokenizerBase, chat: ChatFormat, max_length: int) -> Split:
    split = encode(rows, tokenizer, chat, split="train")
    return within(Data(split, split, "digest"), max_length).train


def test_d01_every_row_ends_with_its_end_of_turn_token_which_is_learned_and_never_a_pad(
    tokenizer: PreTrainedTokenizerBase, chat: ChatFormat, tiny_rows: list[dict[str, str]]
) -> None:
    examples = encode(as_dataset(tiny_rows), tokenizer, chat, split="train").examples
    assert chat.pad_id not in chat.stop_ids
    assert tokenizer.eos_token_id in chat.stop_ids
    for example in examples:
        assert int(example.ids[-1]) == chat.end_of_turn_id
        assert bool(example.mask[-1])
        assert chat.pad_id not in example.ids[example.mask].tolist()


def test_d02_a_row_is_used_whole_or_dropped_and_counted_with_its_line(
    tokenizer: PreTrainedTokenizerBase, chat: ChatFormat, tiny_rows: list[dict[str, str]]
) -> None:
    rows = [*tiny_rows[:4], {"question": "长？", "answer": "很长的回答。" * 200}, *tiny_rows[4:8]]
    split = used(as_dataset(rows), tokenizer, chat, 400)
    assert split.dropped_lines == [5]
    kept = [row for line, row in enumerate(rows, 1) if line != 5]
    assert len(split.examples) == len(kept)
    for example, row in zip(split.examples, kept, strict=True):
        answer = tokenizer.decode(example.ids[example.mask][:-1])
        assert answer == row["answer"], "the answer in the ids is not the row's answer, whole"
        whole = tokenizer.decode(example.ids)
        assert row["question"] in whole
        assert "<|im_start|>assistant\n" + row["answer"][:5] in whole, "the header of the answer is missing"


def test_a_row_of_exactly_max_length_is_used(tokenizer: PreTrainedTokenizerBase, chat: ChatFormat, tiny_rows: list[dict[str, str]]) -> None:
    length = len(chat.example(tokenizer, tiny_rows[0]["question"], tiny_rows[0]["answer"])[0])
    assert used(as_dataset(tiny_rows[:1]), tokenizer, chat, length).dropped_lines == []
    with pytest.raises(DataError, match="longer than"):
        used(as_dataset(tiny_rows[:1]), tokenizer, chat, length - 1)


def test_when_every_row_is_too_long_the_error_names_a_max_length_that_works(
    tokenizer: PreTrainedTokenizerBase, chat: ChatFormat, tiny_rows: list[dict[str, str]]
) -> None:
    with pytest.raises(DataError) as error:
        used(as_dataset(tiny_rows), tokenizer, chat, 20)
    needed = int(error.value.fix.split()[3])
    assert len(used(as_dataset(tiny_rows), tokenizer, chat, needed).examples) >= 1


def test_d04_a_row_without_a_trainable_token_is_refused_with_its_line(
    tokenizer: PreTrainedTokenizerBase, chat: ChatFormat, tiny_rows: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    masked = lambda self, tokenizer, question, answer, history=(): ([1, 2, 3], [False] * 3)  # noqa: E731
    monkeypatch.setattr(ChatFormat, "example", masked)
    with pytest.raises(DataError, match="no trainable token") as error:
        encode(as_dataset(tiny_rows[:1]), tokenizer, chat, split="train")
    assert "line 1" in error.value.where


def test_earlier_turns_are_context_and_not_trained_on(tokenizer: PreTrainedTokenizerBase, chat: ChatFormat) -> None:
    history = [{"role": "user", "content": "头痛怎么办？"}, {"role": "assistant", "content": "先休息。"}]
    row = {"question": "还要吃药吗？", "answer": "一般不用。", "history": history, "line": 1}
    example = encode(Dataset.from_list([row]), tokenizer, chat, split="train").examples[0]
    assert "先休息。" in tokenizer.decode(example.ids)
    assert tokenizer.decode(example.ids[example.mask]) == "一般不用。<|im_end|>"


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_plain_file_holds_a_tenth_of_its_questions_out_whatever_their_order(tmp_path: Path) -> None:
    rows = [{"question": f"问题{number}？", "answer": "回答。"} for number in range(400)]
    forward = read_splits(write_rows(tmp_path / "a.jsonl", rows))
    backward = read_splits(write_rows(tmp_path / "b.jsonl", rows[::-1]))
    held_out = set(forward.validation["question"])
    assert held_out == set(backward.validation["question"])
    assert 25 <= len(held_out) <= 55
    assert held_out.isdisjoint(forward.train["question"])
    assert len(forward.train) + len(forward.validation) == 400
    assert forward.digest != backward.digest


def test_the_same_question_is_never_on_both_sides(tmp_path: Path) -> None:
    rows = [{"question": f" 问题{number % 20}？ ", "answer": f"回答{number}。"} for number in range(100)]
    splits = read_splits(write_rows(tmp_path / "rows.jsonl", rows))
    assert set(splits.train["question"]).isdisjoint(splits.validation["question"])


def test_two_questions_are_enough_and_one_is_not(tmp_path: Path) -> None:
    splits = read_splits(write_rows(tmp_path / "two.jsonl", [{"question": "甲？", "answer": "一"}, {"question": "乙？", "answer": "二"}]))
    assert (len(splits.train), len(splits.validation)) == (1, 1)
    with pytest.raises(DataError, match="too few"):
        read_splits(write_rows(tmp_path / "one.jsonl", [{"question": "甲？", "answer": "一"}] * 3))


def test_the_user_is_told_how_many_rows_are_used_and_which_are_not(
    tmp_path: Path,
    tokenizer: PreTrainedTokenizerBase,
    chat: ChatFormat,
    tiny_rows: list[dict[str, str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    long = {"question": "长？", "answer": "长" * 2000}
    splits = read_splits(write_rows(tmp_path / "rows.jsonl", [*tiny_rows, long]))
    data = within(encode_splits(splits, tokenizer, chat), 512)
    dropped = data.train.dropped_lines + data.validation.dropped_lines
    said = capsys.readouterr().out
    assert dropped == [31]
    assert "1 rows dropped" in said
    assert "source lines 31" in said
