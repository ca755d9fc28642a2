"""`python -m components.report`: the page of a run."""

from __future__ import annotations

from pathlib import Path

from components.common.errors import DataError, run_command
from components.common.files import read_json, write_atomically
from components.report.config import ReportSettings
from components.report.page import render_run, render_status


def main(argv: list[str] | None = None) -> None:
    settings, outputs = ReportSettings.parse("python -m components.report", argv)
    if settings.run_record:
        record = read_json(Path(settings.run_record), kind="run record")
        if not isinstance(record, dict) or not {"id", "state", "steps", "parameters"} <= record.keys():
            raise DataError("the run record is not one of ours", where=settings.run_record, fix="give the run.json of a local run")
        html = render_run(record, Path(settings.run_record).parent, settings.page.absolute().parent)
        state = str(record["state"])
    else:
        html, state = render_status(settings.status), str(settings.status.get("state", "unknown"))
    write_atomically(settings.page, html)
    print(f"page written: {settings.page}")
    outputs.write(metadata={"page": {"state": state}})


if __name__ == "__main__":
    run_command(main)
