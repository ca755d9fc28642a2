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

from components.common.errors import ModelError
from components.common.loading import load_tokenizer
from components.train.config import Quantization
from components.train.loss import answer_nll
from components.train.model import add_lora, evaluation_mode, load_base
from components.train.recipe import train
from components.train.rows import Example
from components.train.run import Run
from components.train.stepping import accumulate_gradients
from tests.unit.train_support import PAD, batch_of, data_of, encoded, lora_weights, plan_of

QUANTIZATIONS: tuple[Quantization, ...] = ("none", "nf4", "int8")


@pytest.fixture(scope="module")
def examples(tiny_model: Path, tiny_rows: list[dict[str, str]]) -> list[Example]:
    return encoded(tiny_model, tiny_rows[1::2])


@pytest.fixture(params=["no", "bf16"])
def accelerator(request: pytest.FixtureRequest) -> Iterator[Accelerator]:
    AcceleratorState._reset_state(True)
    yield Accelerator(mixed_precision=request.param, cpu=True)
    AcceleratorState._reset_state(True)


def precision_of(accelerator: Accelerator) -> str:
    return "bf16" if accelerator.mixed_precision == "bf16" else "fp32"


def test_lora_is_on_every_linear_layer_but_the_head_in_fp32(tiny_model: Path) -> None:
    plan = plan_of(precision="bf16")
    model = add_lora(load_base(tiny_model, plan), plan)
    names = {name.split(".")[-4] for name in lora_weights(model)}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert len(lora_weights(model)) == 4 * 7 * 2
    assert all(weight.dtype == torch.float32 for weight in lora_weights(model).values())
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    assert all(parameter.dtype == torch.bfloat16 for parameter in frozen)


def test_the_first_weights_follow_from_the_seed(tiny_model: Path) -> None:
    first, again, other = (lora_weights(add_lora(load_base(tiny_model, plan_of()), plan_of(seed=seed))) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(("quantization", "use_dora"), [("none", False), ("nf4", False), ("int8", False), ("none", True), ("nf4", True)])
@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_d16_after_one_step_every_lora_b_has_changed_and_after_two_every_lora_a(
    tiny_model: Path,
    examples: list[Example],
    accelerator: Accelerator,
    gradient_checkpointing: bool,
    quantization: Quantization,
    use_dora: bool,
) -> None:
    plan = plan_of(
        precision=precision_of(accelerator), quantization=quantization, gradient_checkpointing=gradient_checkpointing, use_dora=use_dora
    )
    model = add_lora(load_base(tiny_model, plan), plan)
    optimizer = torch.optim.AdamW([parameter for parameter in model.parameters() if parameter.requires_grad], lr=1e-3, weight_decay=0)
    states = [lora_weights(model)]
    for _ in range(2):
        accumulate_gradients(model, examples[:2], plan, PAD, accelerator, Run())
        optimizer.step()
        optimizer.zero_grad()
        states.append(lora_weights(model))
    unchanged = [name for name in states[0] if "lora_B" in name and torch.equal(states[0][name], states[1][name])]
    assert not unchanged, f"not trained in the first step: {unchanged}"
    unchanged = [name for name in states[0] if torch.equal(states[1][name], states[2][name])]
    assert not unchanged, f"not trained in the second step: {unchanged}"


@pytest.mark.parametrize("packing", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(tiny_model: Path, examples: list[Example], packing: bool) -> None:
    found = []
    for gradient_checkpointing in (False, True):
        plan = plan_of(gradient_checkpointing=gradient_checkpointing, packing=packing)
        model = add_lora(load_base(tiny_model, plan), plan).train()
        answer_nll(model, batch_of(examples[:2], packed=packing)).backward()
        found.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]))
    difference = float((found[0] - found[1]).abs().max())
    assert difference <= 1e-5 * float(found[0].abs().max()), f"gradients differ by {difference:.3g}"


def test_d18_4bit_is_nf4_with_double_quantisation_and_computes_in_the_chosen_precision(tiny_model: Path) -> None:
    from bitsandbytes.nn import Linear4bit

    for precision in ("bf16", "fp32"):
        plan = plan_of(precision=precision, quantization="nf4")
        model = add_lora(load_base(tiny_model, plan), plan)
        layers: list[Any] = [module for module in model.modules() if isinstance(module, Linear4bit)]
        assert len(layers) == 4 * 7
        for layer in layers:
            assert layer.compute_dtype == plan.compute.dtype
            state: Any = layer.weight.quant_state
            assert state.quant_type == "nf4"
            assert state.nested


