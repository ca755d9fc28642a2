"""The self-test before the first step finds what would waste the training."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import AutoTokenizer, BloomConfig, BloomForCausalLM, CohereConfig, CohereForCausalLM, FalconConfig, FalconForCausalLM

from components.common.chat import ChatFormat
from components.common.errors import ModelError
from components.train.batches import attend_row_by_row
from components.train.model import add_lora, load_base
from components.train.rows import Example
from components.train.selftest import self_test
from tests.unit.train_support import encoded, lora_weights, plan_of


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    AcceleratorState._reset_state(True)
    yield Accelerator(mixed_precision="no", cpu=True)
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="module")
def examples(tiny_model: Path, tiny_rows: list[dict[str, str]]) -> list[Example]:
    return encoded(tiny_model, tiny_rows[:8])


@pytest.fixture(scope="module")
def chat(tiny_model: Path) -> ChatFormat:
    return ChatFormat.of_tokenizer(AutoTokenizer.from_pretrained(tiny_model))


def test_a_sound_model_passes_and_stays_as_it_was(
    tiny_model: Path, examples: list[Example], chat: ChatFormat, accelerator: Accelerator, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_of(lora_dropout=0.1)
    model = add_lora(load_base(tiny_model, plan), plan)
    before = lora_weights(model)
    found, _, checks = self_test(model, examples, plan, [], chat, accelerator)
    assert found == plan
    assert [check.name for check in checks] == [
        "end of turn is learned",
        "packed rows are apart",
        "finite loss",
        "packed equals unpacked",
        "every LoRA layer gets a gradient",
    ]
    assert all(check.passed for check in checks)
    assert capsys.readouterr().out.count("self-test: ") == 5
    assert all(torch.equal(weight, before[name]) for name, weight in lora_weights(model).items())
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())


FAMILIES = {
    "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=2000, hidden_size=32, n_layer=2, n_head=4)),
    "falcon": lambda: FalconForCausalLM(FalconConfig(vocab_size=2000, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_d13_a_family_with_attention_of_its_own_that_mixes_packed_rows_is_padded_instead(
    family: str, examples: list[Example], chat: ChatFormat, accelerator: Accelerator, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.manual_seed(0)
    base: Any = FAMILIES[family]()
    plan = plan_of()
    model = add_lora(base, plan)
    attend_row_by_row(base)
    found, _, checks = self_test(model, examples, plan, [], chat, accelerator)
    assert not found.packing
    assert "padded equals unpacked" in {check.name for check in checks}
    assert "packing: off (this model family does not keep packed rows apart" in capsys.readouterr().out


def test_a_head_that_scales_its_logits_in_a_way_of_its_own_is_refused(
    examples: list[Example], chat: ChatFormat, accelerator: Accelerator
) -> None:
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
    plan = plan_of()
    model = add_lora(CohereForCausalLM(config), plan)
    attend_row_by_row(model.get_base_model())
    with pytest.raises(ModelError, match="equals unpacked"):
        self_test(model, examples, plan, [], chat, accelerator)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_quantised_base_passes(tiny_model: Path, examples: list[Example], chat: ChatFormat, quantization: str, precision: str) -> None:
    AcceleratorState._reset_state(True)
    plan = plan_of(quantization=quantization, precision=precision)
    mixed = Accelerator(mixed_precision="bf16" if precision == "bf16" else "no", cpu=True)
    found, _, checks = self_test(add_lora(load_base(tiny_model, plan), plan), examples, plan, [], chat, mixed)
    assert found == plan
    assert all(check.passed for check in checks)
    AcceleratorState._reset_state(True)


def test_d17_a_loss_that_is_not_finite_is_refused(
    tiny_model: Path, examples: list[Example], chat: ChatFormat, accelerator: Accelerator
) -> None:
    plan = plan_of()
    base = load_base(tiny_model, plan)
    base.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(ModelError, match="finite loss"):
        self_test(add_lora(base, plan), examples, plan, [], chat, accelerator)


def test_d16_layers_without_a_gradient_are_refused(
    tiny_model: Path, examples: list[Example], chat: ChatFormat, accelerator: Accelerator
) -> None:
    """Gradient checkpointing of inputs without gradient, as others shipped it: the first layers would train nothing."""
    plan = plan_of()
    model: Any = add_lora(load_base(tiny_model, plan), plan)
    model.get_base_model().model.layers[1].register_forward_hook(lambda _module, _inputs, output: output.detach())
    with pytest.raises(ModelError, match="every LoRA layer gets a gradient: 14 of 28 layers"):
        self_test(model, examples, plan, [], chat, accelerator)


@pytest.mark.parametrize("change", ["answer cut", "end masked"])
def test_d01_rows_that_do_not_learn_to_stop_are_refused(
    tiny_model: Path, examples: list[Example], chat: ChatFormat, accelerator: Accelerator, change: str
) -> None:
    row = examples[3]
    mask = row.mask.clone()
    mask[-1] = False
    broken = Example(row.ids[:-5], row.mask[:-5], row.line) if change == "answer cut" else Example(row.ids, mask, row.line)
    plan = plan_of()
    with pytest.raises(ModelError, match="end of turn is learned: in 7 of 8 rows"):
        self_test(add_lora(load_base(tiny_model, plan), plan), [*examples[:3], broken, *examples[4:]], plan, [], chat, accelerator)
