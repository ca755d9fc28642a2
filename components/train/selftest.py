"""Seconds before the first step: does this model, with these rows, learn what it should? Money is spent only after that."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from components.common.chat import ChatFormat
from components.common.errors import ModelError
from components.train.batches import collate
from components.train.loss import answer_nll, plain_answer_nll
from components.train.model import evaluation_mode
from components.train.plan import Choice, Plan
from components.train.rows import Example
from components.train.run import Check

if TYPE_CHECKING:
    from accelerate import Accelerator

ROWS = 3
NOT_PACKED = Choice("packing", "off", "this model family does not keep packed rows apart", "此模型系列无法把打包的数据分开")
# bf16 keeps 8 bits, and int8 rounds each batch in its own way: two ways to compute the same loss differ by less than this share of it.
SAME_LOSS_SHARE = 0.02
# Rows that are apart share no sum: their states stay bit-equal, but that int8 chooses its outlier columns over the whole batch.
ROUNDING_CHANGE, INT8_CHANGE = 1e-6, 0.1


def self_test(
    model: Any, rows: Sequence[Example], plan: Plan, choices: Sequence[Choice], chat: ChatFormat, accelerator: Accelerator
) -> tuple[Plan, list[Choice], list[Check]]:
    """Try a few of the shorter rows; plan and choices, without packing if this family's rows can't be kept apart, and what was checked.

    The weights stay as they are.

    Raises:
        ModelError: this model would not learn what it should.
    """
    choices = list(choices)
    by_length = sorted(rows, key=lambda row: len(row.ids))
    some = by_length[len(by_length) // 4 :][:ROWS]
    checks = [_end_of_turn(rows, chat)]
    if plan.packing and len(some) > 1:
        apart = _apart(model, some, plan, chat, accelerator)
        if apart.passed:
            checks.append(apart)
        else:
            choices = [choice for choice in choices if choice.name != "packing"] + [NOT_PACKED]
            print(f"packing: {NOT_PACKED.value} ({NOT_PACKED.reason}: {apart.detail})", flush=True)
            plan = replace(plan, packing=False)
            model.get_base_model().set_attn_implementation("sdpa")
    checks += _losses(model, some, plan, chat, accelerator)
    checks.append(_gradients(model, some, plan, chat, accelerator))
    for check in checks:
        print(f"self-test: {check.name}: {'passed' if check.passed else 'FAILED'} ({check.detail})", flush=True)
    failed = [check for check in checks if not check.passed]
    if failed:
        raise ModelError(
            f"the self-test before training failed: {'; '.join(f'{check.name}: {check.detail}' for check in failed)}",
            fix="use --precision fp32 if a loss is not finite, --quantization none if rows disagree; "
            "else another base model, such as a Qwen2.5, Llama or Gemma",
        )
    return plan, choices, checks


def _end_of_turn(rows: Sequence[Example], chat: ChatFormat) -> Check:
    """The last label of every row is the end of its turn, and padding is another token (d01)."""
    wrong = [row.line for row in rows if not (bool(row.mask[-1]) and int(row.ids[-1]) == chat.end_of_turn_id)]
    passed = not wrong and chat.pad_id not in chat.stop_ids
    return Check("end of turn is learned", passed, f"in {len(rows) - len(wrong)} of {len(rows)} rows; token {chat.end_of_turn_id}")


@torch.no_grad()
def _apart(model: Any, rows: Sequence[Example], plan: Plan, chat: ChatFormat, accelerator: Accelerator) -> Check:
    """Another first row changes nothing in the rows packed after it (d13)."""
    evaluation_mode(model)
    batch = collate(rows, packed=True, pad_id=chat.pad_id, device=accelerator.device)
    length = batch.row_lengths[0]
    other = batch.ids.clone()
    other[:, :length] = other[:, :length].flip(1)
    body = model.get_base_model().base_model
    with accelerator.autocast():
        before, after = (
            body(**batch._replace(ids=ids).model_inputs(), use_cache=False).last_hidden_state[0, length:].float()
            for ids in (batch.ids, other)
        )
    change = float((before - after).abs().max() / before.abs().max())
    allowed = INT8_CHANGE if plan.quantization == "int8" else ROUNDING_CHANGE
    return Check("packed rows are apart", change <= allowed, f"another row changes the states of the rest by {change:.2g} of the largest")


@torch.no_grad()
def _losses(model: Any, rows: Sequence[Example], plan: Plan, chat: ChatFormat, accelerator: Accelerator) -> list[Check]:
    """The loss of a micro-batch, in chunks, against that of each row alone from the model's own logits (d03)."""
    evaluation_mode(model)
    batch = collate(rows, packed=plan.packing, pad_id=chat.pad_id, device=accelerator.device)
    with accelerator.autocast():
        ours, plain = float(answer_nll(model, batch)), float(plain_answer_nll(model, batch))
    share = abs(ours - plain) / abs(plain) if plain else math.inf
    return [
        Check("finite loss", math.isfinite(plain), f"{plain:.3f} nats, the answers of {len(rows)} rows"),
        Check(
            f"{'packed' if plan.packing else 'padded'} equals unpacked",
            share <= SAME_LOSS_SHARE,
            f"{ours:.3f} and {plain:.3f} nats, {share:.2%} apart",
        ),
    ]


def _gradients(model: Any, rows: Sequence[Example], plan: Plan, chat: ChatFormat, accelerator: Accelerator) -> Check:
    """Every LoRA layer's B has a gradient; A has none yet, because B is still 0 (d16)."""
    model.train()
    with accelerator.autocast():
        nll = answer_nll(model, collate(rows, packed=plan.packing, pad_id=chat.pad_id, device=accelerator.device))
    nll.backward()
    layers = {name: parameter for name, parameter in model.named_parameters() if "lora_B" in name}
    without = [name for name, parameter in layers.items() if parameter.grad is None or not parameter.grad.any()]
    model.zero_grad()
    detail = f"{len(layers) - len(without)} of {len(layers)} layers" + (f"; not {without[0]}" if without else "")
    return Check("every LoRA layer gets a gradient", not without, detail)
