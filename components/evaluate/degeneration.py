"""Signs of an answer that went wrong, whatever its content: loops, no end, a copy of the question, nothing, another language.

Range 0–1 for every metric, lower is better; each but `repeated_4grams` is 0 or 1 per answer, so its mean is a share of answers.
Tokenizer: that of ROUGE for Chinese (`rouge.characters`), in every language, so that one threshold fits both.
Source: repeated n-grams as in Welleck et al., "Neural Text Generation with Unlikelihood Training", 2020 (seq-rep-4).
"""

from __future__ import annotations

import re
from functools import lru_cache

from components.evaluate.rouge import HAN, characters

LOOP_FROM = 0.3  # share of repeated 4-grams from which an answer counts as a loop
COPY_FROM = 0.5  # share of an answer's 4-grams that the question has, from which the answer counts as a copy

_WORDS = re.compile(rf"([{HAN}])|(?:(?![{HAN}])[^\W\d_])+")


def degeneration(question: str, answer: str, finish_reason: str) -> dict[str, float]:
    """`repeated_4grams`, `degenerate`, `never_stopped`, `copies_question`, `empty` and `wrong_language` of one answer.

    Args:
        finish_reason: "stop" when the model ended the answer by itself.
    """
    repeated = repeated_4grams(answer)
    return {
        "repeated_4grams": repeated,
        "degenerate": float(repeated >= LOOP_FROM),
        "never_stopped": float(finish_reason != "stop"),
        "copies_question": float(copies_question(question, answer)),
        "empty": float(not answer.strip()),
        "wrong_language": float(_is_chinese(answer) not in (None, _is_chinese(question))),
    }


def repeated_4grams(text: str) -> float:
    """1 − different 4-grams / all 4-grams; 0 for a text of fewer than 4 tokens."""
    grams = _4grams(text)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def copies_question(question: str, answer: str) -> bool:
    """Whether an answer says little but the question again."""
    grams = _4grams(answer)
    if not grams:
        return bool(answer.strip()) and characters(answer) == characters(question)
    known = set(_4grams(question))
    return sum(map(known.__contains__, grams)) >= COPY_FROM * len(grams)


def chinese_share(text: str) -> float | None:
    """Chinese characters / (Chinese characters + words in other scripts); None for a text without letters."""
    found = _WORDS.findall(text)  # each character, and "" for each word
    return 1 - found.count("") / len(found) if found else None


def _is_chinese(text: str) -> bool | None:
    share = chinese_share(text)
    return None if share is None else share >= 0.5


@lru_cache(maxsize=8)  # two metrics look at an answer's, and the answers of several models share a question
def _4grams(text: str) -> list[tuple[str, ...]]:
    tokens = characters(text)
    return list(zip(tokens, tokens[1:], tokens[2:], tokens[3:], strict=False))
