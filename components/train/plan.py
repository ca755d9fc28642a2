"""How a run will go: the settings with every `auto` resolved, decided before the model is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from components.common.device import Compute
from components.train.config import Quantization


class Choice(NamedTuple):
    """A value that the program chose, or the user's value where it could be kept; with the reason in English and Chinese."""

    name: str
    value: str | int | float
    reason: str
    reason_zh: str


@dataclass(frozen=True)
class Plan:
    """Everything that decides what is computed.

    Attributes:
        precision: bf16, fp16 or fp32, of the forward and backward pass; the LoRA weights stay in fp32.
        max_length: longest row, tokens.
        batch_size: rows in a micro-batch of one process.
        accumulation: micro-batches in an optimizer step of one process.
        packing: rows of a micro-batch lie end to end in one sequence, instead of being padded.
        steps_an_epoch: optimizer steps in one pass over the training split.
        evaluate_every: optimizer steps between two measurements of the validation loss.
        sharded: the base is spread over the processes, because no card holds it whole.
        processes: processes that train together; an optimizer step takes batch_size * accumulation * processes rows.
    """

    compute: Compute
    precision: str
    quantization: Quantization
    max_length: int
    batch_size: int
    accumulation: int
    packing: bool
    gradient_checkpointing: bool
    epochs: float
    steps_an_epoch: int
    steps: int
    evaluate_every: int
    warmup_steps: int
    learning_rate: float
    weight_decay: float
    max_grad_norm: float
    lora_r: int
    lora_alpha: int
    lora_dropout: float
    use_rslora: bool
    use_dora: bool
    patience: int
    seed: int
    processes: int = 1
    sharded: bool = False

    @property
    def rows_a_step(self) -> int:
        """Training rows in one optimizer step: the effective batch."""
        return self.batch_size * self.accumulation * self.processes
