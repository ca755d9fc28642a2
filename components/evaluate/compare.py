"""How much better or worse one model is than another on the same rows, with an interval: no difference is shown without one.

Source: the paired percentile bootstrap, Efron & Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13; for language
models, Koehn, "Statistical Significance Tests for Machine Translation Evaluation", 2004.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

RESAMPLES = 10_000
_BLOCK = 4_000_000  # row indices drawn at a time: 32 MB


class Interval(NamedTuple):
    """A mean difference and the ends of its interval; NaN in all three when a difference was not finite."""

    mean: float
    low: float
    high: float


def paired_interval(tuned: Sequence[float], base: Sequence[float], *, confidence: float, seed: int) -> Interval:
    """The mean of tuned − base over the rows, with its percentile bootstrap interval.

    The same seed draws the same rows for every metric. With few rows the interval is narrower than its confidence says.

    Args:
        tuned, base: one value per row, in the same order.
        confidence: such as 0.95.
    """
    import numpy as np

    differences = np.asarray(tuned, dtype=np.float64) - np.asarray(base, dtype=np.float64)
    if not np.isfinite(differences).all():
        return Interval(math.nan, math.nan, math.nan)
    generator = np.random.default_rng(seed)
    rows = len(differences)
    means: list[float] = []
    while len(means) < RESAMPLES:
        count = min(RESAMPLES - len(means), max(1, _BLOCK // rows))
        means += differences[generator.integers(0, rows, size=(count, rows))].mean(axis=1).tolist()
    tail = 50 * (1 - confidence)
    low, high = np.percentile(means, [tail, 100 - tail])
    return Interval(float(differences.mean()), float(low), float(high))
