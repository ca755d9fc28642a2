"""The viewer of a training row and its loss mask."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from components.common.chat import ChatFormat
from components.common.errors import DataError
from components.common.loading import load_tokenizer
from components.train.config import TrainSettings
from components.train.rows import read_splits
from components.train.show_row import find_row, pieces, show, show_row, verdict, visible

QUESTION, ANSWER = "发烧怎么办？", "多喝水 😀，39 ℃ 以上请就医。\n\tSee a doctor."


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Any:
    return load_tokenizer(tiny_model)


@pytest.fixture(scope="module")
def chat(tokenizer: Any) -> ChatFormat:
    return ChatFormat.of_tokenizer(tokenizer, "你是医生。")


@pytest.fixture
def rows_file(tiny_rows: list[dict[str, str]], tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in tiny_rows), encoding="utf-8")
    return path


def shown(tokenizer: Any, chat: ChatFormat, *, colours: bool) -> str:
    ids, mask = chat.example(tokenizer, QUESTION, ANSWER)
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system="truecolor", width=10_000) if colours else Console(file=out, width=10_000)
    show_row(console, tokenizer, ids, mask, chat.end_of_turn_id)
    return out.getvalue()


def test_without_colours_brackets_hold_exactly_what_is_learned(tokenizer: Any, chat: ChatFormat) -> None:
    text = shown(tokenizer, chat, colours=False)
    assert text.count("⟦") == text.count("⟧") == 2, "once around the answer, once in the legend"
    assert text.partition("⟦")[2].partition("⟧")[0].replace("\\n\n", "\\n") == "多喝水 😀，39 ℃ 以上请就医。\\n\\tSee a doctor.<|im_end|>"
    assert text.startswith(
        "<|im_start|>system\\n\n你是医生。<|im_end|>\\n\n<|im_start|>user\\n\n发烧怎么办？<|im_end|>\\n\n<|im_start|>assistant\\n\n⟦"
    )
    ids, mask = chat.example(tokenizer, QUESTION, ANSWER)
    assert f"{len(ids)} tokens, {sum(mask)} of them learned" in text
    assert "its end-of-turn token is learned" in text


def test_colours_tell_what_is_learned_and_mark_the_end_of_turn(tokenizer: Any, chat: ChatFormat) -> None:
    text = shown(tokenizer, chat, colours=True)
    at = text.index("多喝水") - len("\x1b[32m")
    question, answer = text[:at], text[at:]
    green, bright_green, end = "\x1b[32m", "\x1b[92m", "\x1b[1;30;42m"
    assert green not in question
    assert green in answer
    assert bright_green in answer, "two shades in turn: one sees the tokens"
    assert f"{end}<|im_end|>" in answer
    assert f"{end}<|im_end|>" not in question, "the end of the question's turn is not learned"


def test_a_row_whose_end_is_not_learned_is_called_out(tokenizer: Any, chat: ChatFormat) -> None:
    ids, mask = chat.example(tokenizer, QUESTION, ANSWER)
    out = io.StringIO()
    show_row(Console(file=out, width=200), tokenizer, ids, [*mask[:-1], False], chat.end_of_turn_id)
    assert "WARNING: its end-of-turn token is not learned" in out.getvalue()
    assert "⟧<|im_end|>" in out.getvalue()


def test_pieces_are_whole_characters_and_lose_no_token(tokenizer: Any, chat: ChatFormat) -> None:
    ids, mask = chat.example(tokenizer, QUESTION, ANSWER)
    parts = list(pieces(tokenizer, ids, mask))
    assert [token for part in parts for token in part.ids] == ids
    assert [part.trained for part in parts for _ in part.ids] == mask
    assert any(len(part.ids) > 1 for part in parts), "the emoji takes several tokens"
    assert "\ufffd" not in "".join(part.text for part in parts)
    assert "".join(part.text for part in parts) == tokenizer.decode(ids)


def test_control_characters_can_be_seen() -> None:
    assert visible("a\tb\r\n\x1b[31m\u200b中文") == "a\\tb\\r\\n\\x1b[31m\\u200b中文"


def test_the_verdict_on_the_length() -> None:
    assert verdict(100, 100).startswith("used whole")
    assert verdict(101, 100).startswith("DROPPED")
    assert "--max_length 101" in verdict(101, 100)
    assert "decided" in verdict(101, "auto")


def test_every_line_of_the_file_is_found_in_its_split(rows_file: Path, tiny_rows: list[dict[str, str]]) -> None:
    rows = read_splits(rows_file)
    found = [find_row(rows, line, "") for line in range(1, len(tiny_rows) + 1)]
    assert [row["question"] for _, row in found] == [row["question"] for row in tiny_rows]
    assert {split for split, _ in found} == {"training", "validation"}


@pytest.mark.parametrize("line", [31, 10_000])
def test_an_unknown_line_is_refused_with_the_lines_that_exist(rows_file: Path, line: int) -> None:
    with pytest.raises(DataError) as refused:
        find_row(read_splits(rows_file), line, str(rows_file))
    assert str(line) in refused.value.what
    assert refused.value.where == str(rows_file)
    assert "training: " in refused.value.fix
    assert "validation: " in refused.value.fix
    assert "30" in refused.value.fix


def test_show_prints_the_row_of_the_settings(rows_file: Path, tiny_model: Path, tiny_rows: list[dict[str, str]], capsys: Any) -> None:
    settings, _ = TrainSettings.parse("train", ["--show_row", "3", "--max_length", "16", "--dataset", str(rows_file)])
    show(settings, tiny_model)
    text = capsys.readouterr().out
    assert f"⟦{tiny_rows[2]['answer']}<|im_end|>⟧" in text
    assert text.startswith("line 3, ")
    assert "DROPPED" in text
