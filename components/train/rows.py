"""Rows → token ids and mask → batches of similar length. A row is used whole, or dropped and counted; it is never cut."""

from __future__ import annotations

from collections.abc import Sequence
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
SORTED_BATCHES = 64  # batches of similar length are made within so many random rows
LENGTH_NOISE = 0.2  # so that the same rows don't meet in every epoch


class Example(NamedTuple):
    """One training row.

    Attributes:
        ids: token ids (seq,).
        mask: True on the answer and its end-of-turn token (seq,).
    """

    ids: torch.Tensor
    mask: torch.Tensor


class Split(NamedTuple):
    """The usable rows of a split, and the source lines of those that are longer than `max_length`."""

    examples: list[Example]
    dropped_lines: list[int]


class Data(NamedTuple):
    """Both splits, and the digest of the data set they come from."""

    train: Split
    validation: Split
    digest: str


class Batch(NamedTuple):
    """Rows padded on the right: ids, mask and attention, each (batch, seq)."""

    ids: torch.Tensor
    mask: torch.Tensor
    attention: torch.Tensor


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


def encode_splits(rows: Rows, tokenizer: Any, chat: ChatFormat, max_length: int) -> Data:
    """Tokenise both splits, and say how many rows are used.

    Raises:
        DataError: see `encode`.
    """
    data = Data(
        encode(rows.train, tokenizer, chat, max_length, split="train"),
        encode(rows.validation, tokenizer, chat, max_length, split="validation"),
        rows.digest,
    )
    for name, split in (("training", data.train), ("validation", data.validation)):
        lengths = sorted(len(example.ids) for example in split.examples)
        print(f"{name} rows: {len(lengths)}, median {lengths[len(lengths) // 2]} tokens, longest {lengths[-1]}", flush=True)
        if split.dropped_lines:
            shown = ", ".join(map(str, split.dropped_lines[:20])) + (" …" if len(split.dropped_lines) > 20 else "")
            print(
                f"  {len(split.dropped_lines)} rows dropped: longer than --max_length {max_length} tokens; source lines {shown}", flush=True
            )
    return data


def encode(rows: Dataset, tokenizer: Any, chat: ChatFormat, max_length: int, *, split: str) -> Split:
    """Tokenise every row with the chat format, and drop those that are longer than `max_length` tokens.

    Raises:
        DataError: no row is left, or a row has no trainable token.
    """
    import torch

    examples, dropped, shortest = [], [], 0
    for row in rows:
        history = [Message(turn["role"], turn["content"]) for turn in row["history"] or ()]
        ids, mask = chat.example(tokenizer, row["question"], row["answer"], history)
        if not any(mask[1:]):
            raise DataError("a row has no trainable token", where=f"{split} split, line {row['line']}", fix="give the row an answer")
        if len(ids) > max_length:
            dropped.append(row["line"])
            shortest = min(shortest or len(ids), len(ids))
        else:
            examples.append(Example(torch.tensor(ids, dtype=torch.int32), torch.tensor(mask)))
    if not examples:
        raise DataError(
            f"every row of the {split} split is longer than {max_length} tokens", where="--max_length", fix=f"set it to {shortest} or more"
        )
    return Split(examples, dropped)


def batches_of_similar_length(examples: Sequence[Example], batch_size: int, generator: torch.Generator) -> list[list[Example]]:
    """All examples once, in random batches whose rows have about the same length: little padding, and no fixed company."""
    import torch

    order = torch.randperm(len(examples), generator=generator).tolist()
    noise = torch.empty(len(examples)).uniform_(1 - LENGTH_NOISE, 1 + LENGTH_NOISE, generator=generator).tolist()
    batches = []
    for start in range(0, len(order), SORTED_BATCHES * batch_size):
        pool = sorted(order[start : start + SORTED_BATCHES * batch_size], key=lambda index: len(examples[index].ids) * noise[index])
        batches += [[examples[index] for index in pool[at : at + batch_size]] for at in range(0, len(pool), batch_size)]
    return [batches[index] for index in torch.randperm(len(batches), generator=generator).tolist()]


def collate(examples: Sequence[Example], pad_id: int, device: torch.device | str) -> Batch:
    """Pad rows on the right to the longest of them: each result is (batch, seq)."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids = pad_sequence([example.ids.long() for example in examples], batch_first=True, padding_value=pad_id)
    mask = pad_sequence([example.mask for example in examples], batch_first=True, padding_value=False)
    attention = pad_sequence([torch.ones(len(example.ids), dtype=torch.long) for example in examples], batch_first=True)
    return Batch(ids.to(device), mask.to(device), attention.to(device))
