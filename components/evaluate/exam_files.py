"""The rows of an exam file: .jsonl, .json or .csv, each also with .gz.

A .json file may be a list, an object of rows by id, or lines of JSON: all three are published.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from pathlib import Path
from typing import Any, NamedTuple

from components.common.errors import DataError

SUFFIXES = (".jsonl", ".json", ".csv", ".jsonl.gz", ".json.gz", ".csv.gz")


class ExamRow(NamedTuple):
    """One row; `line` is its line in the file, or its position in a .json list or object, from 1. Keys are in lower case."""

    line: int
    values: dict[str, Any]


def exam_files(path: Path) -> list[Path]:
    """The file itself, or the exam files directly in a folder, by name.

    Raises:
        DataError: nothing is there.
    """
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise DataError("an exam is a .jsonl, .json or .csv file, also with .gz", where=str(path), fix="convert or rename the file")
        return [path]
    if not path.exists():
        raise DataError("the exam is missing", where=str(path), fix="check the path, or leave exam_path empty for no exam")
    files = sorted(one for one in path.iterdir() if one.is_file() and one.name.endswith(SUFFIXES) and not one.name.startswith("."))
    if not files:
        raise DataError("the folder has no exam file", where=str(path), fix=f"give a folder with {', '.join(SUFFIXES[:3])} files")
    return files


def read_exam_rows(path: Path) -> list[ExamRow]:
    """All rows of one file, in order.

    Raises:
        DataError: not UTF-8, broken, or without rows; names the line.
    """
    text = _text(path)
    kind = Path(path.name.removesuffix(".gz")).suffix
    if kind == ".csv":
        rows = _csv_rows(text, path)
    elif kind == ".json" and _is_one_value(text):
        rows = _json_rows(text, path)
    else:
        rows = [(number, _parsed(line, path, number)) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not rows:
        raise DataError("the exam file has no row", where=str(path), fix="give a file with questions")
    for line, values in rows:
        if not isinstance(values, dict):
            raise DataError(
                f"a question must be a JSON object, not {type(values).__name__}", where=f"{path}, line {line}", fix="mend or delete it"
            )
    return [ExamRow(line, {str(key).strip().casefold(): value for key, value in values.items()}) for line, values in rows]


def _text(path: Path) -> str:
    raw = path.read_bytes()
    if path.name.endswith(".gz"):
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise DataError(f"the file is no whole gzip file: {error}", where=str(path), fix="fetch it again") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"not UTF-8: byte 0x{error.object[error.start]:02x}",
            where=f"{path}, line {line}",
            fix="convert the file: iconv -f GB18030 -t UTF-8 FILE > NEW_FILE",
        ) from None


def _parsed(text: str, path: Path, line: int) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError):
            line += error.lineno - 1
        raise DataError(f"not JSON: {error}", where=f"{path}, line {line}", fix="mend or delete the line") from None


def _is_one_value(text: str) -> bool:
    """Whether a .json file is one JSON value; lines of JSON begin with a whole one and go on."""
    first, _, rest = text.strip().partition("\n")
    try:
        json.loads(first)
    except ValueError:
        return True
    return not rest.strip()


def _json_rows(text: str, path: Path) -> list[tuple[int, Any]]:
    value = _parsed(text, path, 1)
    if isinstance(value, dict) and value and all(isinstance(row, dict) for row in value.values()) and "question" not in value:
        value = list(value.values())
    return list(enumerate(value if isinstance(value, list) else [value], 1))


def _csv_rows(text: str, path: Path) -> list[tuple[int, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    rows: list[tuple[int, Any]] = []
    line = 1
    try:
        for row in reader:
            if None in row:
                raise DataError(
                    "a row has more cells than the header", where=f"{path}, line {line + 1}", fix="quote cells that have commas"
                )
            rows.append((line + 1, {key: value for key, value in row.items() if key}))
            line = reader.line_num
    except csv.Error as error:
        raise DataError(f"not CSV: {error}", where=f"{path}, line {reader.line_num}", fix="mend the line") from None
    return rows
