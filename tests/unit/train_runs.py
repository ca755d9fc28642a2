"""A made-up run of training, with the plan and the data that belong to it."""

from __future__ import annotations

import torch

from components.common.device import Compute
from components.train.plan import Choice, Plan
from components.train.rows import Data, Example, Split
from components.train.run import Evaluation, Run, Step

CHOICES = [
    Choice("max_length", 256, "99.5 % of the rows are shorter", "99.5% 的数据更短"),
    Choice("lora_r", 16, "below 2000 rows", "少于 2000 条"),
]


def make_run(steps: int = 40, evaluate_every: int = 10) -> Run:
    """Steps of 1,000 real tokens, 600 of them learned, in half a second each; the last evaluation but one is the best."""
    run = Run(validation_loss_base=3.0)
    for number in range(1, steps + 1):
        run.steps.append(Step(number, 3.0 - 1.5 * number / steps, 2.0 - number / steps, 2e-4 * (1 - number / steps), 1000, 600, 0.5))
        if number % evaluate_every == 0:
            run.evaluations.append(Evaluation(number, 2.0, 2.5 - number / steps))
    if len(run.evaluations) > 1:
        run.evaluations[-1] = run.evaluations[-1]._replace(validation_loss=2.4)
    run.best = min(run.evaluations, key=lambda point: point.validation_loss, default=Evaluation(0, 3.0, 3.0))
    return run


def make_plan(**changes: object) -> Plan:
    """A plan on the CPU."""
    values: dict[str, object] = {
        "compute": Compute(torch.device("cpu"), torch.float32, "device: cpu"),
        "precision": "fp32",
        "quantization": "none",
        "max_length": 256,
        "batch_size": 4,
        "accumulation": 2,
        "packing": True,
        "gradient_checkpointing": False,
        "epochs": 4.0,
        "steps_an_epoch": 10,
        "steps": 40,
        "evaluate_every": 10,
        "warmup_steps": 4,
        "learning_rate": 2e-4,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "lora_r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "patience": 3,
        "seed": 42,
    }
    return Plan(**values | changes)  # type: ignore[arg-type]


def make_data(lengths: tuple[int, ...] = (100, 60), dropped: list[int] | None = None) -> Data:
    """Rows of these lengths in both splits."""
    examples = [
        Example(torch.zeros(length, dtype=torch.int32), torch.ones(length, dtype=torch.bool), at) for at, length in enumerate(lengths, 1)
    ]
    return Data(Split(examples, dropped or []), Split(examples[:1], []), "d" * 64)
