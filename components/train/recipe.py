"""The training loop, from the base model's loss to the best adapter."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from components.common.errors import ModelError
from components.common.memory import peak_memory_bytes
from components.common.progress import progress
from components.train.batches import SEEDS_APART, collate, rows_of_steps
from components.train.checkpoint import Checkpoints
from components.train.loss import answer_nll
from components.train.model import evaluation_mode
from components.train.parallel import Processes
from components.train.plan import Plan
from components.train.rows import Data, Example
from components.train.run import Evaluation, Run, Step, Training
from components.train.stepping import accumulate_gradients, micro_batches
from components.train.stopping import Stopped, StopSignal
from components.train.tracking import Tracker

if TYPE_CHECKING:
    from accelerate import Accelerator

FINAL_LEARNING_RATE_SHARE = 0.1
SHOWN_STEPS = 20  # the progress line's speed is that of so many steps


def train(
    model: Any,
    data: Data,
    *,
    plan: Plan,
    pad_id: int,
    accelerator: Accelerator,
    tracker: Tracker | None = None,
    checkpoints: Checkpoints | None = None,
    checkpoint_every_s: float = math.inf,
) -> Run:
    """Train the LoRA weights of `model`, evaluate, and leave the model with the weights of the lowest validation loss.

    A loss that is no finite number ends the run early. The untrained weights are never the best ones: a run that only does harm must
    be seen by the gate, not hidden here.

    Args:
        checkpoints: where the state is saved, and from where a run that was stopped goes on; of several processes, the main one's.
        checkpoint_every_s: seconds between two checkpoints.

    Raises:
        ModelError: the base model's own loss is not finite. Stopped: a signal asked to stop, and the state is saved.
    """
    training = _set_up(model, plan, accelerator)
    processes = Processes.of(accelerator, sharded=plan.sharded)
    if not training.resume(processes.of_main(checkpoints.newest() if checkpoints else None)):
        training.run.validation_loss_base = _loss_of_the_base(model, data.validation.examples, plan, pad_id, accelerator)
    run = training.run
    if tracker:
        tracker.begin(run)
    last_saved = time.monotonic()
    with StopSignal() as stop, progress("train", plan.steps, done=len(run.steps)) as meter:
        for rows in islice(rows_of_steps(data.train.examples, plan, len(run.steps)), plan.steps - len(run.steps)):
            if not _step(training, rows, plan, pad_id, accelerator):
                break
            step = run.steps[-1]
            if tracker:
                tracker.log(step.number, step.scalars())
            meter.advance(note=_note(run))
            if step.number % plan.evaluate_every == 0 or step.number == plan.steps:
                _evaluate(training, data.validation.examples, plan, pad_id, accelerator)
                if tracker:
                    tracker.log(step.number, {"validation/loss": run.evaluations[-1].validation_loss})
                if plan.patience and run.evaluations_since_best() >= plan.patience and step.number < plan.steps:
                    run.finished_early = f"no lower validation loss in {plan.patience} evaluations"
                    print(f"finished early: {run.finished_early}", flush=True)
                    break
            stopped_by, saved = int(processes.max(stop.number)), False
            if checkpoints and (stopped_by or time.monotonic() - last_saved >= checkpoint_every_s):
                saved = training.save(checkpoints)
                last_saved = time.monotonic()
            if stopped_by:
                raise Stopped(step.number, stopped_by, saved=processes.of_main(saved))
    if run.stopped_because:
        print(f"WARNING: training stopped early: {run.stopped_because}; a lower --learning_rate may help", flush=True)
    if not run.evaluations or run.evaluations[-1].step != len(run.steps):
        _evaluate(training, data.validation.examples, plan, pad_id, accelerator)
    training.keep_best()
    return run


def _set_up(model: Any, plan: Plan, accelerator: Accelerator) -> Training:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    adamw = torch.optim.AdamW(parameters, lr=plan.learning_rate, weight_decay=plan.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(adamw, lambda step: learning_rate_share(step, plan))
    return Training(model, parameters, accelerator.prepare(adamw), schedule, accelerator.scaler)


def _step(training: Training, rows: Sequence[Example], plan: Plan, pad_id: int, accelerator: Accelerator) -> bool:
    """One optimizer step; False, with the last good weights, when its loss or gradient is no finite number."""
    started = time.monotonic()
    run, number = training.run, len(training.run.steps) + 1
    tokens, trainable = sum(len(row.ids) for row in rows), sum(int(row.mask[1:].sum()) for row in rows)
    # Dropout follows from the seed, the step and the process alone: a resumed run needs no state of it.
    torch.manual_seed(plan.seed + SEEDS_APART * number + accelerator.process_index)
    loss = accumulate_gradients(training.model, rows, plan, pad_id, accelerator, run)
    grad_norm = float(accelerator.clip_grad_norm_(training.parameters, plan.max_grad_norm) or 0.0)
    if not math.isfinite(loss):
        training.take_back()
        run.stopped_because = f"the loss of step {number} is {loss}"
        return False
    if not math.isfinite(grad_norm) and accelerator.scaler is None:  # fp16's scaler skips such a step by itself
        run.stopped_because = f"the gradient of step {number} is {grad_norm}"
        return False
    rate = float(training.schedule.get_last_lr()[0])
    training.apply()
    run.steps.append(Step(number, loss, grad_norm, rate, tokens, trainable, time.monotonic() - started))
    return True


def _note(run: Run) -> str:
    """What the progress line says of the last steps: tokens are real ones, and how many of them are learned."""
    step, last = run.steps[-1], run.steps[-SHOWN_STEPS:]
    learned = sum(step.trainable_tokens for step in last) / sum(step.seconds for step in last)
    speed = f"{run.tokens_per_second(SHOWN_STEPS):.0f} tokens/s ({learned:.0f} learned)"
    memory = max(peak_memory_bytes().values()) / 2**30
    return f"loss {step.loss:.3f}, gradient norm {step.grad_norm:.2g}, {speed}, peak memory {memory:.1f} GiB"


def _loss_of_the_base(model: Any, rows: Sequence[Example], plan: Plan, pad_id: int, accelerator: Accelerator) -> float:
    base = mean_nll(model, rows, plan, pad_id, accelerator)
    if not math.isfinite(base):
        raise ModelError(f"the base model's own loss is {base}", fix="use --precision fp32, or another base model")
    print(f"validation loss of the base model: {base:.4f}", flush=True)
    return base


def _evaluate(training: Training, rows: Sequence[Example], plan: Plan, pad_id: int, accelerator: Accelerator) -> None:
    """Measure the validation loss, and keep the weights if it is the lowest so far."""
    run = training.run
    train_loss = run.train_loss_since_evaluation()
    loss = mean_nll(training.model, rows, plan, pad_id, accelerator)
    training.evaluated(Evaluation(len(run.steps), train_loss, loss))
    print(f"step {len(run.steps)}: training loss {train_loss:.4f}, validation loss {loss:.4f}", flush=True)


@torch.no_grad()
def mean_nll(model: Any, rows: Sequence[Example], plan: Plan, pad_id: int, accelerator: Accelerator) -> float:
    """Negative log-likelihood of a split's answers, in nats per trainable token, over all processes; its memory does not grow (d09)."""
    evaluation_mode(model)
    processes = Processes.of(accelerator, sharded=plan.sharded)
    total = torch.zeros((), device=accelerator.device, dtype=torch.float64)
    for group, weight in micro_batches(rows, plan.batch_size, processes=processes):
        with accelerator.autocast():
            nll = answer_nll(model, collate(group, packed=plan.packing, pad_id=pad_id, device=accelerator.device))
        total += weight * nll.double()
    return processes.sum(float(total)) / sum(int(row.mask[1:].sum()) for row in rows)


def learning_rate_share(step: int, plan: Plan) -> float:
    """Share of the peak learning rate at a step, from 0: linear warm-up, then a cosine down to a tenth (arXiv 1608.03983)."""
    if step < plan.warmup_steps:
        return (step + 1) / (plan.warmup_steps + 1)
    done = min(1.0, (step - plan.warmup_steps) / max(1, plan.steps - plan.warmup_steps))
    return FINAL_LEARNING_RATE_SHARE + (1 - FINAL_LEARNING_RATE_SHARE) * (1 + math.cos(math.pi * done)) / 2
