"""Data files → numbered records: .jsonl, .json, .csv, .tsv and .parquet, row by row where the format allows it, UTF-8 only."""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from components.common.dataset import read_jsonl
from components.common.errors import DataError
from components.common.files import CHUNK_BYTES

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
BATCH_ROWS = 1024
HEAD_BYTES = 400
# A longer cell is a quote that was never closed, and would swallow the rest of the file.
MAX_CELL_CHARS = 10_000_000


class Records(NamedTuple):
    """The content of a data file.

    Attributes:
        file_type: how the file was read, for people.
        last: the number of the last record, about; for the progress display.
        numbered: (line or row number from 1, record) in the file's order; a record is a dict, unless its row is broken.
    """

    file_type: str
    last: int
    numbered: Iterator[tuple[int, Any]]


def read_records(path: Path) -> Records:
    """Open a data file by its suffix.

    Raises:
        DataError: of an unknown type, not UTF-8, or broken; names the line. Also while the records are read.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(
            f"{suffix or 'no suffix'} is not a file type that we read", where=str(path), fix=f"convert it to one of {', '.join(SUFFIXES)}"
        )
    if suffix == ".parquet":
        return _parquet(path)
    lines = check_utf8(path)
    if suffix == ".json":
        return _json(path, lines)
    if suffix == ".jsonl":
        return Records("JSON Lines", lines, read_jsonl(path))
    name, delimiter = ("CSV", ",") if suffix == ".csv" else ("TSV", "\t")
    return Records(name, lines, _delimited(path, name, delimiter))


def check_utf8(path: Path) -> int:
    """The number of lines of a text file, read in bounded memory.

    Raises:
        DataError: not UTF-8; names the line and the command that converts the file.
    """
    decoder = codecs.getincrementaldecoder("utf-8")()
    line = 1
    with path.open("rb") as file:
        wide = _utf16_name(file.read(HEAD_BYTES))
        if wide:
            raise _not_utf8(path, 1, f"this is {wide}", wide)
        file.seek(0)
        while chunk := file.read(CHUNK_BYTES):
            try:
                decoder.decode(chunk)
            except UnicodeDecodeError as error:
                line += error.object.count(b"\n", 0, error.start)
                raise _not_utf8(
                    path, line, f"byte 0x{error.object[error.start]:02x}", _likely_encoding(error.object[error.start :])
                ) from None
            line += chunk.count(b"\n")
    try:
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        raise _not_utf8(path, line, "the file ends inside a character", "UTF-8 -c") from None
    return line


def _utf16_name(head: bytes) -> str:
    """The name of the 16-bit encoding that a file's first bytes show; empty when they don't."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    zeros = [index % 2 for index, byte in enumerate(head) if byte == 0]  # ASCII in UTF-16: every second byte
    if len(zeros) * 20 < len(head) or not zeros:
        return ""
    return "UTF-16LE" if sum(zeros) * 2 > len(zeros) else "UTF-16BE"


def _likely_encoding(tail: bytes) -> str:
    """What the text is instead of UTF-8: Chinese Windows files are GB18030, western ones Windows-1252."""
    try:
        codecs.getincrementaldecoder("gb18030")().decode(tail)
    except UnicodeDecodeError:
        return "WINDOWS-1252"
    return "GB18030"


def _not_utf8(path: Path, line: int, detail: str, encoding: str) -> DataError:
    command = f"iconv -f {encoding} -t UTF-8 {path.name} > utf8{path.suffix}"
    return DataError(f"not UTF-8: {detail}", where=f"{path}, line {line}", fix=f"convert the file: {command}")


def _json(path: Path, lines: int) -> Records:
    text = path.read_text(encoding="utf-8-sig")
    if not text.strip():
        return Records("JSON", 0, iter(()))
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and error.lineno > 1:  # many published .json files hold one object a line
            return Records("JSON Lines", lines, read_jsonl(path))
        raise DataError(f"not JSON: {error}", where=f"{path}, line {error.lineno}", fix="mend the file") from None
    if isinstance(value, dict):
        value = value.get("data")
    if not isinstance(value, list):
        raise DataError("the JSON holds no array of rows", where=str(path), fix='give [row, …], {"data": [row, …]}, or .jsonl')
    return Records("JSON", len(value), iter(enumerate(value, 1)))


def _delimited(path: Path, name: str, delimiter: str) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(MAX_CELL_CHARS)
    start = 1
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            header = [cell.strip() for cell in next(reader, [])]
            if len(set(header)) < len(header):
                raise DataError("two columns have the same name", where=f"{path}, line 1", fix="rename one of them")
            start = reader.line_num + 1
            for cells in reader:
                if cells:
                    yield start, dict(zip(header, cells, strict=True)) if len(cells) == len(header) else cells
                start = reader.line_num + 1
        except csv.Error as error:
            raise DataError(
                f"not {name}: {error}", where=f"{path}, line {start}", fix='mend the quotes: a " inside a cell is written ""'
            ) from None


def _parquet(path: Path) -> Records:
    from pyarrow.parquet import ParquetFile

    with _parquet_errors(path):
        file = ParquetFile(path)
        return Records("Parquet", file.metadata.num_rows, _parquet_rows(path, file))


def _parquet_rows(path: Path, file: Any) -> Iterator[tuple[int, Any]]:
    number = 0
    with _parquet_errors(path):
        for batch in file.iter_batches(batch_size=BATCH_ROWS):
            for number, record in enumerate(batch.to_pylist(), number + 1):  # noqa: B020 - the numbers run on from batch to batch
                yield number, record


@contextmanager
def _parquet_errors(path: Path) -> Iterator[None]:
    from pyarrow import ArrowException

    try:
        yield
    except (ArrowException, UnicodeDecodeError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DataError(f"not Parquet, or broken: {error}", where=str(path), fix="write or download the file again") from None
