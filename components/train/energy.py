"""The energy that the GPUs of a run took, from the power that their own sensors tell."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable

from components.common.errors import first_line

JOULES_A_WH = 3600.0


class EnergyMeter:
    """Adds power over time; between two readings the power is taken as their mean (the trapezoidal rule).

    Args:
        read_power: watts of all devices together, right now; None where no device tells.
        note: why none tells, or what is left out.
        clock: seconds.
    """

    def __init__(self, read_power: Callable[[], float] | None, note: str = "", clock: Callable[[], float] = time.monotonic) -> None:
        self._read_power, self.note, self._clock = read_power, note, clock
        self._joules = 0.0
        self._last: tuple[float, float] | None = None
        self.sample()

    @classmethod
    def of_devices(cls, count: int) -> EnergyMeter:
        """A meter of the first `count` GPUs, as far as this machine has them."""
        import torch

        if not torch.cuda.is_available():
            return cls(None, "a CPU tells no power here")
        here = min(count, torch.cuda.device_count())

        def read_power() -> float:
            return sum(torch.cuda.power_draw(index) for index in range(here)) / 1000  # the sensor counts milliwatts

        return cls(read_power, "" if here == count else f"of the {here} GPUs of this machine, not of all {count}")

    def sample(self) -> None:
        """Read the power; call it often. A sensor that fails ends the counting, never the training."""
        if self._read_power is None:
            return
        try:
            now, watts = self._clock(), self._read_power()
        except _sensor_errors() as error:
            self._read_power, self.note = None, f"the power can't be read: {first_line(error)}"
            return
        if self._last:
            before, watts_before = self._last
            self._joules += (now - before) * (watts_before + watts) / 2
        self._last = (now, watts)

    @property
    def wh(self) -> float | None:
        """Watt-hours so far; None where no device tells."""
        return self._joules / JOULES_A_WH if self._read_power else None


def _sensor_errors() -> tuple[type[Exception], ...]:
    """What reading the power raises: without the package nvidia-ml-py, and on a card that keeps its power to itself."""
    if importlib.util.find_spec("pynvml") is None:
        return (ModuleNotFoundError, RuntimeError)
    from pynvml import NVMLError

    return (NVMLError, RuntimeError)
