"""Progress of long work, with the time left: a live bar on a terminal, plain lines in a file or a pod's log."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_EVERY_S = 5.0


class Meter:
    """Counts units of work done and shows them; `note` is free text beside the count, such as a loss."""

    def __init__(self, label: str, total: int, done: int = 0) -> None:
        self.label, self.total, self.done, self._done_before = label, total, done, done
        self._started = self._last_line = time.monotonic()
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
            )
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task(label, total=total, completed=done, note="")

    def advance(self, units: int = 1, note: str = "") -> None:
        """Count `units` more as done."""
        self.done += units
        if self._bar:
            self._bar.update(self._task, advance=units, note=note)
            return
        now = time.monotonic()
        if units == 0:
            return
        if now - self._last_line >= LINE_EVERY_S or self.done >= self.total or self.done == self._done_before + units:
            self._last_line = now
            print(f"{self.label}: {self.done}/{self.total}, {self._time_left(now)}{', ' + note if note else ''}", flush=True)

    def _time_left(self, now: float) -> str:
        elapsed = now - self._started
        if self.done >= self.total:
            return f"done in {elapsed:.0f} s"
        now_done = self.done - self._done_before
        return f"about {elapsed / now_done * (self.total - self.done):.0f} s left" if now_done else "time left unknown"

    def close(self) -> None:
        """Give the terminal back."""
        if self._bar:
            self._bar.stop()


@contextmanager
def progress(label: str, total: int, done: int = 0) -> Iterator[Meter]:
    """A meter for `total` units of work, of which `done` were done before; closed whatever happens."""
    meter = Meter(label, total, done)
    try:
        yield meter
    finally:
        meter.close()
