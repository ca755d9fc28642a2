"""Writes the data set's files: one Parquet file a split, then `dataset.json`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from components.common.dataset import INFO_FILE, Row
from components.common.files import write_json

FORMAT_VERSION = 1
ROW_GROUP_ROWS = 10_000


def write_dataset(folder: Path, splits: dict[str, list[Row]], facts: dict[str, Any]) -> dict[str, Any]:
    """Write the rows and return the content of `dataset.json`, which is written last.

    Args:
        folder: an empty folder.
        splits: split → rows.
        facts: what else `dataset.json` says.
    """
    for name, rows in splits.items():
        _write_parquet(folder / f"{name}.parquet", rows)
    counts = {name: len(rows) for name, rows in splits.items()}
    info = {"format": FORMAT_VERSION, "digest": digest_of(splits), "rows": counts, **facts}
    write_json(folder / INFO_FILE, info)
    return info


def digest_of(splits: dict[str, list[Row]]) -> str:
    """The sha256 over the split, question, answer and history of every row.

    Line numbers are left out: the same rows have the same digest whatever file they came from.
    """
    digest = hashlib.sha256()
    for name, rows in splits.items():
        for row in rows:
            history = [[turn["role"], turn["content"]] for turn in row["history"]]
            digest.update(json.dumps([name, row["question"], row["answer"], history], ensure_ascii=False).encode() + b"\n")
    return digest.hexdigest()


def _write_parquet(path: Path, rows: Sequence[Row]) -> None:
    import pyarrow as pa
    from pyarrow import json as arrow_json
    from pyarrow.parquet import ParquetWriter

    turn = pa.struct([("role", pa.string()), ("content", pa.string())])
    schema = pa.schema([("question", pa.string()), ("answer", pa.string()), ("history", pa.list_(turn)), ("line", pa.int64())])
    with ParquetWriter(path, schema, compression="zstd") as writer:
        for start in range(0, len(rows), ROW_GROUP_ROWS):
            # By way of JSON: to convert Python objects, pyarrow imports pandas wherever it is installed.
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[start : start + ROW_GROUP_ROWS]).encode()
            whole = arrow_json.ReadOptions(use_threads=False, block_size=len(lines) + 1)
            layout = arrow_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="error")
            writer.write_table(arrow_json.read_json(pa.BufferReader(lines), read_options=whole, parse_options=layout))
