"""The held-out rows of an evaluation, tokenised once: both models get the same token ids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.common.chat import ChatFormat, Message
from components.common.dataset import Row, load_split
from components.common.errors import DataError
from components.evaluate.leakage import leaked_lines
from components.evaluate.sample import StratifiedBy, strata_of, stratified_indices

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class HeldOutRow:
    """One question with its reference answer, and the token ids of the whole.

    Attributes:
        line: row number in the source file, from 1.
        ids: the conversation, the question, the reference answer and the end of its turn.
        is_answer: True on the tokens of the answer and the end of its turn.
        stratum: the kind of row, of which a sample has its share.
    """

    line: int
    question: str
    reference: str
    history: tuple[Message, ...]
    ids: list[int]
    is_answer: list[bool]
    stratum: str = ""

    @property
    def prompt_ids(self) -> list[int]:
        """The conversation up to where the answer begins."""
        return self.ids[: self.is_answer.index(True)]


@dataclass(frozen=True)
class HeldOut:
    """The rows to evaluate, and what is to be said about them.

    Attributes:
        available: rows of the split before sampling.
        too_long: lines of rows left out because the model's context can't hold them.
        leaked: lines of rows whose question is in the training split; None without a training split to compare with.
        stratified_by: what the strata of the rows are.
    """

    rows: list[HeldOutRow]
    available: int
    too_long: list[int]
    leaked: list[int] | None
    stratified_by: StratifiedBy = "language and length"


def load_held_out(
    dataset: Path,
    split: Dataset,
    *,
    tokenizer: Any,
    chat: ChatFormat,
    sample_size: int,
    seed: int,
    context_tokens: int,
    max_new_tokens: int,
) -> HeldOut:
    """Sample and tokenise the test split, and compare its questions with the training split's.

    Args:
        dataset: a data set folder, or a plain `.jsonl` file, which has no training split.
        split: the test split, or all rows of the file.
        context_tokens: what the model can hold, prompt and answer together.

    Raises:
        DataError: every row is too long.
    """
    stratified_by, strata = strata_of(split)
    indices = stratified_indices(strata, sample_size, seed)
    chosen = zip(_rows(split.select(indices)), [strata[index] for index in indices], strict=True)
    rows, too_long = _tokenised(chosen, tokenizer, chat, context_tokens, max_new_tokens)
    if not rows:
        raise DataError(
            f"no row fits the model's context of {context_tokens} tokens with an answer of {max_new_tokens}",
            where=str(dataset),
            fix="lower --max_new_tokens, or shorten the rows",
        )
    leaked = None
    if dataset.is_dir() and (dataset / "train.parquet").exists():
        leaked = leaked_lines(_rows(load_split(dataset, "train")), _rows(split))
    return HeldOut(rows, len(split), too_long, leaked, stratified_by)


def _rows(split: Iterable[Any]) -> Iterator[Row]:
    for row in split:
        yield Row(question=row["question"], answer=row["answer"], history=row["history"] or [], line=row["line"])


def _tokenised(
    rows: Iterable[tuple[Row, str]], tokenizer: Any, chat: ChatFormat, context_tokens: int, max_new_tokens: int
) -> tuple[list[HeldOutRow], list[int]]:
    kept, too_long = [], []
    for row, stratum in rows:
        history = tuple(Message(**turn) for turn in row["history"])
        ids, is_answer = chat.example(tokenizer, row["question"], row["answer"], history)
        if max(len(ids), is_answer.index(True) + max_new_tokens) > context_tokens:
            too_long.append(row["line"])
        else:
            kept.append(HeldOutRow(row["line"], row["question"], row["answer"], history, ids, is_answer, stratum))
    return kept, too_long
