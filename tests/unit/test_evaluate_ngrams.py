"""N-grams that two texts share, against counting them one by one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from components.evaluate.ngrams import shared_ngrams


def _counted(reference: Sequence[str], answer: Sequence[str], orders: int) -> list[int]:
    def grams(text: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
        return Counter(tuple(text[at : at + order]) for at in range(len(text) - order + 1))

    return [(grams(reference, order) & grams(answer, order)).total() for order in range(1, orders + 1)]


def test_by_hand() -> None:
    """ababa / abab: a and b twice; ab twice, ba once; aba once, bab once; abab once; no five."""
    assert shared_ngrams("ababa", "abab", 5) == [4, 3, 2, 1, 0]
    assert shared_ngrams(["take", "5", "mg"], ["5", "mg", "take"], 2) == [3, 1]


@pytest.mark.parametrize(("reference", "answer"), [("", ""), ("a", ""), ("", "a"), ("a", "b")])
def test_nothing_is_shared(reference: str, answer: str) -> None:
    assert shared_ngrams(reference, answer, 6) == shared_ngrams(list(reference), list(answer), 6) == [0] * 6


@given(st.text("ab高🙂", max_size=30), st.text("ab高🙂", max_size=30), st.integers(1, 6))
def test_it_equals_counting(reference: str, answer: str, orders: int) -> None:
    assert shared_ngrams(reference, answer, orders) == _counted(reference, answer, orders)
    assert shared_ngrams(list(reference), list(answer), orders) == _counted(reference, answer, orders)


def test_many_different_tokens_do_not_overflow() -> None:
    """5,000 different tokens: a number of six digits in that base would need 74 bits."""
    reference = [str(number) for number in range(5000)]
    answer = reference[:2000] + reference[1000:4000]
    assert shared_ngrams(reference, answer, 6) == _counted(reference, answer, 6)
