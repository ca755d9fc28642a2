"""Show one training row as the model sees it: every token, and which of them it learns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console
from rich.text import Text

from components.common.chat import ChatFormat, Message
from components.common.errors import DataError
from components.train.config import TrainSettings
from components.train.rows import Rows, read_splits

if TYPE_CHECKING:
    from datasets import Dataset

# Two shades in turn, so that one sees where a token ends.
NOT_TRAINED = ("bright_black", "grey70")
TRAINED = ("green", "bright_green")
SPECIAL = "cyan"
END_OF_TURN = "bold black on green"
OPEN, CLOSE = "⟦", "⟧"  # around what is trained, where there are no colours
UNFINISHED = "\ufffd"


class Piece(NamedTuple):
    """Neighbouring tokens that together are whole characters: Chinese ones are often cut into several tokens."""

    ids: tuple[int, ...]
    text: str
    trained: bool


def show(settings: TrainSettings, base: Path) -> None:
    """Print the row of `settings.show_row` and what becomes of it; the model itself is not loaded.

    Raises:
        DataError: no training or validation row comes from that line. ModelError: the base has no usable tokenizer.
    """
    from components.common.loading import load_tokenizer

    rows = read_splits(settings.dataset)
    split, row = find_row(rows, settings.show_row, str(settings.dataset))
    tokenizer = load_tokenizer(base)
    chat = ChatFormat.of_tokenizer(tokenizer, settings.system_prompt)
    history = [Message(turn["role"], turn["content"]) for turn in row["history"] or ()]
    ids, mask = chat.example(tokenizer, row["question"], row["answer"], history)
    console = Console(soft_wrap=True, highlight=False)
    console.print(f"line {settings.show_row}, {split} split", style="bold")
    show_row(console, tokenizer, ids, mask, chat.end_of_turn_id)
    console.print(verdict(len(ids), settings.max_length))


def find_row(rows: Rows, line: int, where: str) -> tuple[str, dict[str, Any]]:
    """The row that comes from a line of the source file, and the name of its split.

    Raises:
        DataError: neither split has it.
    """
    splits = (("training", rows.train), ("validation", rows.validation))
    for name, split in splits:
        lines = split["line"]
        if line in lines:
            return name, split[list(lines).index(line)]
    ranges = "; ".join(f"{name}: {_range(split)}" for name, split in splits)
    raise DataError(
        f"no training or validation row comes from source line {line}; it may be a test row, or prepare left it out",
        where=where,
        fix=f"choose one of these lines; {ranges}",
    )


def show_row(console: Console, tokenizer: Any, ids: Sequence[int], mask: Sequence[bool], end_of_turn_id: int) -> None:
    """Print a row's tokens and their counts: grey is read only, green is learned, the end-of-turn token stands out.

    Args:
        ids: token ids (seq,).
        mask: True on the tokens that are learned (seq,).
    """
    plain = console.color_system is None
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    text, was_trained = Text(), False
    for number, piece in enumerate(pieces(tokenizer, ids, mask)):
        if plain and piece.trained != was_trained:
            text.append(OPEN if piece.trained else CLOSE)
        was_trained = piece.trained
        shade = (TRAINED if piece.trained else NOT_TRAINED)[number % 2]
        ends = piece.trained and piece.ids[-1] == end_of_turn_id
        style = END_OF_TURN if ends else SPECIAL if piece.ids[0] in special and not piece.trained else shade
        text.append(visible(piece.text), style)
        text.append("\n" * piece.text.count("\n"))
    console.print(text.append(CLOSE if plain and was_trained else ""))
    end = "its end-of-turn token is learned" if mask[-1] and ids[-1] == end_of_turn_id else "WARNING: its end-of-turn token is not learned"
    console.print(f"{len(ids)} tokens, {sum(mask)} of them learned {f'({OPEN}…{CLOSE})' if plain else '(green)'}; {end}", highlight=False)


def pieces(tokenizer: Any, ids: Sequence[int], mask: Sequence[bool]) -> Iterator[Piece]:
    """Cut a row into the smallest parts that are whole characters and are learned as a whole."""
    context = start = 0
    for end in range(1, len(ids) + 1):
        # With the tokens before it: some tokenizers drop the space at the start of a text.
        before, after = _decode(tokenizer, ids[context:start]), _decode(tokenizer, ids[context:end])
        same_mask_follows = end < len(ids) and mask[end] == mask[start]
        if after.endswith(UNFINISHED) and same_mask_follows:
            continue
        yield Piece(tuple(ids[start:end]), after[len(before) :], mask[start])
        context, start = start, end


def visible(text: str) -> str:
    """Text whose line ends, tabs and control characters can be seen."""
    return "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)


def verdict(tokens: int, max_length: int | str) -> str:
    """Whether a row of so many tokens is used."""
    if not isinstance(max_length, int):
        return (
            f"max_length {max_length}: decided by the lengths of all rows when the training starts; --max_length {tokens} or more uses it"
        )
    if tokens > max_length:
        return f"DROPPED: longer than --max_length {max_length}; rows are never cut. --max_length {tokens} or more would use it"
    return f"used whole: at most --max_length {max_length}"


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def _range(split: Dataset) -> str:
    lines = list(split["line"])
    return f"{len(lines)} rows between {min(lines)} and {max(lines)}"
