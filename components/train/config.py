"""Settings of the train step; the one place where their defaults are written. `auto` is resolved by `choices.py`, with a reason."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AliasChoices, Field, model_validator

from components.common.chat import DEFAULT_SYSTEM_PROMPT
from components.common.settings import StepSettings

Auto = Literal["auto"]
Quantization = Literal["none", "nf4", "int8"]
Precision = Literal["auto", "bf16", "fp16", "fp32"]
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Sharding = Literal["auto", "none", "full"]
NO_CHECKPOINTS = "none"
PATHS = {"dataset", "adapter", "curves", "metrics", "checkpoint_uri"}  # where things lie says nothing about what was trained


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
    # how the rows are used
    max_length: Annotated[int, Field(ge=16)] | Auto = Field(
        "auto", description="longest row, tokens; longer rows are dropped and counted, never cut; auto: by the rows' lengths"
    )
    batch_size: Positive | Auto = Field(
        "auto", description="rows in a micro-batch, for each device; auto: what the memory holds, at most 8"
    )
    gradient_accumulation_steps: Positive | Auto = Field(
        "auto",
        description="micro-batches in an optimizer step; auto: as many as make 16 rows; fewer where an epoch would have less than 8 steps",
    )
    packing: bool | Auto = Field(
        "auto",
        description="lay the rows of a micro-batch end to end instead of padding them; auto: where the model family keeps rows apart",
    )
    epochs: Annotated[float, Field(gt=0)] | Auto = Field("auto", description="passes over the training split; auto: by the number of rows")
    # how the weights change
    learning_rate: Annotated[float, Field(gt=0)] | Auto = Field("auto", description="peak learning rate; auto: by rows and epochs")
    warmup_steps: Count | Auto = Field("auto", description="optimizer steps of linear warm-up; at most a tenth of all steps is used")
    weight_decay: float = Field(0.0, ge=0, description="AdamW weight decay")
    max_grad_norm: float = Field(1.0, gt=0, description="gradient clipping norm")
    lora_r: Positive | Auto = Field("auto", description="LoRA rank; auto: by the number of rows")
    lora_alpha: Positive | Auto = Field("auto", description="LoRA scale: the update is multiplied by alpha / r; auto: 2 r, with rsLoRA r")
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] | Auto = Field(
        "auto", description="dropout before the LoRA update, 0–1; auto: 0.05 below 1000 rows"
    )
    use_rslora: bool = Field(False, description="rsLoRA: scale by alpha / sqrt(r)")
    use_dora: bool = Field(False, description="DoRA: learn the magnitude apart from the direction; about a quarter slower")
    # what it costs
    quantization: Quantization | Auto = Field(
        "auto", description="precision of the frozen base: none, nf4 (4-bit, QLoRA) or int8; auto: none where the memory allows, else nf4"
    )
    load_in_4bit: bool = Field(False, description="same as --quantization nf4")
    load_in_8bit: bool = Field(False, description="same as --quantization int8")
    gradient_checkpointing: bool | Auto = Field(
        "auto",
        description="recompute activations in the backward pass: less memory, about a third slower; auto: where the memory is too small",
    )
    precision: Precision = Field("auto", description="compute precision; auto: bf16 where the device has it, else fp32")
    bf16: bool = Field(False, description="same as --precision bf16")
    fp16: bool = Field(False, description="same as --precision fp16")
    sharding: Sharding = Field(
        "auto", description="spread the base over the processes (FSDP): none or full; auto: full where one card can't hold it"
    )
    # a long run
    evaluations_per_epoch: int = Field(1, ge=1, description="how often an epoch measures the validation loss")
    patience: int = Field(3, ge=0, description="stop after so many evaluations without a lower validation loss; 0: never")
    checkpoint_uri: str = Field(
        "",
        description="folder or s3://bucket/prefix for checkpoints; a run with the same data, settings and base resumes from there; "
        "empty: beside the adapter; none: no checkpoints",
    )
    checkpoint_every_s: float = Field(300, gt=0, description="seconds between two checkpoints")
    num_nodes: int = Field(1, ge=1, description="machines; more than one: the step starts a Kubeflow TrainJob and waits for it")
    node_resources: str = Field(
        "",
        description='with several machines: limits of each as JSON, such as {"nvidia.com/gpu": "8"}; empty: those of this step\'s own pod',
    )
    trainjob_runtime: str = Field("torch-distributed", description="with several machines: the Kubeflow Trainer runtime of the TrainJob")
    show_row: int = Field(0, ge=0, description="print the training row of this source line with its loss mask in colour, and end")
    seed: int = Field(42, description="seed of the initial weights, the dropout and the row order")

    @property
    def asked_precision(self) -> Precision:
        """The precision that `precision`, `bf16` and `fp16` ask for together."""
        return "bf16" if self.bf16 else "fp16" if self.fp16 else self.precision

    @property
    def asked_quantization(self) -> Quantization | Auto:
        """The quantisation that `quantization`, `load_in_4bit` and `load_in_8bit` ask for together."""
        return "nf4" if self.load_in_4bit else "int8" if self.load_in_8bit else self.quantization

    def for_the_ledger(self) -> dict[str, Any]:
        """What was asked for, as JSON, without the places of files."""
        return self.model_dump(mode="json", exclude=PATHS)

    @model_validator(mode="after")
    def _asked_once(self) -> Self:
        precisions = (("bf16", self.bf16), ("fp16", self.fp16), (self.precision, self.precision != "auto"))
        quantizations = (("nf4", self.load_in_4bit), ("int8", self.load_in_8bit), (self.quantization, self.quantization != "auto"))
        for what, all_asked in (("precision", precisions), ("quantization", quantizations)):
            asked = {name for name, on in all_asked if on}
            if len(asked) > 1:
                raise ValueError(f"{what} is asked for twice: {', '.join(sorted(asked))}")
        if self.use_dora and self.asked_quantization == "int8":
            raise ValueError("DoRA reads the base's weights, which bitsandbytes can't give back from int8: use nf4 or none")
        return self
