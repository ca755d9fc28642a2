"""How long answers are, in characters and tokens, and against their references.

Range 0 upwards; neither direction is better by itself. Tokenizer: the tuned model's, for every text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

PERCENTILES = (5, 10, 25, 75, 90, 95)


def length_statistics(characters: Sequence[int], tokens: Sequence[int], reference_characters: Sequence[int]) -> dict[str, Any]:
    """Mean, median and percentiles of the lengths, and the median of the rows' ratios to the reference.

    Args:
        characters: length of each answer, characters.
        tokens: length of each answer, tokens.
        reference_characters: length of each row's reference, characters.
    """
    import numpy as np

    ratios = [own / reference for own, reference in zip(characters, reference_characters, strict=True) if reference]
    return {
        "characters": _summary(characters),
        "tokens": _summary(tokens),
        "ratio_to_reference": round(float(np.median(ratios)), 4) if ratios else None,
    }


def _summary(lengths: Sequence[int]) -> dict[str, float]:
    import numpy as np

    summary = {"mean": float(np.mean(lengths)), "median": float(np.median(lengths))}
    summary |= {f"p{rank}": float(value) for rank, value in zip(PERCENTILES, np.percentile(lengths, PERCENTILES), strict=True)}
    return {name: round(value, 2) for name, value in summary.items()}
