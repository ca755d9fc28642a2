"""Marks: one private-use character in a text for each thing that was read there."""

from __future__ import annotations

from typing import Any

FIRST_MARK = "\U000f0000"
MARKS = "\U000f0000-\U000ffffd"
_MOST = 0xFFFD


class Marks:
    """What was read in one text, with its words, each under a character of its own: the text keeps the character in its place."""

    def __init__(self) -> None:
        self._things: list[tuple[Any, str]] = []

    def add(self, thing: tuple[Any, str]) -> str:
        """The character that now stands for `thing`; nothing after 65,533 of them."""
        if len(self._things) >= _MOST:
            return ""
        self._things.append(thing)
        return chr(ord(FIRST_MARK) + len(self._things) - 1)

    def __getitem__(self, character: str) -> tuple[Any, str]:
        return self._things[ord(character) - ord(FIRST_MARK)]
