"""SIGTERM and SIGINT end a training after the step that is running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from components.common.errors import EXIT_INTERRUPTED
from components.train.stopping import Stopped, StopSignal

PROJECT = Path(__file__).resolve().parents[2]

WAIT_FOR_SIGNAL = """
import sys, time
from components.common.errors import run_command
from components.train.stopping import Stopped, StopSignal

def main():
    try:
        with StopSignal() as stop:
            for step in range(1, 1000):
                print(step, flush=True)
                time.sleep(float(sys.argv[1]))
                if stop.asked:
                    raise Stopped(step, stop.number)
    except Stopped as stopped:
        print(stopped, flush=True)
        return stopped.exit_code

run_command(main)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_after_the_step(number: int, code: int) -> None:
    with subprocess.Popen([sys.executable, "-c", WAIT_FOR_SIGNAL, "0.2"], cwd=PROJECT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "1\n"
        process.send_signal(number)
        assert process.stdout.read() == "stopped after step 1; run the same command again to go on\n"
    assert process.returncode == code


def test_a_second_signal_stops_at_once() -> None:
    arguments = [sys.executable, "-c", WAIT_FOR_SIGNAL, "60"]
    with subprocess.Popen(arguments, cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None and process.stdout.readline() == "1\n"
        process.send_signal(signal.SIGTERM)
        assert "once more stops at once" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == EXIT_INTERRUPTED


def test_the_handlers_from_before_come_back() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(Stopped, match="after step 3; no checkpoint"), StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked and stop.number == signal.SIGTERM
        raise Stopped(3, saved=False)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
