"""The gradients of one optimizer step, whatever the number of micro-batches and processes; full memory makes the micro-batches smaller."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from components.common.errors import UserError
from components.train.batches import collate, deal
from components.train.loss import answer_nll
from components.train.parallel import ALONE, Processes
from components.train.plan import Plan
from components.train.rows import Example
from components.train.run import Run

if TYPE_CHECKING:
    from accelerate import Accelerator


class MicroBatch(NamedTuple):
    """Rows that pass through the model together, and how much their loss counts."""

    rows: Sequence[Example]
    weight: int = 1


def accumulate_gradients(model: Any, rows: Sequence[Example], plan: Plan, pad_id: int, accelerator: Accelerator, run: Run) -> float:
    """Gradients of one optimizer step over `rows`; the loss in nats per trainable token of the whole step.

    Every token weighs the same, however the rows are cut into micro-batches and dealt to processes (d14): the sum over tokens is
    divided by the count of the whole step. When the memory is full, the micro-batches are halved and the step is done again: the
    effective batch stays.

    Raises:
        UserError: the memory is too small even for one row at a time.
    """
    processes = Processes.of(accelerator, sharded=plan.sharded)
    tokens = sum(int(row.mask[1:].sum()) for row in rows)
    model.train()
    while True:
        groups = micro_batches(rows, plan.batch_size, run.micro_batches, processes)
        try:
            total = _backward(model, groups, tokens, plan, pad_id, accelerator)
            break
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if not is_out_of_memory(error):
                raise
            _refuse_what_cannot_be_halved(groups, processes)
        _make_room(model, run, sum(len(group) for group, _ in groups) / len(groups))
    processes.sum_gradients(model)
    return processes.sum(total) / tokens


def micro_batches(rows: Sequence[Example], batch_size: int, cut: int = 1, processes: Processes = ALONE) -> list[MicroBatch]:
    """This process's share of the rows, in groups of about `batch_size / cut` rows and about as many tokens each.

    Where the base is sharded, every process has as many groups: one with too few rows computes a short one more, at weight 0.
    """
    wanted = math.ceil(len(rows) / (processes.world_size * batch_size)) * cut
    groups = [MicroBatch(group) for group in deal(processes.share(rows), wanted)]
    if processes.sharded:
        shortest = min(rows, key=lambda row: len(row.ids))
        groups += [MicroBatch([shortest], weight=0)] * (wanted - len(groups))
    return groups


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an error of torch means that the GPU's memory, or the machine's, is full."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _refuse_what_cannot_be_halved(groups: Sequence[MicroBatch], processes: Processes) -> None:
    fix = "use --gradient_checkpointing true, --quantization nf4, or a smaller --max_length"
    if processes.sharded:  # the others compute on, and wait for this one in the middle of the model
        what = "the memory is full, and processes that share a base can't change their micro-batches in the middle of a step"
        raise UserError(what, fix=f"use a smaller --batch_size; or {fix}") from None
    if all(len(group) == 1 for group, _ in groups):
        longest = max(len(row.ids) for group, _ in groups for row in group)
        raise UserError(f"the memory is full, even with one row of {longest} tokens at a time", fix=fix) from None


def _make_room(model: Any, run: Run, rows: float) -> None:
    model.zero_grad()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    run.micro_batches *= 2
    note = f"step {len(run.steps) + 1}: the memory was full with {rows:.3g} rows at a time; half as many from here on"
    run.out_of_memory.append(note)
    print(f"WARNING: {note}; the effective batch stays as it was", flush=True)


def _backward(model: Any, groups: Sequence[MicroBatch], tokens: int, plan: Plan, pad_id: int, accelerator: Accelerator) -> float:
    """Add the gradients of the groups' loss, divided by `tokens`; the loss itself, summed."""
    total = 0.0
    for group, weight in groups:
        batch = collate(group, packed=plan.packing, pad_id=pad_id, device=accelerator.device)
        with accelerator.autocast():
            nll = answer_nll(model, batch)
        accelerator.backward(nll * weight / tokens)
        total += weight * float(nll.detach())
    return total
