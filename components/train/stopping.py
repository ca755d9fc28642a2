"""Stop between two steps when asked: a pod that is evicted, or Ctrl-C, ends a run that can go on later."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Any


class Stopped(Exception):  # noqa: N818  not an error: the run can go on
    """A signal stopped the run between two steps.

    Attributes:
        exit_code: 128 + the signal's number, as a shell reports it; Kubeflow Pipelines retries on any code but 0.
    """

    def __init__(self, step: int, signal_number: int = signal.SIGTERM, *, saved: bool = True) -> None:
        goes_on = "run the same command again to go on" if saved else "no checkpoint of this step is stored"
        super().__init__(f"stopped after step {step}; {goes_on}")
        self.exit_code = 128 + signal_number


class StopSignal:
    """While active, SIGTERM and Ctrl-C ask to stop (`asked`); the second of them interrupts at once, as KeyboardInterrupt.

    Only the main thread can use it.
    """

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[int, Any] = {}

    @property
    def asked(self) -> bool:
        """Whether a signal came; `number` is the first one's."""
        return self.number != 0

    def __enter__(self) -> StopSignal:
        self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.number = number
        # print() may be in the middle of a line of its own
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, b"asked to stop: after this step; once more stops at once\n")
