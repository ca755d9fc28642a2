"""Rows → micro-batches: laid end to end without a padding token, or padded; in both, a row never sees another (d13).

End to end, a micro-batch is one sequence, each row counts its positions from 0, and attention is computed row by row. That needs
neither a mask of (tokens, tokens) nor a special kernel, and it is exact. It needs a model family of the library's usual attention
interface; the self-test before training notices one that is not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from components.train.plan import Plan
from components.train.rows import Example

ROW_BY_ROW = "row_by_row"  # the name of our attention
SEEDS_APART = 1_000_003  # between the orders of two epochs


class Batch(NamedTuple):
    """A micro-batch.

    Attributes:
        ids: token ids, (1, tokens) end to end or (rows, seq) padded on the right.
        mask: True on the tokens that are learned, of the same shape.
        row_lengths: tokens of each row.
        packed: whether the rows lie end to end.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    row_lengths: tuple[int, ...]
    packed: bool

    @property
    def tokens(self) -> int:
        """Real tokens; padding is never counted."""
        return sum(self.row_lengths)

    @property
    def trainable_tokens(self) -> int:
        """Tokens whose prediction counts in the loss."""
        return int(self.mask[:, 1:].sum())

    def model_inputs(self) -> dict[str, Any]:
        """What the model's forward pass takes."""
        lengths = torch.tensor(self.row_lengths)
        if self.packed:
            positions = torch.cat([torch.arange(length) for length in self.row_lengths])
            return {"input_ids": self.ids, "position_ids": positions[None].to(self.ids.device), "row_lengths": self.row_lengths}
        attention = torch.arange(self.ids.shape[1])[None] < lengths[:, None]
        return {"input_ids": self.ids, "attention_mask": attention.long().to(self.ids.device)}


def collate(rows: Sequence[Example], *, packed: bool, pad_id: int, device: torch.device | str) -> Batch:
    """A micro-batch of rows."""
    lengths = tuple(len(row.ids) for row in rows)
    ids, masks = [row.ids.long() for row in rows], [row.mask for row in rows]
    if packed:
        return Batch(torch.cat(ids)[None].to(device), torch.cat(masks)[None].to(device), lengths, True)
    padded = pad_sequence(ids, batch_first=True, padding_value=pad_id)
    return Batch(padded.to(device), pad_sequence(masks, batch_first=True, padding_value=False).to(device), lengths, False)


def deal(rows: Sequence[Example], hands: int) -> list[list[Example]]:
    """The rows in at most so many groups of about as many tokens each: the longest first, each to the lightest group.

    Method: longest processing time first (Graham, "Bounds on Multiprocessing Timing Anomalies", 1969).
    """
    groups: list[list[Example]] = [[] for _ in range(min(hands, len(rows)))]
    weights = [0] * len(groups)
    for row in sorted(rows, key=lambda row: -len(row.ids)):
        lightest = weights.index(min(weights))
        groups[lightest].append(row)
        weights[lightest] += len(row.ids)
    return groups


def rows_of_steps(rows: Sequence[Example], plan: Plan, first_step: int = 0) -> Iterator[list[Example]]:
    """The rows of each optimizer step from `first_step` on, epoch after epoch without end; an epoch's last step may be smaller.

    An epoch's order follows from the seed and its number alone, so that a resumed run takes up exactly where it stopped.
    """
    epoch, skip = divmod(first_step, plan.steps_an_epoch)
    while True:
        generator = torch.Generator().manual_seed(plan.seed + SEEDS_APART * epoch)
        order = torch.randperm(len(rows), generator=generator).tolist()
        for at in range(skip * plan.rows_a_step, len(order), plan.rows_a_step):
            yield [rows[index] for index in order[at : at + plan.rows_a_step]]
        epoch, skip = epoch + 1, 0


def attend_row_by_row(model: Any) -> None:
    """Let a model compute attention within each row of a packed batch; a batch without `row_lengths` has one row in each line."""
    from transformers import AttentionInterface

    AttentionInterface.register(ROW_BY_ROW, _attention)
    model.set_attn_implementation(ROW_BY_ROW)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    row_lengths: Sequence[int] | None = None,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention of the rows, one after another; query, key and value are (batch, heads, tokens, head_dim)."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    lengths = row_lengths or [query.shape[2]]
    rows = zip(*(part.split(list(lengths), dim=2) for part in (query, key, value)), strict=True)
    outputs = []
    for length, (row_query, row_key, row_value) in zip(lengths, rows, strict=True):
        window = _window(length, sliding_window, query.device)
        outputs.append(sdpa_attention_forward(module, row_query, row_key, row_value, window, is_causal=window is None, **options)[0])
    return torch.cat(outputs, dim=1), None


def _window(length: int, sliding_window: int | None, device: torch.device) -> torch.Tensor | None:
    """The mask (1, 1, length, length) of a layer that sees so many tokens back; None where that is the whole row."""
    if sliding_window is None or length <= sliding_window:
        return None
    back = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)[None]
    return ((back >= 0) & (back < sliding_window))[None, None]
