"""Finds many words in a text at once: at each place the longest."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any


class Words:
    """A list of words, normalised and in lower case, in Chinese and English.

    A word that begins or ends with a Latin letter or a digit is not found inside a longer one (can in cancer), but with a plural s it is.
    """

    def __init__(self, words: Iterable[str]) -> None:
        self._words = set(words)
        latin = [word for word in self._words if word[0].isascii()]
        chinese = [word for word in self._words if not word[0].isascii()]
        # Latin first: 2型糖尿病 and HPV疫苗 begin with a digit or a Latin letter, and have a Chinese word in them.
        self._patterns = [re.compile(pattern) for pattern in (_trie(latin, r"(?<![a-z\d].)"), _trie(chinese)) if pattern]

    def replace(self, text: str, by: Callable[[str], str]) -> str:
        """A text in which `by` of each word found takes its place."""

        def plural(match: re.Match[str]) -> str:
            return by(match[0] if match[0] in self._words else match[0][:-1])

        for pattern in self._patterns:
            text = pattern.sub(plural, text)
        return text


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
