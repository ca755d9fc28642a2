"""Which held-out rows are evaluated."""

from __future__ import annotations

import random


def sample_indices(rows: int, sample_size: int, seed: int) -> list[int]:
    """Positions of the rows to use, in their order in the data; all of them for `sample_size` 0 or more than there are."""
    if sample_size == 0 or sample_size >= rows:
        return list(range(rows))
    return sorted(random.Random(seed).sample(range(rows), sample_size))
