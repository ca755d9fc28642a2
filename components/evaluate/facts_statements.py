"""What a text permits, requires, forbids or denies, and directions (before meals, raised, positive): the words that flip a sentence.

Each such word (`lexicons/statements.txt`) is replaced by a mark, so that what reads on compares two sentences without them: 可以服用 and
不宜服用 are then equal. Words that only look like one (功能, 主要, 不良反应, 特别, 能不能) are left alone.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from components.evaluate.facts_marks import Marks
from components.evaluate.facts_trie import Words

Stance = Literal["required", "allowed", "caution", "unneeded", "forbidden", "denied"]

FILE = Path(__file__).with_name("lexicons") / "statements.txt"

# Both of a pair cannot hold of the same thing. 应当 and 可以 differ in strength only, 不必 and 不要 too: no agreement, no contradiction.
OPPOSED = frozenset(
    frozenset(pair)
    for pair in (
        ("required", "forbidden"), ("required", "unneeded"), ("required", "denied"), ("required", "caution"),
        ("allowed", "forbidden"), ("allowed", "denied"), ("allowed", "caution"), ("caution", "forbidden"),
    )
)  # fmt: skip
NEGATIVE = frozenset({"caution", "unneeded", "forbidden", "denied"})

# Two such words in a row are one: 应+避免 forbids, 不+禁忌 allows. None: neither; for a pair that is not here, the second counts.
TOGETHER: dict[tuple[Stance, Stance], Stance | None] = {
    ("allowed", "denied"): "unneeded",
    ("allowed", "required"): "required",
    ("required", "allowed"): "required",
    ("required", "denied"): "forbidden",
    ("denied", "required"): "unneeded",
    ("denied", "allowed"): "forbidden",
    ("denied", "forbidden"): "allowed",
    ("denied", "denied"): None,
    ("forbidden", "denied"): "required",
    ("forbidden", "forbidden"): "allowed",
    ("forbidden", "required"): "forbidden",
    ("forbidden", "allowed"): "forbidden",
    ("unneeded", "forbidden"): "allowed",
    ("unneeded", "required"): "unneeded",
}


class Statement(NamedTuple):
    """A word of permission, requirement, prohibition or denial."""

    stance: Stance


class Direction(NamedTuple):
    """One pole of an axis: "before" of "meals"."""

    axis: str
    pole: str

    @property
    def token(self) -> str:
        """What stands for the direction among the tokens of a clause."""
        return f"{self.axis} {self.pole}"


@cache
def _vocabulary() -> tuple[dict[str, tuple[Statement | Direction | None, str]], Words]:
    """What each word says, None for nothing, and the part of it that stays in the text."""
    lines: dict[str, list[str]] = {}
    for line in FILE.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, *words = (part.strip() for part in line.split("|"))
            lines.setdefault(name, []).extend(words)
    actions = lines.pop("action")
    before = lines.pop("allowed to")
    says: dict[str, tuple[Statement | Direction | None, str]] = {}
    for word in before:
        blanks = (" ", " be ", " safely ", " be safely ") if word.isascii() else ("",)
        allowed = {f"{word}{blank}{action}": (Statement("allowed"), action) for blank in blanks for action in actions}
        says |= {phrase: said for phrase, said in allowed.items() if phrase.isascii() == word.isascii()}
    for name, words in lines.items():
        axis, _, pole = name.partition(" ")
        said = Direction(axis, pole) if pole else Statement(name) if name in get_args(Stance) else None  # type: ignore[arg-type]
        says |= {word: (said, "" if said else word) for word in words}
    return says, Words(says)


def mark_statements(text: str, marks: Marks) -> str:
    """A normalised text, its entities and quantities marked already, with each of these words replaced by its mark."""
    says, words = _vocabulary()

    def marked(word: str) -> str:
        said, rest = says[word]
        if said is None:
            return rest
        mark = marks.add((said, word.removesuffix(rest).strip()))
        return f" {mark} {rest}" if word.isascii() else mark + rest

    return words.replace(text, marked)


def together(first: Stance, second: Stance) -> Stance | None:
    """What two such words in a row say; None when they cancel out."""
    return TOGETHER.get((first, second), second)
