"""Settings of the train step; the one place where their defaults are written."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import AliasChoices, Field, model_validator

from components.common.chat import DEFAULT_SYSTEM_PROMPT
from components.common.settings import StepSettings


class TrainSettings(StepSettings):
    """Data set + base model → LoRA adapter, loss curves and metrics. The loss counts the answer and its end-of-turn token only."""

    base_model: str = Field(
        "Qwen/Qwen2.5-7B-Instruct",
        validation_alias=AliasChoices("base_model", "model_name"),
        description="base model: hub id, folder, s3:// address, or package:gemma3-270m",
    )
    dataset: Path = Field(Path("dataset"), description="data set folder that prepare wrote, or a .jsonl file with question and answer")
    adapter: Path = Field(
        Path("qwen-medical-qa-lora"),
        validation_alias=AliasChoices("adapter", "output_dir"),
        description="output folder of the adapter and the TensorBoard logs",
    )
    curves: Path = Field(Path("train_curves.html"), description="output file of the loss curves")
    metrics: Path = Field(Path("train_metrics.json"), description="output file of the metrics")
    system_prompt: str = Field(DEFAULT_SYSTEM_PROMPT, description="system turn of every conversation; stored with the adapter")
    max_length: int = Field(1024, ge=16, description="longest row, tokens; longer rows are dropped and counted, never cut")
    batch_size: int = Field(4, ge=1, description="rows in a micro-batch")
    gradient_accumulation_steps: int = Field(
        4, ge=1, description="micro-batches in an optimizer step; fewer where an epoch would have less than 8 steps"
    )
    epochs: float = Field(3, gt=0, description="passes over the training split")
    learning_rate: float = Field(2e-4, gt=0, description="peak learning rate")
    warmup_steps: int = Field(10, ge=0, description="optimizer steps of linear warm-up; at most a tenth of all steps is used")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay")
    max_grad_norm: float = Field(1.0, gt=0, description="gradient clipping norm")
    lora_r: int = Field(16, ge=1, description="LoRA rank")
    lora_alpha: int = Field(32, ge=1, description="LoRA scale: the update is multiplied by alpha / r")
    lora_dropout: float = Field(0.05, ge=0, lt=1, description="dropout before the LoRA update, 0–1")
    load_in_4bit: bool = Field(False, description="load the base in 4-bit NF4 (QLoRA)")
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass: less memory, about a third slower")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto", description="compute precision; auto: bf16 where the device has it, else fp32"
    )
    bf16: bool = Field(False, description="same as --precision bf16")
    fp16: bool = Field(False, description="same as --precision fp16")
    seed: int = Field(42, description="seed of the initial weights, the dropout and the row order")

    @property
    def asked_precision(self) -> Literal["auto", "bf16", "fp16", "fp32"]:
        """The precision that `precision`, `bf16` and `fp16` ask for together."""
        return "bf16" if self.bf16 else "fp16" if self.fp16 else self.precision

    @model_validator(mode="after")
    def _one_precision(self) -> Self:
        asked = {name for name, on in (("bf16", self.bf16), ("fp16", self.fp16), (self.precision, self.precision != "auto")) if on}
        if len(asked) > 1:
            raise ValueError(f"precision is asked for twice: {', '.join(sorted(asked))}")
        return self
