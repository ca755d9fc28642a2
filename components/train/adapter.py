"""The adapter folder: LoRA weights, chat format, tokenizer, and the ledger of how they came to be."""

from __future__ import annotations

import errno
import json
import math
import os
import platform
import resource
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from components.common.chat import ChatFormat
from components.common.files import sha256_text, write_json
from components.train.choices import Choice
from components.train.config import TrainSettings
from components.train.recipe import Run
from components.train.rows import Data

INFO_FILE = "train_info.json"
LIBRARIES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "datasets")
PATHS = {"dataset", "adapter", "curves", "metrics"}  # where things lie says nothing about what was trained


def save_adapter(folder: Path, model: Any, tokenizer: Any, chat: ChatFormat, base_model: str, info: dict[str, Any]) -> None:
    """Write everything that merging and a reader need; `train_info.json` last."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    config = model.peft_config["default"]
    config.base_model_name_or_path = base_model
    config.inference_mode = True
    config.target_modules = sorted(config.target_modules)  # the library's set has another order in every process
    config.save_pretrained(folder)
    weights = get_peft_model_state_dict(model, save_embedding_layers=False)
    tokenizer.chat_template = chat.template
    with disk_errors(folder):
        tensors = {name: weight.cpu().contiguous() for name, weight in weights.items()}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        tokenizer.save_pretrained(folder)
    chat.save(folder)
    write_json(folder / INFO_FILE, info)


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn a library's own error about a full disk into the usual OSError; the tokenizers library raises a bare Exception."""
    try:
        yield
    except Exception as error:
        if "os error 28" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from None
        raise


def ledger(
    settings: TrainSettings,
    *,
    run: Run,
    data: Data,
    choices: Sequence[Choice],
    chat: ChatFormat,
    base: Path,
    seconds: dict[str, float],
) -> dict[str, Any]:
    """Everything that made this adapter, as JSON: settings, choices, digests, versions, rows, losses, time, memory."""
    return {
        "base_model": settings.base_model,
        "base_fingerprint": base_fingerprint(base),
        "data_digest": data.digest,
        "chat_digest": chat.digest,
        "settings": settings.model_dump(mode="json", exclude=PATHS),
        "choices": [choice._asdict() for choice in choices],
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
        "rows": {
            name: {"used": len(split.examples), "dropped": len(split.dropped_lines), "dropped_lines": split.dropped_lines}
            for name, split in (("train", data.train), ("validation", data.validation))
        },
        "steps": len(run.steps),
        "best_step": run.best.step,
        "stopped_because": run.stopped_because,
        "tokens": sum(step.tokens for step in run.steps),
        "trainable_tokens": sum(step.trainable_tokens for step in run.steps),
        "metrics": metrics(run, data, seconds),
        "epochs": [
            {"step": point.step, "train_loss": _finite(point.train_loss), "validation_loss": _finite(point.validation_loss)}
            for point in run.checkpoints
        ],
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "peak_memory_bytes": peak_memory_bytes(),
    }


def metrics(run: Run, data: Data, seconds: dict[str, float]) -> dict[str, float]:
    """The step's flat numbers; losses in nats per trainable token, those of the kept adapter. One that is not finite is left out."""
    values = {
        "train_loss": run.best.train_loss,
        "validation_loss": run.best.validation_loss,
        "validation_loss_base": run.validation_loss_base,
        "tokens_per_second": round(run.tokens_per_second(), 1),
        "seconds": round(seconds["total"], 1),
        "rows_dropped": len(data.train.dropped_lines) + len(data.validation.dropped_lines),
    }
    return {name: value for name, value in values.items() if math.isfinite(value)}


def base_fingerprint(base: Path) -> str:
    """The sha256 of config.json and of the names and sizes of the weight files: cheap for 15 GB, where a digest of the bytes is not."""
    weights = sorted((path.name, path.stat().st_size) for path in base.glob("*.safetensors"))
    return sha256_text(json.dumps([(base / "config.json").read_text(encoding="utf-8"), weights]))


def peak_memory_bytes() -> dict[str, int]:
    """Most memory in use so far: the process's, and the GPU's where there is one."""
    import torch

    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available():
        peak["gpu"] = torch.cuda.max_memory_allocated()
    return peak


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
