"""The rows that a merge is measured on: held out of the training where a data set is given, else a few built-in ones."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from components.common.chat import ChatFormat, Message
from components.common.dataset import load_split

MAX_ROWS = 16
MAX_ROWS_FROM_DISK = 4  # where every row reads all the weights from the disk again
MAX_TOKENS = 1024  # longer rows are passed over
MAX_ANSWER_TOKENS = 256  # of an answer are compared

# Fixed, so that certificates of different runs compare; not from any data set, so that no patient's words are in a report.
PROBES = (
    ("高血压患者平时要注意什么？", "低盐饮食，规律运动，戒烟限酒，按医嘱服药，并定期测量血压。"),
    ("突然胸痛、出冷汗怎么办？", "这可能是心肌梗死，请立即拨打120，停止活动，不要自己开车去医院。"),
    ("What are common symptoms of diabetes?", "Thirst, frequent urination, weight loss and tiredness; some people notice nothing at all."),
    ("Can I take ibuprofen with blood thinners?", "Not without asking your doctor: together they raise the risk of serious bleeding."),
)


@dataclass(frozen=True)
class Row:
    """One conversation as tokens.

    Attributes:
        ids: token ids up to the last token that is compared.
        answer_start: where the answer begins in them.
        line: the row's number in the source file, from 1; 0 for a built-in one.
    """

    ids: list[int]
    answer_start: int
    line: int

    @property
    def prompt_ids(self) -> list[int]:
        return self.ids[: self.answer_start]

    @property
    def answer_ids(self) -> list[int]:
        return self.ids[self.answer_start :]


class Rows(NamedTuple):
    """The rows and where they are from: `validation`, `file` or `built-in`."""

    rows: list[Row]
    source: str


def load_rows(dataset: Path | None, tokenizer: Any, chat: ChatFormat, limit: int = MAX_ROWS) -> Rows:
    """At most `limit` rows of the validation split, evenly spread over it; the built-in ones without a data set, or where all are too long.

    Raises:
        DataError: the data set is missing or broken.
    """
    rows = _held_out(dataset, tokenizer, chat, limit) if dataset else []
    if rows and dataset:
        found = Rows(rows, "file" if dataset.is_file() else "validation")
    else:
        found = Rows([_row(*chat.example(tokenizer, *probe), 0) for probe in PROBES][:limit], "built-in")
    print(f"the merge is measured on {len(found.rows)} rows ({found.source}), {answer_tokens(found.rows)} answer tokens", flush=True)
    return found


def answer_tokens(rows: list[Row]) -> int:
    """How many tokens are compared."""
    return sum(len(row.answer_ids) for row in rows)


def _held_out(dataset: Path, tokenizer: Any, chat: ChatFormat, limit: int) -> list[Row]:
    split = load_split(dataset, "validation")
    rows: list[Row] = []
    # Every k-th row first, then those between: always the same, and spread over the split.
    step = max(1, len(split) // limit)
    order = sorted(range(len(split)), key=lambda index: (index % step, index))
    for index in order:
        row = split[index]
        history = [Message(turn["role"], turn["content"]) for turn in row["history"]]
        ids, mask = chat.example(tokenizer, row["question"], row["answer"], history)
        if len(ids) <= MAX_TOKENS:
            rows.append(_row(ids, mask, row["line"]))
        if len(rows) == limit:
            break
    return sorted(rows, key=lambda row: row.line)


def _row(ids: list[int], mask: list[bool], line: int) -> Row:
    start = mask.index(True)
    return Row(ids[: start + MAX_ANSWER_TOKENS], start, line)
