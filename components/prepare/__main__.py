"""The prepare step: rows in any usual format → a validated, split data set and its report."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from components.common.dataset import INFO_FILE
from components.common.errors import DataError, UserError, run_command
from components.common.files import whole_folder, write_atomically, write_json
from components.common.progress import progress
from components.prepare.clean import REJECTS_FILE, Cleaned, Limits, clean_rows
from components.prepare.config import PrepareSettings
from components.prepare.formats import Records, read_records
from components.prepare.layouts import Layout, detect_layout
from components.prepare.report import report_page
from components.prepare.source import check_digest, local_copy
from components.prepare.split import Split, split_rows
from components.prepare.store import write_dataset

HEAD_ROWS = 100  # records that the layout is detected from


def main(argv: list[str] | None = None) -> int | None:
    """Run the step."""
    settings, outputs = PrepareSettings.parse("python -m components.prepare", argv)
    keep_foreign_folder(settings.dataset)

    with local_copy(settings.data_path) as path:
        source = {"path": settings.data_path, "sha256": check_digest(path, settings.data_digest), "size_bytes": path.stat().st_size}
        records = read_records(path)
        source["file_type"] = records.file_type
        layout, numbered = find_layout(records, settings)
        print(f"data: {settings.data_path}, {records.file_type}, {source['size_bytes']:,} bytes, sha256 {source['sha256']}", flush=True)
        print(f"layout: {layout}; --question_column and --answer_column choose other columns", flush=True)
        with whole_folder(settings.dataset) as scratch:
            with progress("rows checked", records.last) as meter:
                cleaned = clean_rows(numbered, layout, limits_of(settings), scratch / REJECTS_FILE, meter.advance)
            refuse_nothing(cleaned, settings.data_path)
            split = split_rows(
                cleaned.rows,
                validation_fraction=settings.validation_fraction,
                test_fraction=settings.test_fraction,
                salt=settings.split_salt,
                where=settings.data_path,
            )
            info = write_dataset(scratch, split.rows, facts(settings, source, layout, cleaned, split))

    write_atomically(settings.data_report, report_page(info, cleaned, split))
    metrics = metrics_of(info)
    write_json(settings.metrics, metrics)
    print_summary(settings, info, split)
    outputs.write(metadata={"dataset": {"digest": info["digest"], "rows": info["rows"]}, "metrics": metrics})
    return None


def keep_foreign_folder(folder: Path) -> None:
    """Refuse to replace a folder that is not a data set: the output folder's old content is deleted.

    Raises:
        UserError: the output path is taken by something else.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / INFO_FILE).is_file()):
        raise UserError(
            "the output path holds something else than a data set, which would be deleted",
            where=str(folder),
            fix="choose another folder with --dataset",
        )


def find_layout(records: Records, settings: PrepareSettings) -> tuple[Layout, Iterator[tuple[int, Any]]]:
    """The file's layout, from its first records, and all of the records."""
    head = list(islice(records.numbered, HEAD_ROWS))
    if not head:
        raise DataError("the data file has no row", where=settings.data_path, fix="give a file with questions and answers")
    layout = detect_layout(
        [record for _, record in head],
        settings.data_path,
        question_column=settings.question_column,
        answer_column=settings.answer_column,
    )
    return layout, chain(head, records.numbered)


def limits_of(settings: PrepareSettings) -> Limits:
    """The lengths that the settings ask for."""
    return Limits(**{name: getattr(settings, name) for name in Limits._fields})


def refuse_nothing(cleaned: Cleaned, where: str) -> None:
    """Stop when no row is left, and say why.

    Raises:
        DataError: no row can be used; names the most frequent reasons and the first rows.
    """
    if not cleaned.rows:
        reasons = ", ".join(f"{reason} {count}" for reason, count in cleaned.rejected.most_common(3))
        first = "; ".join(f"line {reject.line}: {reject.reason}" for reject in cleaned.first_rejects[:3])
        raise DataError(
            f"none of the {cleaned.read} rows can be used: {reasons}",
            where=f"{where}, {first}",
            fix="check --question_column and --answer_column, and the limits --min_answer_chars, --max_answer_chars",
        )


def facts(settings: PrepareSettings, source: dict[str, Any], layout: Layout, cleaned: Cleaned, split: Split) -> dict[str, Any]:
    """What `dataset.json` says beside its digest and row counts."""
    return {
        "groups": split.groups,
        "source": source,
        "layout": layout.name,
        "columns": layout.columns,
        "rows_read": cleaned.read,
        "rejected": dict(cleaned.rejected.most_common()),
        "split": {
            "salt": settings.split_salt,
            "validation_fraction": settings.validation_fraction,
            "test_fraction": settings.test_fraction,
            "moved": [{"question": question, "from": old, "to": new} for question, old, new in split.moved],
        },
    }


def metrics_of(info: dict[str, Any]) -> dict[str, int]:
    """The counts as flat numbers."""
    return {
        "rows_read": info["rows_read"],
        "rows_kept": sum(info["rows"].values()),
        **{f"rows_{name}": count for name, count in info["rows"].items()},
        **{f"rejected_{reason}": count for reason, count in info["rejected"].items()},
    }


def print_summary(settings: PrepareSettings, info: dict[str, Any], split: Split) -> None:
    """Say what was done, in a few lines."""
    kept = sum(info["rows"].values())
    print(f"rows: {info['rows_read']:,} read, {kept:,} kept")
    if info["rejected"]:
        reasons = ", ".join(f"{reason} {count:,}" for reason, count in info["rejected"].items())
        print(f"left out: {reasons}; each with its line in {settings.dataset / REJECTS_FILE}")
    for question, old, new in split.moved:
        print(f"split: {new} would have been empty, so {question[:40]!r} moved there from {old}: its hash was the nearest")
    print(f"split by question: {', '.join(f'{name} {count:,}' for name, count in info['rows'].items())} rows")
    print(f"data set: {settings.dataset}, digest {info['digest']}")
    print(f"report: {settings.data_report}", flush=True)


if __name__ == "__main__":
    run_command(main)
