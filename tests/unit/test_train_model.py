"""LoRA on the base model: what is trained, in which precision, and that it is trained on every path."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import AutoTokenizer

from components.common.chat import ChatFormat
from components.common.device import Compute
from components.common.errors import ModelError
from components.train.choices import plan_steps
from components.train.config import TrainSettings
from components.train.loss import answer_nll
from components.train.model import add_lora, evaluation_mode, load_base, load_tokenizer
from components.train.recipe import accumulate_gradients, train
from components.train.rows import Data, Example, Split, collate

BF16 = Compute(torch.device("cpu"), torch.bfloat16, "")
FP32 = Compute(torch.device("cpu"), torch.float32, "")


class NoWriter:
    """Takes the place of TensorBoard where a test looks at the weights only."""

    def add_scalar(self, name: str, value: float, step: int) -> None:
        assert name
        assert step >= 0
        assert isinstance(value, float)


@pytest.fixture(scope="module")
def examples(tiny_model: Path, tiny_rows: list[dict[str, str]]) -> list[Example]:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    chat = ChatFormat.of_tokenizer(tokenizer)
    pairs = [chat.example(tokenizer, row["question"], row["answer"]) for row in tiny_rows[1::2]]
    return [Example(torch.tensor(ids, dtype=torch.int32), torch.tensor(mask)) for ids, mask in pairs]


@pytest.fixture(params=["no", "bf16"])
def accelerator(request: pytest.FixtureRequest) -> Iterator[Accelerator]:
    AcceleratorState._reset_state(True)
    yield Accelerator(mixed_precision=request.param, cpu=True)
    AcceleratorState._reset_state(True)


def compute_of(accelerator: Accelerator) -> Compute:
    return BF16 if accelerator.mixed_precision == "bf16" else FP32


def lora_weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_lora_is_on_every_linear_layer_but_the_head_in_fp32(tiny_model: Path) -> None:
    model = add_lora(load_base(tiny_model, BF16), TrainSettings())
    names = {name.split(".")[-4] for name in lora_weights(model)}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert len(lora_weights(model)) == 4 * 7 * 2
    assert all(weight.dtype == torch.float32 for weight in lora_weights(model).values())
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    assert all(parameter.dtype == torch.bfloat16 for parameter in frozen)


def test_the_first_weights_follow_from_the_seed(tiny_model: Path) -> None:
    first, again, other = (lora_weights(add_lora(load_base(tiny_model, BF16), TrainSettings(seed=seed))) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("load_in_4bit", [False, True])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_d16_after_one_step_every_lora_b_has_changed_and_after_two_every_lora_a(
    tiny_model: Path, examples: list[Example], accelerator: Accelerator, gradient_checkpointing: bool, load_in_4bit: bool
) -> None:
    settings = TrainSettings(gradient_checkpointing=gradient_checkpointing, lora_dropout=0.0)
    model = add_lora(load_base(tiny_model, compute_of(accelerator), load_in_4bit=load_in_4bit), settings)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-3, weight_decay=0)
    states = [lora_weights(model)]
    for _ in range(2):
        accumulate_gradients(model, [collate(examples[:2], 0, "cpu")], accelerator)
        optimizer.step()
        optimizer.zero_grad()
        states.append(lora_weights(model))
    unchanged = [name for name in states[0] if "lora_B" in name and torch.equal(states[0][name], states[1][name])]
    assert not unchanged, f"not trained in the first step: {unchanged}"
    unchanged = [name for name in states[0] if torch.equal(states[1][name], states[2][name])]
    assert not unchanged, f"not trained in the second step: {unchanged}"


def test_gradient_checkpointing_gives_the_same_gradients(tiny_model: Path, examples: list[Example]) -> None:
    found = []
    for gradient_checkpointing in (False, True):
        settings = TrainSettings(gradient_checkpointing=gradient_checkpointing, lora_dropout=0.0)
        model = add_lora(load_base(tiny_model, FP32), settings).train()
        answer_nll(model, collate(examples[:2], 0, "cpu")).backward()
        found.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]))
    difference = float((found[0] - found[1]).abs().max())
    assert difference <= 1e-5 * float(found[0].abs().max()), f"gradients differ by {difference:.3g}"


def test_d18_4bit_is_nf4_with_double_quantisation_and_computes_in_the_chosen_precision(tiny_model: Path) -> None:
    from bitsandbytes.nn import Linear4bit

    for compute in (BF16, FP32):
        model = add_lora(load_base(tiny_model, compute, load_in_4bit=True), TrainSettings())
        layers: list[Any] = [module for module in model.modules() if isinstance(module, Linear4bit)]
        assert len(layers) == 4 * 7
        for layer in layers:
            assert layer.compute_dtype == compute.dtype
            state: Any = layer.weight.quant_state
            assert state.quant_type == "nf4"
            assert state.nested


def test_evaluating_between_steps_leaves_a_4bit_model_as_it_was(tiny_model: Path, examples: list[Example]) -> None:
    model = add_lora(load_base(tiny_model, BF16, load_in_4bit=True), TrainSettings(lora_dropout=0.0))
    batch = collate(examples[:2], 0, "cpu")
    training = float(answer_nll(model.train(), batch).detach())
    evaluation_mode(model)
    with torch.no_grad():
        evaluated = float(answer_nll(model, batch))
    again = answer_nll(model.train(), batch)
    assert evaluated == training == float(again.detach())
    again.backward()


@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_training_lowers_the_held_out_loss(tiny_model: Path, examples: list[Example], accelerator: Accelerator, load_in_4bit: bool) -> None:
    settings = TrainSettings(learning_rate=5e-3, epochs=2, batch_size=4, lora_r=8)
    model = add_lora(load_base(tiny_model, compute_of(accelerator), load_in_4bit=load_in_4bit), settings)
    data = Data(Split(examples[:12], []), Split(examples[12:], []), "digest")
    plan, _ = plan_steps(settings, 12)
    run = train(model, data, settings=settings, plan=plan, pad_id=0, accelerator=accelerator, writer=NoWriter())
    assert run.best.validation_loss < run.validation_loss_base - 0.1
    assert len(run.steps) == plan.steps
    assert len(run.checkpoints) == 2
    kept = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(torch.equal(found, wanted) for found, wanted in zip(kept, run.best.weights, strict=True))
    assert sum(step.tokens for step in run.steps) == 2 * sum(len(example.ids) for example in examples[:12]), "padding was counted"


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_weights(
    tiny_model: Path, examples: list[Example], accelerator: Accelerator, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = TrainSettings(learning_rate=1e30, epochs=3, batch_size=2, lora_dropout=0.0)
    model = add_lora(load_base(tiny_model, compute_of(accelerator)), settings)
    data = Data(Split(examples[:12], []), Split(examples[12:], []), "digest")
    plan, _ = plan_steps(settings, 12)
    run = train(model, data, settings=settings, plan=plan, pad_id=0, accelerator=accelerator, writer=NoWriter())
    assert run.stopped_because
    assert "WARNING: training stopped early" in capsys.readouterr().out
    assert 1 <= len(run.steps) < plan.steps
    assert math.isfinite(run.best.validation_loss), "the weights that were kept have no finite loss"
    assert all(weight.isfinite().all() for weight in lora_weights(model).values())


def test_d17_a_base_model_with_a_loss_that_is_not_finite_is_refused(
    tiny_model: Path, examples: list[Example], accelerator: Accelerator
) -> None:
    settings = TrainSettings()
    base = load_base(tiny_model, compute_of(accelerator))
    base.model.norm.weight.data.fill_(float("nan"))
    data = Data(Split(examples[:12], []), Split(examples[12:], []), "digest")
    plan, _ = plan_steps(settings, 12)
    with pytest.raises(ModelError, match="the base model's own loss is nan"):
        train(add_lora(base, settings), data, settings=settings, plan=plan, pad_id=0, accelerator=accelerator, writer=NoWriter())


def copy_of(model: Path, target: Path) -> Path:
    return Path(shutil.copytree(model, target))


def test_a_cut_weights_file_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_model, tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ModelError, match="can't be loaded"):
        load_base(folder, BF16)


def test_missing_weights_are_refused_not_made_up(tiny_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = copy_of(tiny_model, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="1 weights of the base model are missing"):
        load_base(folder, BF16)


def test_a_model_without_tokenizer_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_model, tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(ModelError, match="no tokenizer"):
        load_tokenizer(folder)
