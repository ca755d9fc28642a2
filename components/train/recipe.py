"""The training loop, from the base model's loss to the best adapter."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from components.common.errors import ModelError
from components.common.progress import progress
from components.train.choices import Plan
from components.train.config import TrainSettings
from components.train.loss import answer_nll, check_loss
from components.train.model import evaluation_mode
from components.train.rows import Batch, Data, Example, batches_of_similar_length, collate

if TYPE_CHECKING:
    from accelerate import Accelerator

FINAL_LEARNING_RATE_SHARE = 0.1
SHOWN_STEPS = 20  # the progress line's speed is that of so many steps
Weights = list[torch.Tensor]


class Step(NamedTuple):
    """One optimizer step; `loss` in nats per trainable token; `tokens` are real ones, padding is never counted."""

    number: int
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    trainable_tokens: int
    seconds: float


class Checkpoint(NamedTuple):
    """The adapter after a step; losses in nats per trainable token, the training loss of the steps since the checkpoint before."""

    step: int
    train_loss: float
    validation_loss: float
    weights: Weights


@dataclass
class Run:
    """What happened. `checkpoints` holds the losses of every epoch, without weights; `best` is the adapter that is kept."""

    validation_loss_base: float
    best: Checkpoint
    steps: list[Step] = field(default_factory=list)
    checkpoints: list[Checkpoint] = field(default_factory=list)
    stopped_because: str = ""

    def tokens_per_second(self, last_steps: int = 0) -> float:
        """Real tokens over the time spent in optimizer steps: in all of them, or in the last few."""
        steps = self.steps[-last_steps:]
        return sum(step.tokens for step in steps) / (sum(step.seconds for step in steps) or math.inf)


def train(
    model: Any,
    data: Data,
    *,
    settings: TrainSettings,
    plan: Plan,
    pad_id: int,
    accelerator: Accelerator,
    writer: Any,
) -> Run:
    """Train the LoRA weights of `model`, evaluate after every epoch, and leave the model with those of the lowest validation loss.

    A loss that is no finite number ends the run early. The untrained weights are never the best ones: a run that only does harm must
    be seen by the gate, not hidden here.

    Args:
        writer: a TensorBoard `SummaryWriter`.

    Raises:
        ModelError: the base model's own loss is not finite, or can't be computed in chunks.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adamw = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(adamw, lambda step: learning_rate_share(step, plan))
    optimizer = accelerator.prepare(adamw)
    validation_rows = data.validation.examples
    run = _before_training(model, validation_rows, plan, pad_id, accelerator)
    writer.add_scalar("validation/loss", run.validation_loss_base, 0)
    finite = copy_of(parameters)
    with progress("train", plan.steps) as meter:
        for number, micro_batches in enumerate(islice(optimizer_steps(data.train.examples, plan, settings.seed), plan.steps), 1):
            started = time.monotonic()
            batches = [collate(rows, pad_id, accelerator.device) for rows in micro_batches]
            loss = accumulate_gradients(model, batches, accelerator)
            grad_norm = float(accelerator.clip_grad_norm_(parameters, settings.max_grad_norm) or 0.0)
            if not math.isfinite(loss):
                restore(parameters, finite)
                run.stopped_because = f"the loss of step {number} is {loss}"
                break
            if not math.isfinite(grad_norm) and accelerator.scaler is None:  # fp16's scaler skips such a step by itself
                run.stopped_because = f"the gradient of step {number} is {grad_norm}"
                break
            finite = copy_of(parameters)
            optimizer.step()
            rate = float(schedule.get_last_lr()[0])
            schedule.step()
            optimizer.zero_grad()
            tokens = sum(int(batch.attention.sum()) for batch in batches)
            run.steps.append(Step(number, loss, grad_norm, rate, tokens, trainable_tokens(batches), time.monotonic() - started))
            _log_step(writer, run.steps[-1])
            meter.advance(note=f"loss {loss:.3f}, {run.tokens_per_second(SHOWN_STEPS):.0f} tokens/s")
            if number % plan.steps_an_epoch == 0 or number == plan.steps:
                _evaluate(run, model, parameters, validation_rows, plan.batch_size, pad_id, accelerator)
                writer.add_scalar("validation/loss", run.checkpoints[-1].validation_loss, number)
    if run.stopped_because:
        print(f"WARNING: training stopped early: {run.stopped_because}; a lower --learning_rate may help", flush=True)
    if not run.checkpoints:  # stopped before the first epoch's end
        _evaluate(run, model, parameters, validation_rows, plan.batch_size, pad_id, accelerator)
    restore(parameters, run.best.weights)
    return run


