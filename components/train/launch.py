"""One process for each card of this machine: the plain command starts itself once for each, as `torchrun` would.

Unlike `torchrun`, it gives a stopped run all the time it needs to save itself, and its exit code is that of the processes.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from components.common.device import usable_cpus

POLL_EVERY_S = 0.1
GRACE_S = 20.0  # a process whose partner failed ends by itself, or waits for it for ever
STOPPED = {128 + signal.SIGTERM, 128 + signal.SIGINT}


def processes_of_environment() -> int:
    """How many processes were started together with this one, itself included, by torchrun, accelerate or `run_processes`."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this is the process that speaks, writes and saves."""
    return int(os.environ.get("RANK", "0")) == 0


def quiet_unless_main() -> None:
    """Let only the main process print; the errors of every process are still seen."""
    if is_main_process():
        return
    sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115  it lives as long as the process
    sys.stderr.isatty = lambda: False  # type: ignore[method-assign]  # no second progress bar on a terminal


def use_own_card() -> None:
    """Let `cuda` mean this process's own card: torch takes the first one, of every process."""
    import torch

    if "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))


def processes_to_start() -> int:
    """One for each card of a machine with several; 0 where this process trains by itself or was started together with others."""
    import torch

    cards = 0 if "WORLD_SIZE" in os.environ else torch.cuda.device_count()
    return cards if cards > 1 else 0


def run_processes(count: int, command: Sequence[str]) -> int:
    """Run a command as `count` processes that train together; the exit code of the first that failed, else 0.

    SIGTERM and Ctrl-C are passed on, and the processes end in their own time. When one fails, the others are ended.
    """
    port = _free_port()
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, usable_cpus() // count))
    children: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, _: FrameType | None) -> None:
        for child in children:
            child.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        for rank in range(count):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
            variables = {name: str(value) for name, value in place.items()} | {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": threads}
            # of its own session: Ctrl-C on a terminal reaches a whole group, and would come twice
            children.append(subprocess.Popen(command, env=os.environ | variables, start_new_session=True))
        return _wait(children)
    finally:
        for child in children:
            child.kill()
            child.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def command_of(argv: Sequence[str] | None) -> list[str]:
    """The command line of this step with the same arguments."""
    return [sys.executable, "-m", "components.train", *(sys.argv[1:] if argv is None else argv)]


def _wait(children: Sequence[subprocess.Popen[bytes]]) -> int:
    first, deadline = 0, math.inf
    while time.monotonic() < deadline:
        codes = [child.poll() for child in children]
        first = first or next((code for code in codes if code), 0)
        if None not in codes:
            break
        if first and first not in STOPPED:
            deadline = min(deadline, time.monotonic() + GRACE_S)
        time.sleep(POLL_EVERY_S)
    return first if first >= 0 else 128 - first  # as a shell reports a signal


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
