"""The loss in chunks equals the plain loss, and counts every answer token once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM

from components.common.chat import ChatFormat
from components.common.errors import DataError, ModelError
from components.train.config import TrainSettings
from components.train.loss import answer_nll, check_loss, plain_answer_nll
from components.train.model import add_lora
from components.train.recipe import accumulate_gradients
from components.train.rows import Batch, Example, collate

SETTINGS = TrainSettings(lora_r=4, lora_alpha=8, lora_dropout=0.0)


@pytest.fixture(scope="module")
def examples(tiny_model: Path, tiny_rows: list[dict[str, str]]) -> list[Example]:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    chat = ChatFormat.of_tokenizer(tokenizer)
    pairs = [chat.example(tokenizer, row["question"], row["answer"][: 20 + 40 * index]) for index, row in enumerate(tiny_rows[:4])]
    return [Example(torch.tensor(ids, dtype=torch.int32), torch.tensor(mask)) for ids, mask in pairs]


@pytest.fixture
def model(tiny_model: Path) -> Any:
    """The tiny model in fp32 with LoRA that is not at its start, so that A and B both have gradients."""
    lora = add_lora(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), SETTINGS)
    return with_some_training(lora)


@pytest.fixture
def accelerator() -> Any:
    AcceleratorState._reset_state(True)
    yield Accelerator(mixed_precision="no", cpu=True)
    AcceleratorState._reset_state(True)


def with_some_training(lora: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.02, generator=generator)
    return lora


def gradients(model: Any) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


def assert_close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert found, "nothing has a gradient"
    for name, gradient in wanted.items():
        difference, size = float((found[name] - gradient).abs().max()), float(gradient.abs().max())
        assert difference <= 1e-4 * size + 1e-7, f"{name}: gradients differ by {difference:.3g} of {size:.3g}"


@pytest.mark.parametrize("chunk_tokens", [1, 7, 64, 10_000])
def test_the_loss_in_chunks_is_the_plain_loss_and_so_are_its_gradients(model: Any, examples: list[Example], chunk_tokens: int) -> None:
    batch = collate(examples, 0, "cpu")
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


def test_the_gradient_is_that_of_the_scaled_loss(model: Any, examples: list[Example]) -> None:
    batch = collate(examples, 0, "cpu")
    (plain_answer_nll(model, batch) / 37).backward()
    wanted = gradients(model)
    (answer_nll(model, batch) / 37).backward()
    assert_close(gradients(model), wanted)


def test_logits_never_exist_for_more_than_a_chunk_nor_for_a_prompt(model: Any, examples: list[Example]) -> None:
    batch, seen = collate(examples, 0, "cpu"), []
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
    model = with_some_training(add_lora(Gemma2ForCausalLM(config), SETTINGS))
    batch = collate(examples, 0, "cpu")
    plain = plain_answer_nll(model, batch)
    plain.backward()
    wanted = gradients(model)
    ours = answer_nll(model, batch, 16)
    ours.backward()
    assert abs(float(ours) - float(plain)) <= 1e-5 * float(plain)
    assert_close(gradients(model), wanted)


def test_a_model_whose_head_scales_its_logits_is_refused_before_training(examples: list[Example], model: Any) -> None:
    torch.manual_seed(0)
    config = CohereConfig(
        vocab_size=2000,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        logit_scale=0.01,
        initializer_range=1.0,
    )
    batch = collate(examples[:1], 0, "cpu")
    check_loss(model.eval(), batch)
    with pytest.raises(ModelError, match="can't be computed in chunks"):
        check_loss(add_lora(CohereForCausalLM(config), SETTINGS).eval(), batch)


def test_d03_what_stands_in_the_prompt_is_no_label_on_any_path(model: Any, examples: list[Example]) -> None:
    batch = collate(examples, 0, "cpu")
    random = torch.randint(0, 2000, batch.ids.shape, generator=torch.Generator().manual_seed(4))
    labels = torch.where(batch.mask, batch.ids, random)  # the labels of prompt and padding are noise
    with torch.no_grad():
        logits = model.eval()(input_ids=batch.ids, attention_mask=batch.attention).logits.float()
        wanted = float(cross_entropy(logits[:, :-1][batch.mask[:, 1:]], labels[:, 1:][batch.mask[:, 1:]], reduction="sum"))
        library = model(input_ids=batch.ids, attention_mask=batch.attention, labels=torch.where(batch.mask, batch.ids, -100)).loss
        evaluation = float(answer_nll(model, batch))
    training = float(answer_nll(model, batch))
    plain = float(plain_answer_nll(model, batch))
    everything = float(plain_answer_nll(model, batch._replace(mask=batch.attention.bool())))
    for path, found in {"training": training, "evaluation": evaluation, "plain": plain}.items():
        assert found == pytest.approx(wanted, rel=1e-5), path
        assert found == pytest.approx(float(library) * int(batch.mask.sum()), rel=1e-4), path
    assert everything > 1.05 * wanted, "the test can't tell a masked loss from an unmasked one"


def test_padding_changes_nothing(model: Any, examples: list[Example]) -> None:
    together = float(answer_nll(model.eval(), collate(examples, 0, "cpu")))
    alone = sum(float(answer_nll(model, collate([example], 0, "cpu"))) for example in examples)
    assert together == pytest.approx(alone, rel=1e-5)


def test_d04_a_batch_without_a_trainable_token_is_refused(model: Any, examples: list[Example]) -> None:
    batch = collate(examples, 0, "cpu")
    with pytest.raises(DataError, match="no trainable token"):
        answer_nll(model, Batch(batch.ids, torch.zeros_like(batch.mask), batch.attention))


def test_d14_one_batch_of_four_gives_the_gradients_of_four_batches_of_one(
    model: Any, examples: list[Example], accelerator: Accelerator
) -> None:
    lengths = [int(example.mask.sum()) for example in examples]
    assert max(lengths) > 3 * min(lengths), "rows of unequal length are what this is about"
    whole = accumulate_gradients(model, [collate(examples, 0, "cpu")], accelerator)
    wanted = gradients(model)
    for parts in ([[example] for example in examples], [examples[:1], examples[1:]]):
        loss = accumulate_gradients(model, [collate(part, 0, "cpu") for part in parts], accelerator)
        assert loss == pytest.approx(whole, rel=1e-5)
        assert_close(gradients(model), wanted)
