"""Whether held-out questions were trained on: a model that saw the exam proves nothing by passing it."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable

from components.common.dataset import Row
from components.common.files import sha256_text


def question_digest(row: Row) -> str:
    """The sha256 of a conversation's first question without what does not change it: case, width, white space and punctuation."""
    question = row["history"][0]["content"] if row["history"] else row["question"]
    text = unicodedata.normalize("NFKC", question).casefold()
    return sha256_text("".join(character for character in text if character.isalnum()) or text)


def leaked_lines(train: Iterable[Row], held_out: Iterable[Row]) -> list[int]:
    """Lines of the held-out rows whose question is in the training split too."""
    trained = {question_digest(row) for row in train}
    return [row["line"] for row in held_out if question_digest(row) in trained]
