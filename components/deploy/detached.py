"""A process that outlives the command that started it, and that a later command finds again without mistaking it for another one."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from components.common.errors import ServiceError

POLL_S = 0.05
KILL_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class DetachedProcess:
    """A process id together with the time the process started: ids are used again, the pair is not."""

    pid: int
    started: str

    @classmethod
    def start(cls, command: list[str], *, log: Path, cwd: Path) -> Self:
        """Start a command in a session of its own, its output in `log`."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            child = subprocess.Popen(
                command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        return cls(child.pid, _look_up(child.pid)[0])

    def is_running(self) -> bool:
        """False also for a zombie, and for another process that has got the same id since."""
        started, is_zombie = _look_up(self.pid)
        return bool(started) and started == self.started and not is_zombie

    def terminate(self) -> None:
        """Ask it to end."""
        self._send(signal.SIGTERM)

    def stop(self, grace_s: float) -> None:
        """Ask it to end, and end it with all of its children when it has not after `grace_s` seconds.

        Raises:
            ServiceError: even that did not end it.
        """
        self.terminate()
        if not self._ends_within(grace_s):
            self._send(signal.SIGKILL)
            if not self._ends_within(KILL_TIMEOUT_S):
                raise ServiceError(f"process {self.pid} can't be ended", fix=f"look at it: ps -fp {self.pid}")

    def _ends_within(self, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while self.is_running():
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_S)
        return True

    def _send(self, number: signal.Signals) -> None:
        if not self.is_running():
            return
        try:
            if number == signal.SIGKILL:
                os.killpg(self.pid, number)
            else:
                os.kill(self.pid, number)
        except ProcessLookupError:
            return  # it ended by itself meanwhile


def _look_up(pid: int) -> tuple[str, bool]:
    """(a mark of when the process started, whether it is a zombie); the mark is empty when there is no such process."""
    boot_id = Path("/proc/sys/kernel/random/boot_id")
    if boot_id.exists():
        try:
            # proc(5): the name, field 2, may hold anything, so read after its last parenthesis; state is field 3, start time field 22.
            fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return "", False
        return f"{boot_id.read_text().strip()}:{fields[19]}", fields[0] in "ZX"
    row = subprocess.run(["ps", "-o", "stat=,lstart=", "-p", str(pid)], capture_output=True, text=True, check=False).stdout.split(None, 1)
    return (row[1].strip(), row[0].startswith("Z")) if len(row) == 2 else ("", False)


@contextmanager
def signals_deferred() -> Iterator[None]:
    """SIGTERM and SIGINT that come while the block runs are handled after it. The mask stays as it is: a child would inherit it."""
    came: list[int] = []
    former = {number: signal.signal(number, lambda number, _: came.append(number)) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])
