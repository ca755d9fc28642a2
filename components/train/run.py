"""What happens in a run, and everything that a checkpoint must hold so that a resumed run equals the unbroken one (d10)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from components.train.checkpoint import Checkpoints

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

    def scalars(self) -> dict[str, float]:
        """The step's curves by name."""
        return {
            "train/loss": self.loss,
            "train/grad_norm": self.grad_norm,
            "train/learning_rate": self.learning_rate,
            "train/tokens_per_second": self.tokens / self.seconds,
        }


class Check(NamedTuple):
    """One thing that was tried before the first step, and what was found."""

    name: str
    passed: bool
    detail: str


class Evaluation(NamedTuple):
    """The losses after a step, in nats per trainable token; the training loss is of the steps since the evaluation before."""

    step: int
    train_loss: float
    validation_loss: float


@dataclass
class Run:
    """What happened.

    Attributes:
        best: the evaluation whose weights are kept.
        micro_batches: into how many parts the rows of a step are cut, times what `Plan` says; doubled when the memory was full.
        finished_early: why the run ended before its last step, all being well; empty otherwise.
        stopped_because: what went wrong, when something did.
        resumed_from: the steps after which the run was taken up again.
        out_of_memory: what was done about full memory, a sentence each.
        self_test: what was checked before the first step.
    """

    validation_loss_base: float = math.nan
    best: Evaluation | None = None
    steps: list[Step] = field(default_factory=list)
    evaluations: list[Evaluation] = field(default_factory=list)
    micro_batches: int = 1
    finished_early: str = ""
    stopped_because: str = ""
    resumed_from: list[int] = field(default_factory=list)
    out_of_memory: list[str] = field(default_factory=list)
    self_test: list[Check] = field(default_factory=list)

    @property
    def kept(self) -> Evaluation:
        """The evaluation of the adapter that is kept; there is one at the end of every run."""
        if self.best is None:
            raise ValueError("nothing was evaluated yet")
        return self.best

    def tokens_per_second(self, last_steps: int = 0) -> float:
        """Real tokens over the time spent in optimizer steps: in all of them, or in the last few."""
        steps = self.steps[-last_steps:]
        return sum(step.tokens for step in steps) / (sum(step.seconds for step in steps) or math.inf)

    def evaluations_since_best(self) -> int:
        """How many evaluations came after the best one."""
        return sum(point.step > self.kept.step for point in self.evaluations)

    def train_loss_since_evaluation(self) -> float:
        """Mean loss of the steps after the last evaluation, each token weighing the same; NaN without one."""
        since = self.evaluations[-1].step if self.evaluations else 0
        steps = [step for step in self.steps if step.number > since]
        tokens = sum(step.trainable_tokens for step in steps)
        return sum(step.loss * step.trainable_tokens for step in steps) / tokens if tokens else math.nan


@dataclass
class Training:
    """A run with all that moves in it: LoRA weights, optimizer, schedule, the weights that were best, and the last good ones."""

    model: Any
    parameters: Sequence[torch.Tensor]
    optimizer: Any
    schedule: Any
    scaler: Any
    run: Run = field(default_factory=Run)
    best_weights: Weights = field(default_factory=list)
    good_weights: Weights = field(default_factory=list)

    def apply(self) -> None:
        """Let the gradients change the weights."""
        self.good_weights = copy_of(self.parameters)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()

    def take_back(self) -> None:
        """Undo the last step: the weights it made give no finite loss."""
        if self.good_weights:
            restore(self.parameters, self.good_weights)

    def evaluated(self, found: Evaluation) -> None:
        """Note an evaluation, and keep its weights if they are the best; the first ones are, whatever they are like."""
        self.run.evaluations.append(found)
        if self.run.best is None or found.validation_loss < self.run.best.validation_loss:
            self.run.best, self.best_weights = found, copy_of(self.parameters)

    def keep_best(self) -> None:
        """Leave the model with the best weights."""
        restore(self.parameters, self.best_weights)

    def save(self, checkpoints: Checkpoints) -> bool:
        """Save everything that the next step depends on; whether it is stored."""
        state = {
            "weights": copy_of(self.parameters),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else {},
            "run": run_to_state(self.run),
            "best_weights": self.best_weights,
            "good_weights": self.good_weights,
        }
        return checkpoints.save(len(self.run.steps), state)

    def resume(self, found: tuple[int, dict[str, Any]] | None) -> bool:
        """Go on from a checkpoint's step and state, if there is one."""
        if found is None:
            return False
        step, state = found
        restore(self.parameters, state["weights"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.scaler:
            self.scaler.load_state_dict(state["scaler"])
        device = self.parameters[0].device
        self.best_weights = [weight.to(device) for weight in state["best_weights"]]
        self.good_weights = [weight.to(device) for weight in state["good_weights"]]
        self.run = run_of_state(state["run"])
        self.run.resumed_from.append(step)
        print(f"resumed after step {step}", flush=True)
        return True


def run_to_state(run: Run) -> dict[str, Any]:
    """A run as plain values."""
    return vars(run) | {
        "best": list(run.best) if run.best else None,
        "steps": [list(step) for step in run.steps],
        "evaluations": [list(point) for point in run.evaluations],
    }


def run_of_state(state: dict[str, Any]) -> Run:
    """The run that `run_to_state` made plain."""
    return Run(
        **state
        | {
            "best": Evaluation(*state["best"]) if state["best"] else None,
            "steps": [Step(*step) for step in state["steps"]],
            "evaluations": [Evaluation(*point) for point in state["evaluations"]],
        }
    )


def copy_of(parameters: Sequence[torch.Tensor]) -> Weights:
    """The parameters' present values."""
    return [parameter.detach().clone() for parameter in parameters]


@torch.no_grad()
def restore(parameters: Sequence[torch.Tensor], weights: Weights) -> None:
    """Give the parameters former values back."""
    for parameter, value in zip(parameters, weights, strict=True):
        parameter.copy_(value)
