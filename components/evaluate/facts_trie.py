"""Finds many words in a text at once: at each place the longest."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

NOTHING = "(?!)"


class Words:
    """A list of words, normalised and in lower case, in Chinese and English.

    A word that begins or ends with a Latin letter or a digit is not found inside a longer one (can in cancer), but with a plural s it is.
    """

    def __init__(self, words: Iterable[str]) -> None:
        self._words = set(words)
        latin = [word for word in self._words if word[0].isascii()]
        chinese: dict[str, list[str]] = {}
        for word in self._words.difference(latin):
            chinese.setdefault(word[0], []).append(word)
        self._latin = re.compile(_trie(latin, r"(?<![a-z\d].)") or NOTHING)
        # One pattern for each of hundreds of first letters: a single one would try them all at every place.
        self._first = re.compile(f"[{''.join(map(re.escape, chinese))}]") if chinese else None
        self._chinese = {first: re.compile(_trie(own)) for first, own in chinese.items()}

    def replace(self, text: str, by: Callable[[str], str]) -> str:
        """A text in which `by` of each word found takes its place."""

        def plural(match: re.Match[str]) -> str:
            return by(match[0] if match[0] in self._words else match[0][:-1])

        # Latin first: 2型糖尿病 and HPV疫苗 begin with a digit or a Latin letter, and have a Chinese word in them.
        text = self._latin.sub(plural, text)
        if self._first is None:
            return text
        pieces, end = [], 0
        for first in self._first.finditer(text):
            start = first.start()
            if start >= end and (match := self._chinese[first[0]].match(text, start)):
                pieces += [text[end:start], plural(match)]
                end = match.end()
        return "".join(pieces) + text[end:]


def _trie(words: Iterable[str], after_first: str = "") -> str:
    """One pattern of many words that doesn't try them one by one.

    `after_first` looks back from behind the first letter: a pattern that begins with plain letters is searched several times as fast.
    """
    root: dict[str, Any] = {}
    for word in words:
        node = root
        for letter in word:
            node = node.setdefault(letter, {})
        node[""] = {}
    return "|".join(re.escape(letter) + after_first + _alternatives(child, letter) for letter, child in root.items())


def _alternatives(node: dict[str, Any], last: str) -> str:
    branches = [re.escape(letter) + _alternatives(child, letter) for letter, child in node.items() if letter]
    if "" not in node:
        return branches[0] if len(branches) == 1 else f"(?:{'|'.join(branches)})"
    end = "s?(?![a-z])" if last.isascii() and last.isalpha() else r"(?!\d)" if last.isdecimal() else ""
    return f"(?:{'|'.join([*branches, end])})" if branches or end else ""
