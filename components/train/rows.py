"""Rows → token ids and mask. A row is used whole, or dropped and counted; it is never cut (d02)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from components.common.chat import ChatFormat, Message, clean
from components.common.dataset import load_split, read_info
from components.common.errors import DataError
from components.common.files import sha256_text

if TYPE_CHECKING:
    import torch
    from datasets import Dataset

HELD_OUT_SHARE = 0.1  # of the questions of a plain .jsonl file
SHOWN_LINES = 20


class Example(NamedTuple):
    """One training row.

    Attributes:
        ids: token ids (seq,).
        mask: True on the answer and its end-of-turn token (seq,).
        line: the row's number in the source file, from 1.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    line: int


class Split(NamedTuple):
    """The usable rows of a split, and the source lines of those that are longer than `max_length`."""

    examples: list[Example]
    dropped_lines: list[int]


class Data(NamedTuple):
    """Both splits, and the digest of the data set they come from."""

    train: Split
    validation: Split
    digest: str


class Rows(NamedTuple):
    """The rows of both splits as text, and the digest of the data set they come from."""

    train: Dataset
    validation: Dataset
    digest: str


def read_splits(dataset: Path) -> Rows:
    """Training and validation rows; a plain file gives a tenth of its questions, chosen by their hash, to validation.

    Raises:
        DataError: missing, broken, or too few rows for both.
    """
    rows, digest = load_split(dataset, "train"), read_info(dataset)["digest"]
    if not dataset.is_file():
        return Rows(rows, load_split(dataset, "validation"), digest)
    places = [int(sha256_text(clean(question))[:8], 16) / 2**32 for question in rows["question"]]
    border = max(HELD_OUT_SHARE, min(places) + 2**-33)  # at least one question
    validation = [index for index, place in enumerate(places) if place < border]
    train = [index for index, place in enumerate(places) if place >= border]
    if not train:
        raise DataError("too few different questions to hold some out for validation", where=str(dataset), fix="give more rows")
    return Rows(rows.select(train), rows.select(validation), digest)


def encode_splits(rows: Rows, tokenizer: Any, chat: ChatFormat) -> Data:
    """Tokenise both splits, whole.

    Raises:
        DataError: see `encode`.
    """
    train, validation = (
        encode(split, tokenizer, chat, split=name) for name, split in (("train", rows.train), ("validation", rows.validation))
    )
    return Data(train, validation, rows.digest)


def encode(rows: Dataset, tokenizer: Any, chat: ChatFormat, *, split: str) -> Split:
    """Tokenise every row with the chat format.

    Raises:
        DataError: a row has no trainable token.
    """
    import torch

    examples = []
    for row in rows:
        history = [Message(turn["role"], turn["content"]) for turn in row["history"] or ()]
        ids, mask = chat.example(tokenizer, row["question"], row["answer"], history)
        if not any(mask[1:]):
            raise DataError("a row has no trainable token", where=f"{split} split, line {row['line']}", fix="give the row an answer")
        examples.append(Example(torch.tensor(ids, dtype=torch.int32), torch.tensor(mask), row["line"]))
    return Split(examples, [])


def within(data: Data, max_length: int) -> Data:
    """The rows of at most `max_length` tokens; longer ones are dropped and counted, and the program says how many.

    Raises:
        DataError: no row of a split is left.
    """
    return Data(_within(data.train, max_length, "training"), _within(data.validation, max_length, "validation"), data.digest)


def _within(split: Split, max_length: int, name: str) -> Split:
    kept = [example for example in split.examples if len(example.ids) <= max_length]
    dropped = [example.line for example in split.examples if len(example.ids) > max_length]
    if not kept:
        shortest = min(len(example.ids) for example in split.examples)
        raise DataError(f"every {name} row is longer than {max_length} tokens", where="--max_length", fix=f"set it to {shortest} or more")
    lengths = sorted(len(example.ids) for example in kept)
    print(f"{name} rows: {len(lengths)}, median {lengths[len(lengths) // 2]} tokens, longest {lengths[-1]}", flush=True)
    if dropped:
        shown = ", ".join(map(str, dropped[:SHOWN_LINES])) + (" …" if len(dropped) > SHOWN_LINES else "")
        print(f"  {len(dropped)} rows dropped: longer than max_length {max_length} tokens; source lines {shown}", flush=True)
    return Split(kept, dropped)
