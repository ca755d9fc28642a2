"""Rows laid end to end are as apart as rows alone (d13), and every row of an epoch is used once, in an order that can be taken up."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from components.train.batches import attend_row_by_row, deal, rows_of_steps
from components.train.loss import answer_nll, plain_answer_nll
from components.train.model import add_lora
from components.train.rows import Example
from tests.unit.train_support import assert_close, batch_of, encoded, gradients, plan_of, with_some_training

SHAPE: dict[str, Any] = {
    "vocab_size": 2000,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def examples(tiny_model: Path, tiny_rows: list[dict[str, str]]) -> list[Example]:
    return encoded(tiny_model, [{**row, "answer": row["answer"][: 15 + 25 * index]} for index, row in enumerate(tiny_rows[:5])])


def families() -> list[Any]:
    torch.manual_seed(0)
    windows = ["sliding_attention", "full_attention"] * 2
    gemma = Gemma3TextConfig(**SHAPE, head_dim=8, sliding_window=16, layer_types=windows)
    sliding = Qwen2Config(**SHAPE, sliding_window=16, use_sliding_window=True, layer_types=windows)
    return [
        pytest.param(lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)), id="qwen2"),
        pytest.param(lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)), id="llama"),
        pytest.param(lambda: Gemma3ForCausalLM(gemma), id="gemma3 with a window of 16 tokens"),
        pytest.param(lambda: Qwen2ForCausalLM(sliding), id="qwen2 with a window of 16 tokens"),
    ]


@pytest.mark.parametrize("build", families())
def test_d13_the_packed_loss_is_the_sum_of_the_rows_losses_and_so_are_its_gradients(build: Any, examples: list[Example]) -> None:
    torch.manual_seed(1)
    library = with_some_training(add_lora(build(), plan_of()))
    library.get_base_model().set_attn_implementation("sdpa")
    alone = torch.stack([plain_answer_nll(library, batch_of([row])) for row in examples]).sum()
    alone.backward()
    wanted = gradients(library)
    attend_row_by_row(library.get_base_model())
    packed = answer_nll(library, batch_of(examples))
    packed.backward()
    difference = abs(float(packed.detach()) - float(alone.detach()))
    assert difference <= 1e-5 * float(alone.detach()), f"losses differ by {difference:.3g}"
    assert_close(gradients(library), wanted)


@pytest.mark.parametrize("build", families())
def test_d13_changing_one_row_leaves_the_others_logits_as_they_were(build: Any, examples: list[Example]) -> None:
    model = build().eval()
    attend_row_by_row(model)
    batch = batch_of(examples[:3])
    other = batch.ids.clone()
    start, end = batch.row_lengths[0], batch.row_lengths[0] + batch.row_lengths[1]
    other[:, start:end] = (other[:, start:end] + 7) % 2000
    with torch.no_grad():
        before, after = model(**batch.model_inputs()).logits[0], model(**batch._replace(ids=other).model_inputs()).logits[0]
    assert torch.equal(before[:start], after[:start])
    assert torch.equal(before[end:], after[end:]), f"differ by {float((before[end:] - after[end:]).abs().max()):.3g}"
    assert not torch.equal(before[start:end], after[start:end]), "the test changed nothing"


def test_d13_the_library_alone_would_mix_the_rows(tiny_model: Path, examples: list[Example]) -> None:
    """Without our attention the same input is one long row: the tests above can fail."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    batch = batch_of(examples[:2])
    length = batch.row_lengths[0]
    with torch.no_grad():
        mixed, alone = model(input_ids=batch.ids).logits[0, length:], model(input_ids=batch.ids[:, length:]).logits[0]
    assert float((mixed - alone).abs().max()) > 0.1


def test_positions_start_anew_with_every_row_and_no_token_is_padding(examples: list[Example]) -> None:
    inputs = batch_of(examples).model_inputs()
    lengths = [len(row.ids) for row in examples]
    assert inputs["input_ids"].shape == (1, sum(lengths))
    assert inputs["position_ids"][0].tolist() == [position for length in lengths for position in range(length)]


def test_the_padded_batch_holds_the_same_rows(examples: list[Example]) -> None:
    batch = batch_of(examples, packed=False)
    inputs = batch.model_inputs()
    assert inputs["attention_mask"].sum(dim=1).tolist() == list(batch.row_lengths)
    assert not batch.mask[inputs["attention_mask"] == 0].any(), "a pad is trained on"
    assert batch.tokens == batch_of(examples).tokens == sum(batch.row_lengths)
    assert batch.trainable_tokens == batch_of(examples).trainable_tokens


def rows_of(lengths: list[int]) -> list[Example]:
    return [Example(torch.full((length,), line), torch.ones(length, dtype=torch.bool), line) for line, length in enumerate(lengths)]


def test_dealt_groups_weigh_about_the_same_and_lose_no_row() -> None:
    groups = deal(rows_of([100, 10, 90, 20, 50, 60, 30, 40]), 4)
    assert sorted(row.line for group in groups for row in group) == list(range(8))
    weights = [sum(len(row.ids) for row in group) for group in groups]
    assert max(weights) - min(weights) <= 20, weights
    assert len(deal(rows_of([5, 5]), 4)) == 2, "a group without a row"


@pytest.mark.parametrize("rows", [1, 7, 16, 21])
def test_an_epoch_uses_every_row_once_in_another_order_each_time(rows: int) -> None:
    plan = plan_of(batch_size=2, accumulation=4, steps_an_epoch=-(-rows // 8))
    steps = [[row.line for row in step] for step in islice(rows_of_steps(rows_of([9] * rows), plan), 2 * plan.steps_an_epoch)]
    first, second = ([line for step in part for line in step] for part in (steps[: plan.steps_an_epoch], steps[plan.steps_an_epoch :]))
    assert sorted(first) == sorted(second) == list(range(rows))
    assert rows == 1 or first != second
    assert all(len(step) == 8 for step in steps[: rows // 8])


def test_d10_the_order_can_be_taken_up_at_any_step() -> None:
    plan = plan_of(batch_size=2, accumulation=2, steps_an_epoch=6)
    rows = rows_of([9] * 21)
    unbroken = [[row.line for row in step] for step in islice(rows_of_steps(rows, plan), 15)]
    for first in range(14):
        resumed = [[row.line for row in step] for step in islice(rows_of_steps(rows, plan, first), 15 - first)]
        assert resumed == unbroken[first:], f"from step {first}"
