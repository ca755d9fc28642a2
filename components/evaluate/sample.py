"""Which held-out rows are evaluated: all of them, or a seeded sample in which every kind of row keeps its share.

A row's stratum is its `topic`, where the split has such a column; else the language of its reference answer and the third of that
language's rows in which the answer's length lies: "chinese, short", "english, long".
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from components.evaluate.rouge import is_chinese

if TYPE_CHECKING:
    from datasets import Dataset

StratifiedBy = Literal["topic", "language and length"]

TOPIC = "topic"
NO_TOPIC = "–"
_LENGTHS = ("short", "medium", "long")


def strata_of(split: Dataset) -> tuple[StratifiedBy, list[str]]:
    """What the strata are, and the stratum of each row."""
    if TOPIC in split.column_names and any(split[TOPIC]):
        return "topic", [str(topic or NO_TOPIC) for topic in split[TOPIC]]
    languages, lengths = [], []
    for answer in split["answer"]:
        languages.append("chinese" if is_chinese(answer) else "english")
        lengths.append(len(answer))
    strata = [""] * len(lengths)
    for language in sorted(set(languages)):
        rows = [row for row, one in enumerate(languages) if one == language]
        rows.sort(key=lengths.__getitem__)  # equal lengths stay in the order of the data
        for rank, row in enumerate(rows):
            strata[row] = f"{language}, {_LENGTHS[rank * 3 // len(rows)]}"
    return "language and length", strata


def stratified_indices(strata: Sequence[str], sample_size: int, seed: int) -> list[int]:
    """Positions of the rows to use, in their order in the data; all of them for `sample_size` 0 or more than there are.

    Every stratum gets its share of the sample, rounded down; what is left goes to the largest remainders (Hamilton's method).
    """
    if sample_size == 0 or sample_size >= len(strata):
        return list(range(len(strata)))
    members: dict[str, list[int]] = {}
    for row, name in enumerate(strata):
        members.setdefault(name, []).append(row)
    quotas = {name: divmod(sample_size * len(rows), len(strata)) for name, rows in members.items()}
    by_remainder = sorted(members, key=lambda name: (-quotas[name][1], name))
    one_more = set(by_remainder[: sample_size - sum(whole for whole, _ in quotas.values())])
    chosen: list[int] = []
    for name, rows in members.items():
        chosen += random.Random(f"{seed} {name}").sample(rows, quotas[name][0] + (name in one_more))
    return sorted(chosen)


def sample_indices(rows: int, sample_size: int, seed: int) -> list[int]:
    """The same for rows that are all of one kind."""
    return stratified_indices([""] * rows, sample_size, seed)