def test_8bit_is_int8_in_every_linear_layer_but_the_head(tiny_model: Path) -> None:
    from bitsandbytes.nn import Linear8bitLt

    plan = plan_of(precision="bf16", quantization="int8")
    model = add_lora(load_base(tiny_model, plan), plan)
    layers: list[Any] = [module for module in model.modules() if isinstance(module, Linear8bitLt)]
    assert len(layers) == 4 * 7
    assert all(layer.weight.dtype == torch.int8 for layer in layers)


def test_rslora_scales_by_the_root_of_the_rank(tiny_model: Path) -> None:
    for use_rslora, scale in ((False, 16 / 8), (True, 16 / 8**0.5)):
        plan = plan_of(use_rslora=use_rslora)
        model = add_lora(load_base(tiny_model, plan), plan)
        found = {float(module.scaling["default"]) for module in model.modules() if hasattr(module, "lora_A")}
        assert found == {scale}


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_evaluating_between_steps_leaves_a_quantised_model_as_it_was(
    tiny_model: Path, examples: list[Example], quantization: Quantization
) -> None:
    plan = plan_of(precision="bf16", quantization=quantization)
    model = add_lora(load_base(tiny_model, plan), plan)
    batch = batch_of(examples[:2])
    training = float(answer_nll(model.train(), batch).detach())
    evaluation_mode(model)
    with torch.no_grad():
        evaluated = float(answer_nll(model, batch))
    again = answer_nll(model.train(), batch)
    rounding = 1e-3 if quantization == "int8" else 0  # its two kernels round apart
    assert evaluated == pytest.approx(training, rel=rounding)
    assert float(again.detach()) == pytest.approx(training, rel=rounding)
    again.backward()


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_training_lowers_the_held_out_loss(
    tiny_model: Path, examples: list[Example], accelerator: Accelerator, quantization: Quantization
) -> None:
    plan = plan_of(precision=precision_of(accelerator), quantization=quantization, epochs=2, steps=6)
    model = add_lora(load_base(tiny_model, plan), plan)
    run = train(model, data_of(examples[:12], examples[12:]), plan=plan, pad_id=PAD, accelerator=accelerator)
    assert run.kept.validation_loss < run.validation_loss_base - 0.1
    assert len(run.steps) == plan.steps
    assert [point.step for point in run.evaluations] == [3, 6]
    assert sum(step.tokens for step in run.steps) == 2 * sum(len(example.ids) for example in examples[:12]), "padding was counted"


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_weights(
    tiny_model: Path, examples: list[Example], accelerator: Accelerator, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_of(precision=precision_of(accelerator), learning_rate=1e30, batch_size=2, steps_an_epoch=6, steps=18, evaluate_every=6)
    model = add_lora(load_base(tiny_model, plan), plan)
    run = train(model, data_of(examples[:12], examples[12:]), plan=plan, pad_id=PAD, accelerator=accelerator)
    assert run.stopped_because
    assert "WARNING: training stopped early" in capsys.readouterr().out
    assert 1 <= len(run.steps) < plan.steps
    assert math.isfinite(run.kept.validation_loss), "the weights that were kept have no finite loss"
    assert all(weight.isfinite().all() for weight in lora_weights(model).values())


def test_d17_a_base_model_with_a_loss_that_is_not_finite_is_refused(
    tiny_model: Path, examples: list[Example], accelerator: Accelerator
) -> None:
    plan = plan_of(precision=precision_of(accelerator))
    base = load_base(tiny_model, plan)
    base.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(ModelError, match="the base model's own loss is nan"):
        train(add_lora(base, plan), data_of(examples[:12], examples[12:]), plan=plan, pad_id=PAD, accelerator=accelerator)


def copy_of(model: Path, target: Path) -> Path:
    return Path(shutil.copytree(model, target))


def test_a_cut_weights_file_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_model, tmp_path / "model")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ModelError, match="can't be loaded"):
        load_base(folder, plan_of(precision="bf16"))


def test_missing_weights_are_refused_not_made_up(tiny_model: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = copy_of(tiny_model, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="1 weights are missing"):
        load_base(folder, plan_of(precision="bf16"))


def test_a_model_without_tokenizer_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_model, tmp_path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(ModelError, match="no tokenizer"):
        load_tokenizer(folder)
