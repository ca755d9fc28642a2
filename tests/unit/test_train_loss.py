"""The loss in chunks equals the plain loss, and counts every answer token once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

from components.common.errors import DataError
from components.train.batches import attend_row_by_row
from components.train.loss import answer_nll, plain_answer_nll
from components.train.model import add_lora
from components.train.rows import Example
from components.train.run import Run
from components.train.stepping import accumulate_gradients
from tests.unit.train_support import PAD, assert_close, batch_of, encoded, gradients, plan_of, with_some_training


@pytest.fixture(scope="module")
def examples(tiny_model: Path, tiny_rows: list[dict[str, str]]) -> list[Example]:
    return encoded(tiny_model, [{**row, "answer": row["answer"][: 20 + 40 * index]} for index, row in enumerate(tiny_rows[:4])])


@pytest.fixture(params=[True, False], ids=["packed", "padded"])
def packed(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture
def model(tiny_model: Path, packed: bool) -> Any:
    """The tiny model in fp32 with LoRA that is not at its start, so that A and B both have gradients."""
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    if packed:
        attend_row_by_row(base)
    return with_some_training(add_lora(base, plan_of(lora_r=4, lora_alpha=8)))


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    AcceleratorState._reset_state(True)
    yield Accelerator(mixed_precision="no", cpu=True)
    AcceleratorState._reset_state(True)


@pytest.mark.parametrize("chunk_tokens", [1, 7, 64, 10_000])
def test_the_loss_in_chunks_is_the_plain_loss_and_so_are_its_gradients(
    model: Any, packed: bool, examples: list[Example], chunk_tokens: int
) -> None:
    batch = batch_of(examples, packed=packed)
    plain = plain_answer_nll(model, batch)
    plain.backward()
    wanted = gradients(model)
    ours = answer_nll(model, batch, chunk_tokens)
    ours.backward()
    assert abs(float(ours) - float(plain)) <= 1e-5 * float(plain), f"losses differ by {abs(float(ours) - float(plain)):.3g}"
    assert_close(gradients(model), wanted)
    with torch.no_grad():
        evaluated = answer_nll(model, batch, chunk_tokens)
    assert abs(float(evaluated) - float(plain)) <= 1e-5 * float(plain), "the loss of evaluation is another one"


def test_the_gradient_is_that_of_the_scaled_loss(model: Any, packed: bool, examples: list[Example]) -> None:
    batch = batch_of(examples, packed=packed)
    (plain_answer_nll(model, batch) / 37).backward()
    wanted = gradients(model)
    (answer_nll(model, batch) / 37).backward()
    assert_close(gradients(model), wanted)


def test_logits_never_exist_for_more_than_a_chunk_nor_for_a_prompt(model: Any, packed: bool, examples: list[Example]) -> None:
    batch, seen = batch_of(examples, packed=packed), []
    model.get_base_model().lm_head.register_forward_hook(lambda _module, inputs, _logits: seen.append(inputs[0].shape[0]))
    answer_nll(model, batch, 32).backward()
    assert max(seen) <= 32
    assert sum(seen) == int(batch.mask[:, 1:].sum())


def test_a_model_that_caps_its_logits_is_trained_with_the_cap(examples: list[Example]) -> None:
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=2000,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    config.final_logit_softcapping = 0.5
    packed = False
    model = with_some_training(add_lora(Gemma2ForCausalLM(config), plan_of(lora_r=4)))
    batch = batch_of(examples, packed=packed)
    plain = plain_answer_nll(model, batch)
    plain.backward()
    wanted = gradients(model)
    ours = answer_nll(model, batch, 16)
    ours.backward()
    assert abs(float(ours) - float(plain)) <= 1e-5 * float(plain)
    assert_close(gradients(model), wanted)


def test_d03_what_stands_in_the_prompt_is_no_label_on_any_path(model: Any, packed: bool, examples: list[Example]) -> None:
    batch = batch_of(examples, packed=packed)
    inputs = batch.model_inputs()
    random = torch.randint(0, 2000, batch.ids.shape, generator=torch.Generator().manual_seed(4))
    labels = torch.where(batch.mask, batch.ids, random)  # the labels of prompt and padding are noise
    with torch.no_grad():
        logits = model.eval()(**inputs).logits.float()
        wanted = float(cross_entropy(logits[:, :-1][batch.mask[:, 1:]], labels[:, 1:][batch.mask[:, 1:]], reduction="sum"))
        library = model(**inputs, labels=torch.where(batch.mask, batch.ids, -100)).loss
        evaluation = float(answer_nll(model, batch))
    training = float(answer_nll(model, batch))
    plain = float(plain_answer_nll(model, batch))
    everything = float(plain_answer_nll(model, batch._replace(mask=torch.ones_like(batch.mask))))
    for path, found in {"training": training, "evaluation": evaluation, "plain": plain}.items():
        assert found == pytest.approx(wanted, rel=1e-5), path
        assert found == pytest.approx(float(library) * int(batch.mask.sum()), rel=1e-4), path
    assert everything > 1.05 * wanted, "the test can't tell a masked loss from an unmasked one"


def test_padding_changes_nothing(model: Any, packed: bool, examples: list[Example]) -> None:
    together = float(answer_nll(model.eval(), batch_of(examples, packed=packed)))
    alone = sum(float(answer_nll(model, batch_of([example], packed=packed))) for example in examples)
    assert together == pytest.approx(alone, rel=1e-5)


def test_d04_a_batch_without_a_trainable_token_is_refused(model: Any, packed: bool, examples: list[Example]) -> None:
    batch = batch_of(examples, packed=packed)
    with pytest.raises(DataError, match="no trainable token"):
        answer_nll(model, batch._replace(mask=torch.zeros_like(batch.mask)))


@pytest.mark.parametrize(("batch_size", "accumulation"), [(1, 4), (2, 2), (3, 1)])
def test_d14_micro_batches_of_any_size_give_the_gradients_of_one_batch(
    model: Any, packed: bool, examples: list[Example], accelerator: Accelerator, batch_size: int, accumulation: int
) -> None:
    lengths = [int(example.mask.sum()) for example in examples]
    assert max(lengths) > 3 * min(lengths), "rows of unequal length are what this is about"
    one = plan_of(batch_size=4, packing=packed)
    whole = accumulate_gradients(model, examples, one, PAD, accelerator, Run())
    wanted = gradients(model)
    several = plan_of(batch_size=batch_size, accumulation=accumulation, packing=packed)
    loss = accumulate_gradients(model, examples, several, PAD, accelerator, Run())
    assert loss == pytest.approx(whole, rel=1e-5)
    assert_close(gradients(model), wanted)
