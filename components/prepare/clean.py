"""Records → clean rows: text is normalised, every row is checked, and each row that is left out is listed with its line."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from components.common.dataset import Row, Turn
from components.prepare.layouts import Draft, Layout, RejectedRow

REASONS = {
    "wrong_shape": ("the row has not the expected columns", "该行的列不符"),
    "wrong_turns": ("a turn has an unknown role or no text", "对话轮次的角色未知或没有文本"),
    "missing_question": ("no question", "没有问题"),
    "missing_answer": ("no answer", "没有回答"),
    "question_not_text": ("the question is not text", "问题不是文本"),
    "answer_not_text": ("the answer is not text", "回答不是文本"),
    "empty_question": ("the question is empty", "问题为空"),
    "empty_answer": ("the answer is empty", "回答为空"),
    "question_too_short": ("the question is too short", "问题太短"),
    "question_too_long": ("the question is too long", "问题太长"),
    "answer_too_short": ("the answer is too short", "回答太短"),
    "answer_too_long": ("the answer is too long", "回答太长"),
    "question_equals_answer": ("the answer repeats the question", "回答只是重复问题"),
    "duplicate": ("the same row came before", "与之前的行重复"),
}
REJECTS_FILE = "rejects.jsonl"
EXCERPT_CHARS = 120
FIRST_REJECTS = 20
METER_ROWS = 10_000

# Control characters (but tab and newline), lone surrogates, invisible marks, and marks that turn the writing direction.
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u200b\u200e\u200f\u202a-\u202e\u2060\u2066-\u2069\ufeff\ufff9-\ufffb\ufffe\uffff]"
)
_FULL_WIDTH = re.compile("[０-９Ａ-Ｚａ-ｚ]")
_FULL_WIDTH_OFFSET = ord("Ａ") - ord("A")
_NOT_WORD = re.compile(r"[\W_]+")


class Limits(NamedTuple):
    """Lengths of the rows that are kept, in characters."""

    min_question_chars: int
    max_question_chars: int
    min_answer_chars: int
    max_answer_chars: int


class Reject(NamedTuple):
    """A row that was left out: its number in the file, a key of `REASONS`, and how it begins."""

    line: int
    reason: str
    excerpt: str


@dataclass
class Cleaned:
    """What became of the records; `rejected` counts by reason, `first_rejects` are the first few of them."""

    rows: list[Row] = field(default_factory=list)
    read: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    first_rejects: list[Reject] = field(default_factory=list)


def clean_rows(
    records: Iterable[tuple[int, Any]], layout: Layout, limits: Limits, rejects_path: Path, advance: Callable[[int], None]
) -> Cleaned:
    """Check every record, keep the good ones, and write the others to `rejects_path` as they come.

    Args:
        records: (line, record).
        advance: told now and then how many lines were done since the last call.
    """
    cleaned = Cleaned()
    seen: set[bytes] = set()
    shown = 0
    with rejects_path.open("w", encoding="utf-8") as rejects:
        for line, record in records:
            cleaned.read += 1
            try:
                cleaned.rows.append(_checked_row(layout.draft(record), line, limits, seen))
            except RejectedRow as problem:
                reject = Reject(line, problem.reason, _excerpt(record))
                cleaned.rejected[reject.reason] += 1
                if len(cleaned.first_rejects) < FIRST_REJECTS:
                    cleaned.first_rejects.append(reject)
                rejects.write(json.dumps(reject._asdict(), ensure_ascii=False) + "\n")
            if line - shown >= METER_ROWS:
                advance(line - shown)
                shown = line
    return cleaned


def normalise(text: str) -> str:
    """Text as it is stored: Unicode NFC, half-width letters and digits, no control characters, no outer white space."""
    text = _CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    text = _FULL_WIDTH.sub(lambda match: chr(ord(match[0]) - _FULL_WIDTH_OFFSET), text)
    return unicodedata.normalize("NFC", text).strip()


def text_key(text: str) -> str:
    """What two texts share when they differ only in case, width, white space and punctuation."""
    return _NOT_WORD.sub("", unicodedata.normalize("NFKC", text).casefold()) or text


def _checked_row(draft: Draft, line: int, limits: Limits, seen: set[bytes]) -> Row:
    question, answer = _text(draft.question, "question"), _text(draft.answer, "answer")
    history = [Turn(role=turn["role"], content=normalise(turn["content"])) for turn in draft.history]
    asked_chars = len(question) + sum(len(turn["content"]) for turn in history)
    too_short_or_long = {
        "question_too_short": len(question) < limits.min_question_chars,
        "question_too_long": asked_chars > limits.max_question_chars,
        "answer_too_short": len(answer) < limits.min_answer_chars,
        "answer_too_long": len(answer) > limits.max_answer_chars,
    }
    for reason, applies in too_short_or_long.items():
        if applies:
            raise RejectedRow(reason)
    if len(answer) <= 2 * len(question) and text_key(question) == text_key(answer):  # the length first: it spares most rows the work
        raise RejectedRow("question_equals_answer")
    # Punctuation counts here: "3.5 mg" and "35 mg" are not the same answer.
    same = [" ".join(text.casefold().split()) for text in (*(turn["content"] for turn in history), question, answer)]
    key = hashlib.blake2b("\0".join(same).encode(), digest_size=16).digest()
    if key in seen:
        raise RejectedRow("duplicate")
    seen.add(key)
    return Row(question=question, answer=answer, history=history, line=line)


def _text(value: Any, part: str) -> str:
    if value is None:
        raise RejectedRow(f"missing_{part}")
    if not isinstance(value, str):
        raise RejectedRow(f"{part}_not_text")
    text = normalise(value)
    if not text:
        raise RejectedRow(f"empty_{part}")
    return text


def _excerpt(record: Any) -> str:
    values = list(record.values()) if isinstance(record, dict) else [record]
    return normalise(" | ".join(str(value)[:EXCERPT_CHARS] for value in values[:8]))[:EXCERPT_CHARS]
