"""Every file type gives the same rows; what is broken is named with its line."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from components.common.errors import DataError
from components.prepare.formats import MAX_CELL_CHARS, check_utf8, read_records

ROWS = [
    {"question": "什么是高血压？", "answer": '非同日三次测量，≥140/90 mmHg，即"高血压"。\n要复查。'},
    {"question": "What is flu?", "answer": "An infection, with\tfever."},
    {"question": "😀 emoji?", "answer": "可以，see a doctor"},
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows as a file of the type that the suffix names."""
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    else:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


def read(path: Path) -> list[tuple[int, Any]]:
    return list(read_records(path).numbered)


@pytest.mark.parametrize(
    ("suffix", "lines"),
    [(".jsonl", [1, 2, 3]), (".json", [1, 2, 3]), (".csv", [2, 4, 5]), (".tsv", [2, 4, 5]), (".parquet", [1, 2, 3]), (".CSV", [2, 4, 5])],
)
def test_every_file_type_gives_the_same_rows_with_their_lines(tmp_path: Path, suffix: str, lines: list[int]) -> None:
    assert read(write(tmp_path / f"rows{suffix}", ROWS)) == list(zip(lines, ROWS, strict=True))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv"])
def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"rows{suffix}", ROWS[1:])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"))
    assert [record for _, record in read(path)] == ROWS[1:]


def test_json_may_wrap_its_rows_or_hold_one_object_a_line(tmp_path: Path) -> None:
    wrapped, lines = tmp_path / "wrapped.json", tmp_path / "lines.json"
    wrapped.write_text(json.dumps({"data": ROWS}), encoding="utf-8")
    lines.write_text("\n".join(json.dumps(row) for row in ROWS), encoding="utf-8")
    assert [record for _, record in read(wrapped)] == ROWS
    assert [record for _, record in read(lines)] == ROWS
    assert read_records(lines).file_type == "JSON Lines"


def test_blank_lines_are_skipped_and_counted(tmp_path: Path) -> None:
    jsonl, table = tmp_path / "rows.jsonl", tmp_path / "rows.csv"
    jsonl.write_text('{"a": 1}\n\n  \n{"a": 2}\n', encoding="utf-8")
    table.write_text("a,b\n\n1,2\n", encoding="utf-8")
    assert read(jsonl) == [(1, {"a": 1}), (4, {"a": 2})]
    assert read(table) == [(3, {"a": "1", "b": "2"})]


def test_a_row_with_too_many_or_too_few_cells_is_no_record(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("q,a\n1,2,3\n1\n1,2\n", encoding="utf-8")
    assert read(path) == [(2, ["1", "2", "3"]), (3, ["1"]), (4, {"q": "1", "a": "2"})]


@pytest.mark.parametrize(
    ("name", "text", "line", "message"),
    [
        ("rows.jsonl", '{"a": 1}\n{"a": \n', 2, "not JSON"),
        ("rows.json", '[{"a": 1},\n{"a": 2},\n{"a": }]', 3, "not JSON"),
        ("rows.csv", 'q,a\n1,2\n"open,2\n3,4\n', 3, "not CSV"),
        ("rows.csv", 'q,a\n1,2\n"a"b,2\n', 3, "not CSV"),
        ("rows.tsv", 'q\ta\n1\t"x"y\n', 2, "not TSV"),
        ("rows.csv", "q,a,q\n1,2,3\n", 1, "two columns have the same name"),
    ],
)
def test_broken_text_is_named_with_its_line(tmp_path: Path, name: str, text: str, line: int, message: str) -> None:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message) as caught:
        read(path)
    assert caught.value.where == f"{path}, line {line}"
    assert caught.value.fix


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv"])
@pytest.mark.parametrize(
    ("encoding", "named"), [("gb18030", "GB18030"), ("utf-16", "UTF-16"), ("utf-16-le", "UTF-16LE"), ("utf-16-be", "UTF-16BE")]
)
def test_another_encoding_is_named_with_the_line_and_the_command(tmp_path: Path, suffix: str, encoding: str, named: str) -> None:
    path = write(tmp_path / f"rows{suffix}", [{"question": "ascii only", "answer": "yes"}, *ROWS])
    text = path.read_bytes().decode("utf-8")
    path.write_bytes(text.encode(encoding))
    first = 1 if named != "GB18030" else 1 + text[: text.index("什")].count("\n")
    with pytest.raises(DataError, match="not UTF-8") as caught:
        read(path)
    assert caught.value.where == f"{path}, line {first}"
    assert f"iconv -f {named} -t UTF-8 {path.name} > utf8{suffix}" in caught.value.fix


def test_a_western_file_is_not_called_chinese(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes("q,a\nMénière ?,oui à coup sûr\n".encode("cp1252"))
    with pytest.raises(DataError) as caught:
        check_utf8(path)
    assert "iconv -f WINDOWS-1252" in caught.value.fix


def test_the_line_of_a_bad_byte_is_right_far_into_a_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"q": "高血压"}\n'.encode() * 200_000 + b'{"q": "\xff"}\n')
    with pytest.raises(DataError) as caught:
        check_utf8(path)
    assert caught.value.where == f"{path}, line 200001"


def test_a_file_cut_inside_a_character_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes("q,a\n高,血压".encode()[:-1])
    with pytest.raises(DataError, match="ends inside a character") as caught:
        check_utf8(path)
    assert caught.value.where.endswith("line 2")


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + b"\0" * 100 + b"PAR1", b"question,answer\n"])
def test_what_is_not_parquet_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(content)
    with pytest.raises(DataError, match="not Parquet"):
        read(path)


def test_a_damaged_parquet_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.parquet", ROWS * 100)
    content = bytearray(path.read_bytes())
    content[4:60] = bytes(56)
    path.write_bytes(content)
    with pytest.raises(DataError, match="not Parquet"):
        read(path)


@pytest.mark.parametrize(("name", "text"), [("a.json", '{"rows": []}'), ("a.json", "3"), ("a.json", '{"data": {"q": 1}}')])
def test_json_without_rows_is_refused(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match="no array of rows"):
        read(tmp_path / name)


def test_an_unknown_file_type_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.xlsx").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"\.xlsx is not a file type") as caught:
        read(tmp_path / "rows.xlsx")
    assert ".parquet" in caught.value.fix


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_an_empty_file_has_no_row(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"rows{suffix}"
    if suffix == ".parquet":
        parquet.write_table(pa.table({"question": pa.array([], pa.string())}), path)
    else:
        path.write_bytes(b"\n")
    assert read(path) == []


def test_a_quote_that_is_never_closed_does_not_swallow_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('q,a\n1,2\n3,"' + "长" * (MAX_CELL_CHARS + 10), encoding="utf-8")
    with pytest.raises(DataError, match="field larger than field limit") as caught:
        read(path)
    assert caught.value.where == f"{path}, line 3"
