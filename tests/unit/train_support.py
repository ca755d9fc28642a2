"""What several tests of training share: a plan, rows as token ids, and a LoRA model that is not at its start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from components.common.chat import ChatFormat
from components.common.device import Compute
from components.train.batches import Batch, collate
from components.train.plan import Plan
from components.train.rows import Data, Example, Split

BF16 = Compute(torch.device("cpu"), torch.bfloat16, "")
FP32 = Compute(torch.device("cpu"), torch.float32, "")
PAD = 0  # of the tiny model

PLAN = Plan(
    compute=FP32,
    precision="fp32",
    quantization="none",
    max_length=1024,
    batch_size=4,
    accumulation=1,
    packing=True,
    gradient_checkpointing=False,
    epochs=1,
    steps_an_epoch=3,
    steps=3,
    evaluate_every=3,
    warmup_steps=0,
    learning_rate=5e-3,
    weight_decay=0.0,
    max_grad_norm=1.0,
    lora_r=8,
    lora_alpha=16,
    lora_dropout=0.0,
    use_rslora=False,
    use_dora=False,
    patience=0,
    seed=42,
)


def plan_of(**changes: Any) -> Plan:
    """The tests' plan with some changes; `precision` brings its `compute` along."""
    if "precision" in changes:
        changes.setdefault("compute", BF16 if changes["precision"] == "bf16" else FP32)
    return replace(PLAN, **changes)


def encoded(model: Path, rows: Sequence[dict[str, str]]) -> list[Example]:
    """Rows as token ids and mask."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    chat = ChatFormat.of_tokenizer(tokenizer)
    pairs = [chat.example(tokenizer, row["question"], row["answer"]) for row in rows]
    return [Example(torch.tensor(ids, dtype=torch.int32), torch.tensor(mask), line) for line, (ids, mask) in enumerate(pairs, 1)]


def batch_of(rows: Sequence[Example], *, packed: bool = True) -> Batch:
    """A micro-batch on the CPU."""
    return collate(rows, packed=packed, pad_id=PAD, device="cpu")


def data_of(train: list[Example], validation: list[Example]) -> Data:
    """Both splits."""
    return Data(Split(train, []), Split(validation, []), "digest")


def with_some_training(lora: Any) -> Any:
    """A LoRA model whose B is not zero any more, so that A and B both have gradients."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in lora.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.02, generator=generator)
    return lora


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """The gradients by parameter; the model has none afterwards."""
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return found


def assert_close(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    """Equal gradients but for rounding in fp32."""
    assert found.keys() == wanted.keys()
    assert found, "nothing has a gradient"
    for name, gradient in wanted.items():
        difference, size = float((found[name] - gradient).abs().max()), float(gradient.abs().max())
        assert difference <= 1e-4 * size + 1e-7, f"{name}: gradients differ by {difference:.3g} of {size:.3g}"


def lora_weights(model: Any) -> dict[str, torch.Tensor]:
    """The weights that are trained, as they are now."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad}
