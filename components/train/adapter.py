"""The adapter folder: LoRA weights, chat format, tokenizer, and the ledger of how they came to be."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from components.common.chat import ChatFormat
from components.common.files import write_json

INFO_FILE = "train_info.json"


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
