"""The run ledger: everything that made an adapter, and what it took."""

from __future__ import annotations

import math
import platform
import statistics
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from components.common.base_model import base_fingerprint
from components.common.chat import ChatFormat
from components.common.memory import peak_memory_bytes
from components.train.checkpoint import code_version
from components.train.config import TrainSettings
from components.train.plan import Choice, Plan
from components.train.rows import Data
from components.train.run import Run, Step
from components.train.utilisation import shape_of, utilisation

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets")
WARM_UP_SHARE = 0.1  # of the steps, which the typical speed leaves out
PROJECT = Path(__file__).resolve().parents[2]


def ledger(
    settings: TrainSettings,
    plan: Plan,
    *,
    run: Run,
    data: Data,
    choices: Sequence[Choice],
    chat: ChatFormat,
    base: Path,
    seconds: Mapping[str, float],
    tracking: Mapping[str, Any],
    forecast_bytes: int | None = None,
) -> dict[str, Any]:
    """The ledger as JSON values.

    Args:
        seconds: wall time of each phase of this process, with `train` and `total`.
        tracking: what `Tracker.facts` says.
        forecast_bytes: the memory that was expected before the start; None without a forecast.
    """
    return {
        "code": {"version": code_version(), "git_commit": git_commit(PROJECT)},
        "base_model": settings.base_model,
        "base_fingerprint": base_fingerprint(base),
        "data_digest": data.digest,
        "chat_digest": chat.digest,
        "settings": settings.for_the_ledger(),
        "plan": plan_facts(plan),
        "choices": [choice._asdict() for choice in choices],
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        "rows": {
            name: {"used": len(split.examples), "dropped": len(split.dropped_lines), "dropped_lines": split.dropped_lines}
            for name, split in (("train", data.train), ("validation", data.validation))
        },
        "steps": len(run.steps),
        "best_step": run.kept.step,
        "finished_early": run.finished_early,
        "stopped_because": run.stopped_because,
        "resumed_from": run.resumed_from,
        "out_of_memory": run.out_of_memory,
        "self_test": [check._asdict() for check in run.self_test],
        "tokens": sum(step.tokens for step in run.steps),
        "trainable_tokens": sum(step.trainable_tokens for step in run.steps),
        "speed": speed(run.steps),
        "utilisation": _utilisation(plan, run.steps, data, base),
        "metrics": metrics(run, data, seconds),
        "evaluations": [
            {"step": point.step, "train_loss": _finite(point.train_loss), "validation_loss": _finite(point.validation_loss)}
            for point in run.evaluations
        ],
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "hours": hours(plan, run, seconds["total"]),
        "peak_memory_bytes": peak_memory_bytes(),
        "memory_forecast_bytes": forecast_bytes,
        "energy_wh": tracking["energy_wh"],
        "energy_note": tracking["energy_note"],
        "mlflow": tracking["mlflow"],
    }


def metrics(run: Run, data: Data, seconds: Mapping[str, float]) -> dict[str, float]:
    """The step's flat numbers; losses in nats per trainable token, those of the kept adapter. One that is not finite is left out."""
    values = {
        "train_loss": run.kept.train_loss,
        "validation_loss": run.kept.validation_loss,
        "validation_loss_base": run.validation_loss_base,
        "tokens_per_second": round(run.tokens_per_second(), 1),
        "seconds": round(seconds["total"], 1),
        "rows_dropped": len(data.train.dropped_lines) + len(data.validation.dropped_lines),
    }
    return {name: value for name, value in values.items() if math.isfinite(value)}


def speed(steps: Sequence[Step]) -> dict[str, float]:
    """Tokens over the seconds spent in optimizer steps, padding not counted: over all steps, and the median step after warming up."""
    if not steps:
        return {}
    warm = steps[int(len(steps) * WARM_UP_SHARE) :]
    total_s = sum(step.seconds for step in steps)
    return {
        "tokens_per_second": round(sum(step.tokens for step in steps) / total_s, 1),
        "trainable_tokens_per_second": round(sum(step.trainable_tokens for step in steps) / total_s, 1),
        "median_step_tokens_per_second": round(statistics.median(step.tokens / step.seconds for step in warm), 1),
    }


def hours(plan: Plan, run: Run, total_s: float) -> dict[str, float]:
    """Accelerator-hours and CPU core-hours of the whole run.

    Of the processes before the last resumption only their optimizer steps are known: the rest of their time is not in it.
    """
    import torch

    resumed_after = run.resumed_from[-1] if run.resumed_from else 0
    wall_h = (total_s + sum(step.seconds for step in run.steps if step.number <= resumed_after)) / 3600
    on_gpu = plan.compute.device.type == "cuda"
    return {
        "accelerator": round(plan.processes * wall_h if on_gpu else 0.0, 4),
        "cpu_core": round(plan.processes * torch.get_num_threads() * wall_h, 4),
    }


def plan_facts(plan: Plan) -> dict[str, Any]:
    """The plan as JSON values."""
    compute = {"device": str(plan.compute.device), "dtype": str(plan.compute.dtype).removeprefix("torch."), "reason": plan.compute.reason}
    return {name: value for name, value in vars(plan).items() if name != "compute"} | {"compute": compute, "rows_a_step": plan.rows_a_step}


def git_commit(project: Path) -> str | None:
    """The commit that a checkout stands on, read from its files; None outside of one, as in an image."""
    git = project / ".git"
    try:
        if git.is_file():  # a worktree's points elsewhere
            git = (project / git.read_text(encoding="utf-8").removeprefix("gitdir:").strip()).resolve()
        head = (git / "HEAD").read_text(encoding="utf-8").strip()
        if not head.startswith("ref: "):
            return head
        name = head.removeprefix("ref: ")
        shared = git / "commondir"
        common = (git / shared.read_text(encoding="utf-8").strip()).resolve() if shared.is_file() else git
        if (common / name).is_file():
            return (common / name).read_text(encoding="utf-8").strip()
        packed = (common / "packed-refs").read_text(encoding="utf-8").splitlines()
        return next((line.split()[0] for line in packed if line.endswith(f" {name}")), None)
    except OSError:
        return None


def _utilisation(plan: Plan, steps: Sequence[Step], data: Data, base: Path) -> dict[str, Any]:
    import torch

    return utilisation(
        shape_of(base),
        [len(example.ids) for example in data.train.examples],
        tokens=sum(step.tokens for step in steps),
        trainable_tokens=sum(step.trainable_tokens for step in steps),
        seconds=sum(step.seconds for step in steps),
        card=torch.cuda.get_device_name(0) if plan.compute.device.type == "cuda" else "",
        cards=plan.processes,
        precision=plan.precision,
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
