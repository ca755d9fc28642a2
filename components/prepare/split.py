"""Rows → train, validation and test, by question: the same question is never on two sides, and keeps its side when data grows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from operator import itemgetter

from components.common.dataset import SPLITS, Row
from components.common.errors import DataError
from components.prepare.clean import text_key


@dataclass(frozen=True)
class Split:
    """Rows by split.

    Attributes:
        rows: split → its rows, in the file's order.
        groups: split → how many different questions it has.
        moved: questions that changed their side, because a split would have been empty: (question, from, to).
    """

    rows: dict[str, list[Row]]
    groups: dict[str, int]
    moved: list[tuple[str, str, str]]


def split_rows(rows: Iterable[Row], *, validation_fraction: float, test_fraction: float, salt: str, where: str) -> Split:
    """Put every question group on the side that its hash names; `where` names the data in an error.

    Raises:
        DataError: fewer than three different questions.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(group_of(row), []).append(row)
    if len(groups) < len(SPLITS):
        raise DataError(
            f"{len(groups)} different question(s) can't fill {', '.join(SPLITS)}",
            where=where,
            fix="give at least three different questions; hundreds to learn from",
        )
    bounds = {
        "test": (0.0, test_fraction),
        "validation": (test_fraction, test_fraction + validation_fraction),
        "train": (test_fraction + validation_fraction, 1.0),
    }
    positions = {group: position(group, salt) for group in groups}
    sides = {group: next(name for name, (_, end) in bounds.items() if at < end) for group, at in positions.items()}
    moved = []
    for name, (start, end) in bounds.items():
        if name not in sides.values():
            nearest = _nearest_group(positions, sides, start, end)
            moved.append((groups[nearest][0]["question"], sides[nearest], name))
            sides[nearest] = name
    return Split(
        rows={
            name: sorted((row for group in groups if sides[group] == name for row in groups[group]), key=itemgetter("line"))
            for name in SPLITS
        },
        groups={name: sum(side == name for side in sides.values()) for name in SPLITS},
        moved=moved,
    )


def group_of(row: Row) -> str:
    """What keeps rows together: the conversation's first question, without case, white space and punctuation."""
    return text_key(row["history"][0]["content"] if row["history"] else row["question"])


def position(group: str, salt: str) -> float:
    """A group's place in [0, 1): uniform over groups, and the same in every run and on every machine."""
    digest = hashlib.sha256(f"{salt}\n{group}".encode()).digest()
    return (int.from_bytes(digest[:8], "big") >> 11) / 2**53


def _nearest_group(positions: dict[str, float], sides: dict[str, str], start: float, end: float) -> str:
    """The group nearest to [start, end), of those that don't leave their own side empty."""
    counts = {side: list(sides.values()).count(side) for side in SPLITS}
    spare = [group for group, side in sides.items() if counts[side] > 1]
    return min(spare, key=lambda group: max(start - positions[group], positions[group] - end))
