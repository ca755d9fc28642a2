"""What a service keeps on disk between two commands: a lock, so that two never roll it at once, and the history of its rollouts."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from components.common.errors import ServiceError, StorageError
from components.common.files import write_atomically


def now() -> str:
    """The time as it stands in records: ISO 8601, UTC, seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


class ServiceFolder:
    """`<state_dir>/<service_name>/`."""

    def __init__(self, state_dir: Path, service_name: str) -> None:
        self.service_name = service_name
        self.path = state_dir.absolute() / service_name
        self._history = self.path / "history.jsonl"
        self._holder = self.path / "lock.holder"

    @contextmanager
    def lock(self, action: str) -> Iterator[None]:
        """Be the only command that changes this service.

        Raises:
            ServiceError: another one is at it; names it. StorageError: the folder can't be made.
        """
        from filelock import FileLock, Timeout

        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise StorageError(
                "a file stands where the service's folder should be", where=str(self.path), fix="choose another --state_dir"
            ) from None
        try:
            with FileLock(self.path / "lock", blocking=False):
                write_atomically(self._holder, f"`{action}` by process {os.getpid()} on {socket.gethostname()} since {now()}\n")
                try:
                    yield
                finally:
                    self._holder.unlink(missing_ok=True)
        except Timeout:
            holder = self._holder.read_text(encoding="utf-8").strip() if self._holder.exists() else "a command that has just started"
            raise ServiceError(
                f"another command is changing the service {self.service_name!r}",
                where=f"{holder} ({self.path / 'lock'})",
                fix="wait until it has ended, or choose another --service_name",
            ) from None

    def append_history(self, entry: dict[str, Any]) -> None:
        """Add one line to the history, in one write: a line is there or not."""
        self.path.mkdir(parents=True, exist_ok=True)
        with self._history.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, ensure_ascii=False, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def history(self) -> list[dict[str, Any]]:
        """All entries, oldest first.

        Raises:
            DataError: a line is broken; names it.
        """
        from components.common.dataset import read_jsonl

        return [entry for _, entry in read_jsonl(self._history)] if self._history.exists() else []
