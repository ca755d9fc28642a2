"""Who may ask now: a bounded queue, and an honest word to those who are sent away."""

from __future__ import annotations

import time

from components.serve.problems import Problem

FIRST_GUESS_S = 5.0  # seconds from one answer to the next, until that was measured
SMOOTHING = 0.2  # weight of the newest measurement


class Admission:
    """Counts the questions in the service: `max_concurrency` are answered, `max_queue` more may wait, the rest is refused.

    Used on the event loop only, so nothing is locked.
    """

    def __init__(self, max_concurrency: int, max_queue: int, longest_wait_s: float) -> None:
        self.max_concurrency, self.max_queue, self.longest_wait_s = max_concurrency, max_queue, longest_wait_s
        self.inside = 0
        self._last_answer = 0.0
        self._interval_s: float | None = None

    @property
    def running(self) -> int:
        return min(self.inside, self.max_concurrency)

    @property
    def waiting(self) -> int:
        return self.inside - self.running

    def enter(self) -> None:
        """Count one question in, or raise the Problem that says when to come back."""
        if self.inside >= self.max_concurrency + self.max_queue:
            raise Problem("queue-full", retry_after_s=self.drain_time_s())
        if self.inside == 0:
            self._last_answer = time.monotonic()  # idle time says nothing about the speed
        self.inside += 1

    def leave(self, *, answered: bool) -> None:
        """Count one question out; an answered one tells how fast the queue moves."""
        self.inside -= 1
        if answered:
            now = time.monotonic()
            interval_s = now - self._last_answer
            former_s = interval_s if self._interval_s is None else self._interval_s
            self._interval_s = (1 - SMOOTHING) * former_s + SMOOTHING * interval_s
            self._last_answer = now

    def drain_time_s(self) -> float:
        """How long until all that are inside now are answered, by the measured rate; at most one request's time limit."""
        interval_s = FIRST_GUESS_S if self._interval_s is None else self._interval_s
        return min(self.inside * interval_s, self.longest_wait_s)
