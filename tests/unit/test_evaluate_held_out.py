"""Which rows are evaluated, and whether they were trained on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from components.common.chat import ChatFormat, Message
from components.common.dataset import load_split
from components.common.errors import DataError
from components.evaluate.held_out import HeldOut, load_held_out
from components.evaluate.leakage import question_digest
from components.evaluate.sample import sample_indices, strata_of, stratified_indices


def row(line: int, question: str, answer: str = "多喝水。", first: str = "") -> dict[str, Any]:
    history = [{"role": "user", "content": first}, {"role": "assistant", "content": "好的。"}] if first else []
    return {"question": question, "answer": answer, "history": history, "line": line}


def write_dataset(folder: Path, **splits: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    for name, rows in splits.items():
        Dataset.from_list(rows).to_parquet(str(folder / f"{name}.parquet"))
    (folder / "dataset.json").write_text(json.dumps({"digest": "d" * 64, "rows": {}, "source": {}}))
    return folder


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model)


def load(dataset: Path, tokenizer: Any, **changes: int) -> HeldOut:
    chat = ChatFormat.of_tokenizer(tokenizer)
    settings = {"sample_size": 0, "seed": 42, "context_tokens": 1024, "max_new_tokens": 64} | changes
    return load_held_out(dataset, load_split(dataset, "test"), tokenizer=tokenizer, chat=chat, **settings)


def test_a_sample_is_seeded_and_keeps_the_order() -> None:
    assert sample_indices(100, 10, 1) == sample_indices(100, 10, 1) == sorted(set(sample_indices(100, 10, 1)))
    assert len(sample_indices(100, 10, 1)) == 10
    assert sample_indices(100, 10, 1) != sample_indices(100, 10, 2)
    assert sample_indices(5, 0, 1) == sample_indices(5, 5, 1) == sample_indices(5, 99, 1) == [0, 1, 2, 3, 4]


def test_every_stratum_has_its_share_of_a_sample() -> None:
    strata = ["heart"] * 60 + ["skin"] * 30 + ["eye"] * 10
    chosen = stratified_indices(strata, 20, 1)
    assert [[strata[row] for row in chosen].count(name) for name in ("heart", "skin", "eye")] == [12, 6, 2]
    assert chosen == stratified_indices(strata, 20, 1) == sorted(set(chosen)) != stratified_indices(strata, 20, 2)
    # 7 of 100: 4.2, 2.1 and 0.7 rows; the one that is left goes to the largest remainder.
    chosen = stratified_indices(strata, 7, 1)
    assert [[strata[row] for row in chosen].count(name) for name in ("heart", "skin", "eye")] == [4, 2, 1]
    assert all(len(stratified_indices(strata, size, 3)) == size for size in range(1, 101))


def test_without_topics_the_strata_are_language_and_length() -> None:
    rows = [row(at, "q", "多" * at) for at in range(1, 7)] + [row(9, "q", "drink water")]
    by, strata = strata_of(Dataset.from_list(rows))
    assert by == "language and length"
    assert strata == ["chinese, short"] * 2 + ["chinese, medium"] * 2 + ["chinese, long"] * 2 + ["english, short"]
    topics = [one | {"topic": topic} for one, topic in zip(rows, ["心", "心", "皮", None, "皮", "心", "皮"], strict=True)]
    assert strata_of(Dataset.from_list(topics)) == ("topic", ["心", "心", "皮", "–", "皮", "心", "皮"])


def test_a_sample_by_topic_reaches_the_rows(tmp_path: Path, tokenizer: Any) -> None:
    test = [row(line, f"问题{line}") | {"topic": "心" if line < 20 else "皮"} for line in range(10, 30)]
    held_out = load(write_dataset(tmp_path / "data", test=test), tokenizer, sample_size=4)
    assert held_out.stratified_by == "topic"
    assert [one.stratum for one in held_out.rows] == ["心", "心", "皮", "皮"]
    assert [one.line < 20 for one in held_out.rows] == [True, True, False, False]


def test_d21_a_leaked_question_is_found_whatever_its_spelling(tmp_path: Path, tokenizer: Any) -> None:
    train = [row(1, "什么是高血压？"), row(2, "What is ASTHMA?"), row(3, "还有吗？", first="头痛怎么办？")]
    test = [
        row(10, " 什么是 高血压?"),
        row(11, "what is asthma"),
        row(12, "什么是糖尿病？"),
        row(13, "头痛怎么办"),
        row(14, "还有吗？", first="牙痛怎么办？"),
    ]
    assert load(write_dataset(tmp_path / "leaky", train=train, test=test), tokenizer).leaked == [10, 11, 13]
    assert load(write_dataset(tmp_path / "clean", train=train, test=[test[2], test[4]]), tokenizer).leaked == []


def test_d21_the_whole_test_split_is_checked_not_only_the_sample(tmp_path: Path, tokenizer: Any) -> None:
    test = [row(line, f"第{line}个问题") for line in range(10, 30)]
    dataset = write_dataset(tmp_path / "data", train=[row(1, "第29个问题")], test=test)
    held_out = load(dataset, tokenizer, sample_size=1)
    assert (len(held_out.rows), held_out.available, held_out.leaked) == (1, 20, [29])


def test_d21_without_a_training_split_nothing_is_claimed(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "头痛", "answer": "休息"}) + "\n", encoding="utf-8")
    assert load(path, tokenizer).leaked is None
    assert load(write_dataset(tmp_path / "only-test", test=[row(1, "头痛")]), tokenizer).leaked is None


def test_punctuation_alone_is_not_one_question() -> None:
    assert question_digest(row(1, "？"))  # type: ignore[arg-type]
    assert question_digest(row(1, "？？")) != question_digest(row(1, "!"))  # type: ignore[arg-type]


def test_a_row_is_the_prompt_and_the_answer_as_the_chat_format_makes_them(tmp_path: Path, tokenizer: Any) -> None:
    chat = ChatFormat.of_tokenizer(tokenizer)
    (held_out,) = load(write_dataset(tmp_path / "data", test=[row(7, "还有吗？", "没有。", first="头痛怎么办？")]), tokenizer).rows
    history = (Message("user", "头痛怎么办？"), Message("assistant", "好的。"))
    assert held_out.line == 7
    assert held_out.prompt_ids == chat.prompt_ids(tokenizer, "还有吗？", history)
    assert tokenizer.decode(held_out.ids[len(held_out.prompt_ids) :]) == "没有。<|im_end|>"


def test_rows_beyond_the_models_context_are_left_out_and_named(tmp_path: Path, tokenizer: Any) -> None:
    rows = [row(1, "头痛"), row(2, "头痛" * 400), row(3, "牙痛", "多喝水。" * 300)]
    dataset = write_dataset(tmp_path / "data", test=rows)
    held_out = load(dataset, tokenizer, context_tokens=400)
    assert ([one.line for one in held_out.rows], held_out.too_long) == ([1], [2, 3])
    with pytest.raises(DataError, match="no row fits"):
        load(dataset, tokenizer, max_new_tokens=1024)
