"""`python -m components.train`: data set + base model → LoRA adapter and its curves."""

from __future__ import annotations

import os

# Idle OpenMP threads that spin make training several times slower on a shared machine; libgomp reads this once, when torch loads it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import shutil
import sys
import time
from pathlib import Path
from typing import Any

from components.common.base_model import base_fingerprint, resolve_base_model
from components.common.chat import ChatFormat
from components.common.contract import StepOutputs
from components.common.errors import UserError, run_command
from components.common.files import sha256_file, whole_folder, write_atomically, write_json
from components.train.config import NO_CHECKPOINTS, TrainSettings
from components.train.launch import (
    command_of,
    is_main_process,
    processes_of_environment,
    processes_to_start,
    quiet_unless_main,
    run_processes,
    use_own_card,
)
from components.train.rows import Data, Rows, encode_splits, read_splits, within


def main(argv: list[str] | None = None) -> int | None:
    """Run the train step."""
    settings, outputs = TrainSettings.parse("python -m components.train", argv)
    quiet_unless_main()
    if settings.show_row:
        from components.train.show_row import show

        show(settings, resolve_base_model(settings.base_model))
        return None
    rows = read_splits(settings.dataset)
    if settings.num_nodes > 1:
        from components.train.nodes import train_on_nodes

        _report(outputs, train_on_nodes(settings), settings)
        return None
    base = resolve_base_model(settings.base_model)
    import torch  # after all that can be wrong with the inputs: it takes seconds

    from components.train.stopping import Stopped

    if processes := processes_to_start():
        print(f"processes: {processes} (one for each card of this machine)", flush=True)
        return run_processes(processes, command_of(argv))
    use_own_card()
    try:
        info = _train(settings, rows, base)
    except torch.OutOfMemoryError:
        fix = "use --gradient_checkpointing true, --quantization nf4, or a smaller --batch_size or --max_length"
        raise UserError("the GPU's memory is full", fix=fix) from None
    except Stopped as stopped:
        if is_main_process():
            print(stopped, file=sys.stderr)
        return stopped.exit_code
    if info is None:
        return None
    _report(outputs, info, settings)
    return None


def _report(outputs: StepOutputs, info: dict[str, Any], settings: TrainSettings) -> None:
    """Tell KFP what was made."""
    facts = ("base_model", "base_fingerprint", "data_digest", "chat_digest", "steps", "best_step", "stopped_because")
    adapter = {"digest": sha256_file(settings.adapter / "adapter_model.safetensors")} | {name: info[name] for name in facts}
    outputs.write(metadata={"adapter": adapter, "metrics": info["metrics"]})


def _train(settings: TrainSettings, rows: Rows, base: Path) -> dict[str, Any] | None:
    """Load, decide, train, write, report; the ledger of the run. Of several processes the main one writes, the others have none."""
    from accelerate import Accelerator

    from components.common.loading import load_tokenizer
    from components.train.adapter import save_adapter
    from components.train.checkpoint import run_key
    from components.train.choices import decide
    from components.train.curves import curves_page
    from components.train.forecast import forecast_of
    from components.train.ledger import ledger
    from components.train.mlflow_run import check_mlflow
    from components.train.model import add_lora, load_base
    from components.train.recipe import train
    from components.train.selftest import self_test
    from components.train.sharding import shard_base

    started = time.monotonic()
    check_mlflow()
    tokenizer = load_tokenizer(base)
    chat = ChatFormat.of_tokenizer(tokenizer, settings.system_prompt)
    data = encode_splits(rows, tokenizer, chat)
    plan, choices = decide(settings, base, *_lengths(data), processes=processes_of_environment())
    data = within(data, plan.max_length)
    key = run_key(_what_decides(data, base, chat, plan))
    accelerator = Accelerator(mixed_precision="no" if plan.precision == "fp32" else plan.precision, cpu=plan.compute.device.type == "cpu")
    model = add_lora(load_base(base, plan), plan)
    if plan.sharded:
        shard_base(model, accelerator.device)
    loaded = time.monotonic()
    plan, choices, checks = self_test(model, data.train.examples, plan, choices, chat, accelerator)

    if not accelerator.is_main_process:
        train(model, data, plan=plan, pad_id=chat.pad_id, accelerator=accelerator)
        accelerator.end_training()
        return None
    checkpoints = _checkpoints(settings, key)
    logs = settings.adapter.with_name(f"{settings.adapter.name}.logs")
    with whole_folder(settings.adapter) as folder, _tracker(settings, logs, key, plan) as tracker:
        run = train(
            model,
            data,
            plan=plan,
            pad_id=chat.pad_id,
            accelerator=accelerator,
            tracker=tracker,
            checkpoints=checkpoints,
            checkpoint_every_s=settings.checkpoint_every_s,
        )
        run.self_test = checks
        seconds = {"load": loaded - started, "train": time.monotonic() - loaded, "total": time.monotonic() - started}
        tracking = tracker.facts()
        info = ledger(
            settings,
            plan,
            run=run,
            data=data,
            choices=choices,
            chat=chat,
            base=base,
            seconds=seconds,
            tracking=tracking,
            forecast_bytes=forecast_of(base, plan, [len(row.ids) for row in data.train.examples]).total_bytes,
        )
        tracker.close_logs()
        shutil.copytree(logs, folder / "logs")
        save_adapter(folder, model, tokenizer, chat, settings.base_model, info)
        write_atomically(settings.curves, curves_page(run, data, info))
        write_json(settings.metrics, info["metrics"])
        tracker.finish({"train_info.json": folder / "train_info.json", "train_curves.html": settings.curves})
    accelerator.end_training()
    if checkpoints:
        checkpoints.clear()
    print(f"validation loss {run.validation_loss_base:.4f} → {run.kept.validation_loss:.4f} (step {run.kept.step} is kept)")
    print(f"adapter: {settings.adapter}, curves: {settings.curves}", flush=True)
    return info


def _tracker(settings: TrainSettings, logs: Path, key: str, plan: Any) -> Any:
    from components.train.tracking import Tracker

    return Tracker(logs, settings.for_the_ledger(), settings.adapter.name, key=key, gpus=plan.processes)


def _lengths(data: Data) -> tuple[list[int], list[int]]:
    """Tokens of every training row, and how many of them are learned."""
    rows = data.train.examples
    return [len(row.ids) for row in rows], [int(row.mask[1:].sum()) for row in rows]


def _what_decides(data: Data, base: Path, chat: ChatFormat, plan: Any) -> dict[str, Any]:
    """Everything that the result follows from: a run goes on from a checkpoint of the same, and of nothing else.

    How the rows of a step are cut to fit the memory is not in it: another node may have less, and the gradients are the same.
    """
    from components.train.checkpoint import code_version

    cut = {"compute", "batch_size", "accumulation", "gradient_checkpointing", "processes", "sharded"}
    facts = {name: value for name, value in vars(plan).items() if name not in cut}
    facts |= {"rows_a_step": plan.rows_a_step, "device": plan.compute.device.type}
    digests = {"data": data.digest, "base": base_fingerprint(base), "chat": chat.digest, "code": code_version()}
    return facts | digests


def _checkpoints(settings: TrainSettings, key: str) -> Any:
    from components.train.checkpoint import Checkpoints

    if settings.checkpoint_uri == NO_CHECKPOINTS:
        return None
    return Checkpoints.at(
        settings.checkpoint_uri or str(settings.adapter.absolute().with_name(f"{settings.adapter.name}.checkpoints")), key
    )


if __name__ == "__main__":
    run_command(main)
