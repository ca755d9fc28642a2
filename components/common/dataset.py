"""The layout of a data set between the steps, and how it is read.

A data set folder holds `train.parquet`, `validation.parquet` and `test.parquet`, with the columns of `Row`, and `dataset.json`, written
last: its digest, row counts and origin. The original commands may also name a plain `.jsonl` file with `question` and `answer`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from components.common.errors import DataError
from components.common.files import read_json, sha256_file

if TYPE_CHECKING:
    from datasets import Dataset

SPLITS = ("train", "validation", "test")
INFO_FILE = "dataset.json"


class Turn(TypedDict):
    """An earlier turn of a conversation; `role` is user or assistant."""

    role: str
    content: str


class Row(TypedDict):
    """One question with its reference answer.

    `line` is the row's number in the source file, from 1; `history` are the turns before the question, often none.
    """

    question: str
    answer: str
    history: list[Turn]
    line: int


def read_info(dataset: Path) -> dict[str, Any]:
    """Facts of a data set: `digest`, `rows` per split, `source`. For a plain file: its sha256.

    Raises:
        DataError: nothing usable is there.
    """
    if dataset.is_file():
        return {"digest": sha256_file(dataset), "source": {"path": str(dataset)}}
    if not dataset.exists():
        raise DataError("the data set is missing", where=str(dataset), fix="run the prepare step first, or give a .jsonl file")
    info = read_json(dataset / INFO_FILE, kind="data set's dataset.json")
    if not isinstance(info, dict) or "digest" not in info:
        raise DataError("dataset.json has no digest", where=str(dataset / INFO_FILE), fix="run the prepare step again")
    return info


def load_split(dataset: Path, split: str) -> Dataset:
    """One split, memory-mapped; for a plain `.jsonl` file, all of its rows whatever the split.

    Raises:
        DataError: missing, broken, of another layout, or without rows.
    """
    from datasets import Dataset, disable_progress_bars

    disable_progress_bars()
    read_info(dataset)
    if dataset.is_file():
        rows: Dataset = Dataset.from_list(list(_plain_rows(dataset)))
    else:
        path = dataset / f"{split}.parquet"
        try:
            rows = Dataset.from_parquet(str(path), keep_in_memory=False)
        except FileNotFoundError:
            raise DataError(f"the data set has no {split} split", where=str(path), fix="run the prepare step again") from None
        except Exception as error:  # the reader's own errors are many
            raise DataError(f"the {split} split can't be read: {error}", where=str(path), fix="run the prepare step again") from None
        missing = set(Row.__annotations__) - set(rows.column_names)
        if missing:
            raise DataError(
                f"the {split} split has no column {', '.join(sorted(missing))}", where=str(path), fix="run the prepare step again"
            )
    if len(rows) == 0:
        raise DataError(f"the {split} split has no row", where=str(dataset), fix="give more data, or a larger share to this split")
    return rows


def read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number, value) of every line that is not blank.

    Raises:
        DataError: not UTF-8, or a line that is not JSON; names the line.
    """
    number = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                if line:
                    yield number, json.loads(line)
            except UnicodeDecodeError as error:
                raise DataError(
                    f"not UTF-8: byte 0x{error.object[error.start]:02x} at position {error.start} of the line",
                    where=f"{path}, line {number}",
                    fix=f"convert the file: iconv -f GB18030 -t UTF-8 {path.name} > utf8.jsonl",
                ) from None
            except (ValueError, RecursionError) as error:
                raise DataError(
                    f"not JSON: {error}", where=f"{path}, line {number}", fix="one JSON object a line; mend or delete the line"
                ) from None


def _plain_rows(path: Path) -> Iterator[Row]:
    for line, value in read_jsonl(path):
        if not isinstance(value, dict) or not all(isinstance(value.get(key), str) and value[key].strip() for key in ("question", "answer")):
            raise DataError(
                "a row needs a question and an answer, both text",
                where=f"{path}, line {line}",
                fix="mend the row, or let the prepare step map your columns",
            )
        yield Row(question=value["question"], answer=value["answer"], history=value.get("history") or [], line=line)