def accumulate_gradients(model: Any, batches: Sequence[Batch], accelerator: Accelerator) -> float:
    """Gradients of one optimizer step, from one or more micro-batches; the loss in nats per trainable token of the whole step.

    Every token weighs the same, however the rows are cut into micro-batches (d14).
    """
    model.train()
    tokens, total = trainable_tokens(batches), 0.0
    for batch in batches:
        with accelerator.autocast():
            nll = answer_nll(model, batch)
        accelerator.backward(nll / tokens)
        total += float(nll.detach())
    return total / tokens


@torch.no_grad()
def mean_nll(model: Any, rows: Sequence[Example], batch_size: int, pad_id: int, accelerator: Accelerator) -> float:
    """Negative log-likelihood of a split's answers, in nats per trainable token."""
    evaluation_mode(model)
    by_length = sorted(rows, key=lambda row: len(row.ids))
    total, tokens = 0.0, 0
    for at in range(0, len(by_length), batch_size):
        batch = collate(by_length[at : at + batch_size], pad_id, accelerator.device)
        with accelerator.autocast():
            total += float(answer_nll(model, batch))
        tokens += trainable_tokens([batch])
    return total / tokens


def optimizer_steps(rows: Sequence[Example], plan: Plan, seed: int) -> Iterator[list[list[Example]]]:
    """The rows of each optimizer step as micro-batches, epoch after epoch without end; an epoch's last step may be smaller."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        batches = batches_of_similar_length(rows, plan.batch_size, generator)
        for at in range(0, len(batches), plan.accumulation):
            yield batches[at : at + plan.accumulation]


def learning_rate_share(step: int, plan: Plan) -> float:
    """Share of the peak learning rate at a step, from 0: linear warm-up, then a cosine down to a tenth (arXiv 1608.03983)."""
    if step < plan.warmup_steps:
        return (step + 1) / (plan.warmup_steps + 1)
    done = min(1.0, (step - plan.warmup_steps) / max(1, plan.steps - plan.warmup_steps))
    return FINAL_LEARNING_RATE_SHARE + (1 - FINAL_LEARNING_RATE_SHARE) * (1 + math.cos(math.pi * done)) / 2


def trainable_tokens(batches: Sequence[Batch]) -> int:
    """Tokens whose prediction counts in the loss."""
    return sum(int(batch.mask[:, 1:].sum()) for batch in batches)


def copy_of(parameters: Sequence[torch.Tensor]) -> Weights:
    """The parameters' present values."""
    return [parameter.detach().clone() for parameter in parameters]


@torch.no_grad()
def restore(parameters: Sequence[torch.Tensor], weights: Weights) -> None:
    """Give the parameters former values back."""
    for parameter, value in zip(parameters, weights, strict=True):
        parameter.copy_(value)


def _before_training(model: Any, validation_rows: Sequence[Example], plan: Plan, pad_id: int, accelerator: Accelerator) -> Run:
    evaluation_mode(model)
    with accelerator.autocast():
        check_loss(model, collate(validation_rows[:1], pad_id, accelerator.device))
    base = mean_nll(model, validation_rows, plan.batch_size, pad_id, accelerator)
    if not math.isfinite(base):
        raise ModelError(f"the base model's own loss is {base}", fix="use --precision fp32, or another base model")
    print(f"validation loss of the base model: {base:.4f}", flush=True)
    return Run(base, Checkpoint(0, math.nan, math.inf, []))


def _evaluate(
    run: Run, model: Any, parameters: Weights, validation_rows: Sequence[Example], batch_size: int, pad_id: int, accelerator: Accelerator
) -> None:
    """Measure the validation loss, and keep the weights if it is the lowest so far."""
    since = run.checkpoints[-1].step if run.checkpoints else 0
    steps = [step for step in run.steps if step.number > since]
    train_loss = sum(step.loss * step.trainable_tokens for step in steps) / (sum(step.trainable_tokens for step in steps) or math.inf)
    loss = mean_nll(model, validation_rows, batch_size, pad_id, accelerator)
    checkpoint = Checkpoint(run.steps[-1].number if run.steps else 0, train_loss, loss, [])
    run.checkpoints.append(checkpoint)
    if not run.best.weights or loss < run.best.validation_loss:
        run.best = checkpoint._replace(weights=copy_of(parameters))
    print(f"step {checkpoint.step}: training loss {train_loss:.4f}, validation loss {loss:.4f}", flush=True)


def _log_step(writer: Any, step: Step) -> None:
    writer.add_scalar("train/loss", step.loss, step.number)
    writer.add_scalar("train/grad_norm", step.grad_norm, step.number)
    writer.add_scalar("train/learning_rate", step.learning_rate, step.number)
    writer.add_scalar("train/tokens_per_second", step.tokens / step.seconds, step.number)
