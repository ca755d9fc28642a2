"""The record of a run: `runs/<id>/run.json`, rewritten whole at every change, read by `runs`, `show`, `rerun` and the run's page."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from components.common.errors import UserError
from components.common.files import read_json, write_json

RECORD_FILE = "run.json"
STEPS = ("prepare", "train", "merge", "evaluate", "deploy", "report")
# Every state a step can be in. `cached`: taken from an earlier run; `skipped`: not needed, or its turn never came.
STATES = ("pending", "running", "succeeded", "cached", "skipped", "failed", "interrupted")


def new_run_id() -> str:
    """A run's name: its start, and two random bytes for runs of the same second."""
    return f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


class RunRecord:
    """The facts of one run, kept on disk as they happen."""

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self.folder, self.facts = folder, facts

    @classmethod
    def start(cls, runs_dir: Path, *, runner: str, parameters: dict[str, Any], parent: str = "") -> RunRecord:
        """A new run with every step pending."""
        run_id = new_run_id()
        folder = runs_dir / run_id
        (folder / "logs").mkdir(parents=True)
        steps = {step: {"state": "pending"} for step in STEPS}
        facts = {
            "format": 1,
            "id": run_id,
            "runner": runner,
            "state": "running",
            "started": time.time(),
            "parent": parent,
            "parameters": parameters,
        }
        record = cls(folder, facts | {"steps": steps})
        record.save()
        return record

    @classmethod
    def load(cls, runs_dir: Path, run_id: str) -> RunRecord:
        """A past run; `latest` means the newest.

        Raises:
            UserError: no such run.
        """
        if run_id == "latest":
            run_id = next((record.id for record in all_runs(runs_dir)), "latest")
        folder = runs_dir / run_id
        if not (folder / RECORD_FILE).is_file():
            raise UserError(f"there is no run {run_id!r}", where=str(runs_dir), fix="`python pipeline.py runs` lists them")
        return cls(folder, read_json(folder / RECORD_FILE, kind="run record"))

    @property
    def id(self) -> str:
        return str(self.facts["id"])

    @property
    def path(self) -> Path:
        return self.folder / RECORD_FILE

    def step(self, name: str) -> dict[str, Any]:
        """The facts of one step."""
        facts: dict[str, Any] = self.facts["steps"][name]
        return facts

    def update(self, name: str, **facts: Any) -> None:
        """Add facts to a step and save."""
        self.step(name).update(facts)
        self.save()

    def finish(self, state: str) -> None:
        """Close the run; steps that never started are marked as skipped."""
        for facts in self.facts["steps"].values():
            if facts["state"] == "pending":
                facts["state"] = "skipped"
            elif facts["state"] == "running":
                facts.update(state="interrupted", ended=time.time())
        self.facts.update(state=state, ended=time.time())
        self.save()

    def save(self) -> None:
        write_json(self.path, self.facts)


def all_runs(runs_dir: Path) -> Iterator[RunRecord]:
    """Every run below `runs_dir`, newest first."""
    for path in sorted(runs_dir.glob(f"*/{RECORD_FILE}"), reverse=True):
        yield RunRecord(path.parent, read_json(path, kind="run record"))
