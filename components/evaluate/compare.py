"""How much better or worse one model is than another on the same rows, with an interval: no difference is shown without one.

Source: the paired percentile bootstrap, Efron & Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13; for language
models, Koehn, "Statistical Significance Tests for Machine Translation Evaluation", 2004. Right or wrong on the same questions: the exact
test of McNemar, "Note on the sampling error of the difference between correlated proportions", 1947. A single share: Wilson, "Probable
inference, the law of succession, and statistical inference", 1927.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

RESAMPLES = 10_000
_BLOCK = 4_000_000  # row indices drawn at a time: 32 MB


class Interval(NamedTuple):
    """A mean (of values, differences or a share) and the ends of its interval; NaN in all three when a value was not finite."""

    mean: float
    low: float
    high: float


class McNemar(NamedTuple):
    """Questions that only one of two models got right, and how likely a split at least so uneven is between equal models."""

    only_a: int
    only_b: int
    p_value: float


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


def mean_interval(values: Sequence[float], *, confidence: float, seed: int) -> Interval:
    """The mean of one model's values over the rows, with its percentile bootstrap interval."""
    return paired_interval(values, [0.0] * len(values), confidence=confidence, seed=seed)


def mcnemar(right_a: Sequence[bool], right_b: Sequence[bool]) -> McNemar:
    """The exact two-sided McNemar test: the questions on which two models differ, against a fair coin.

    Args:
        right_a, right_b: one value per question, in the same order.
    """
    pairs = [(bool(a), bool(b)) for a, b in zip(right_a, right_b, strict=True)]
    only_a, only_b = pairs.count((True, False)), pairs.count((False, True))
    term = tail = 1  # binomial coefficients: the sum up to the smaller count
    for k in range(min(only_a, only_b)):
        term = term * (only_a + only_b - k) // (k + 1)
        tail += term
    return McNemar(only_a, only_b, min(1.0, 2 * tail / 2 ** (only_a + only_b)))


def wilson_interval(right: float, total: int, *, confidence: float) -> Interval:
    """A share with its Wilson score interval, which stays within 0 and 1 and fits few or extreme values.

    Args:
        right: how many of `total` are right; questions that were right in some of their orders count in part.
    """
    share = right / total
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    centre = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half))
