"""How many n-grams two texts share: what ROUGE-N, BLEU and chrF are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

_LARGEST = 2**62


def shared_ngrams(reference: Sequence[str], answer: Sequence[str], orders: int) -> list[int]:
    """For each order from 1 to `orders`: the n-grams of both texts, each counted as often as in the text that has it less often.

    A text is a list of tokens, or a string for the n-grams of its characters. Every n-gram is one whole number: its tokens' numbers are
    the digits, its order the last one. So sorting and counting all orders of a text is one call of NumPy.
    """
    tokens = _numbered(reference, answer)
    different, length = int(tokens.max(initial=0)) + 1, len(reference)
    grams, bound = tokens, different
    ours, theirs = [], []
    for order in range(orders):
        if order:
            if bound * different * orders >= _LARGEST:
                grams = np.unique(grams, return_inverse=True)[1]
                bound = len(grams)
            grams, bound = grams[:-1] * different + tokens[order:], bound * different
        marked = grams * orders + order
        ours.append(marked[: max(length - order, 0)])
        theirs.append(marked[length:])
    own, own_counts = np.unique(np.concatenate(ours), return_counts=True)
    other, other_counts = np.unique(np.concatenate(theirs), return_counts=True)
    if not len(own):
        return [0] * orders
    at = np.minimum(np.searchsorted(own, other), len(own) - 1)
    both = own[at] == other
    shared = np.minimum(own_counts[at[both]], other_counts[both])
    return [int(number) for number in np.bincount(other[both] % orders, shared, orders)]


def _numbered(reference: Sequence[str], answer: Sequence[str]) -> Any:
    """A number for each token of both texts, one after the other; equal tokens have equal numbers, without gaps."""
    if isinstance(reference, str) and isinstance(answer, str):
        letters = np.frombuffer((reference + answer).encode("utf-32-le", "surrogatepass"), "<u4")
        return np.unique(letters, return_inverse=True)[1]
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(token, len(numbers)) for text in (reference, answer) for token in text], dtype=np.int64)
