"""`python -m components.train`: data set + base model → LoRA adapter and its curves."""

from __future__ import annotations

import os

# Idle OpenMP threads that spin make training several times slower on a shared machine; libgomp reads this once, when torch loads it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import time
from pathlib import Path
from typing import Any

from components.common.base_model import resolve_base_model
from components.common.chat import ChatFormat
from components.common.errors import UserError, run_command
from components.common.files import sha256_file, whole_folder, write_atomically, write_json
from components.train.config import TrainSettings
from components.train.rows import Rows, encode_splits, read_splits


def main(argv: list[str] | None = None) -> int | None:
    """Run the train step."""
    settings, outputs = TrainSettings.parse("python -m components.train", argv)
    rows = read_splits(settings.dataset)
    base = resolve_base_model(settings.base_model)
    import torch  # after all that can be wrong with the inputs: it takes seconds

    try:
        info = _train(settings, rows, base)
    except torch.OutOfMemoryError:
        fix = "use --gradient_checkpointing, --load_in_4bit, or a smaller --batch_size or --max_length"
        raise UserError("the GPU's memory is full", fix=fix) from None
    facts = ("base_model", "base_fingerprint", "data_digest", "chat_digest", "steps", "best_step", "stopped_because")
    adapter = {"digest": sha256_file(settings.adapter / "adapter_model.safetensors")} | {name: info[name] for name in facts}
    outputs.write(metadata={"adapter": adapter, "metrics": info["metrics"]})
    return None


def _train(settings: TrainSettings, rows: Rows, base: Path) -> dict[str, Any]:
    """Load, train, write, report; the ledger of the run."""
    from accelerate import Accelerator
    from torch.utils.tensorboard import SummaryWriter

    from components.train.adapter import ledger, save_adapter
    from components.train.choices import decide, precision_name
    from components.train.curves import curves_page
    from components.train.model import add_lora, load_base, load_tokenizer
    from components.train.recipe import train

    started = time.monotonic()
    tokenizer = load_tokenizer(base)
    chat = ChatFormat.of_tokenizer(tokenizer, settings.system_prompt)
    data = encode_splits(rows, tokenizer, chat, settings.max_length)
    decided = decide(settings, base, len(data.train.examples))
    precision = precision_name(decided.compute)
    accelerator = Accelerator(mixed_precision="no" if precision == "fp32" else precision, cpu=decided.compute.device.type == "cpu")
    model = add_lora(load_base(base, decided.compute, load_in_4bit=settings.load_in_4bit), settings)

    with whole_folder(settings.adapter) as folder:
        print(f"live curves: tensorboard --logdir {folder / 'logs'}", flush=True)
        loaded = time.monotonic()
        with SummaryWriter(str(folder / "logs")) as writer:
            run = train(model, data, settings=settings, plan=decided.plan, pad_id=chat.pad_id, accelerator=accelerator, writer=writer)
        seconds = {"load": loaded - started, "train": time.monotonic() - loaded, "total": time.monotonic() - started}
        info = ledger(settings, run=run, data=data, choices=decided.choices, chat=chat, base=base, seconds=seconds)
        save_adapter(folder, model, tokenizer, chat, settings.base_model, info)

    write_atomically(settings.curves, curves_page(run, data, info))
    write_json(settings.metrics, info["metrics"])
    print(f"validation loss {run.validation_loss_base:.4f} → {run.best.validation_loss:.4f} (step {run.best.step} is kept)")
    print(f"adapter: {settings.adapter}, curves: {settings.curves}", flush=True)
    return info


if __name__ == "__main__":
    run_command(main)
