"""The merged model's folder: written so that any tool loads it, then read back to prove it (d07).

The same inputs give the same bytes: no time, path or measured value is in it, because the folder's digest is the model's name.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from components.common.chat import ChatFormat
from components.common.errors import ModelError, StorageError
from components.common.files import write_json
from components.merge.rows import PROBES
from components.merge.streaming import Weights, write_shards

INFO_FILE = "merge_info.json"
SPARE_BYTES = 64 << 20  # tokenizer and JSON files


def require_space(folder: Path, needed_bytes: int) -> None:
    """Look for a full disk before the merge, not after it.

    Raises:
        StorageError: the folder's disk has too little space for the model.
    """
    needed, free = needed_bytes + SPARE_BYTES, shutil.disk_usage(folder).free
    if free < needed:
        raise StorageError(
            f"the disk is too full: the merged model needs {needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free",
            where=str(folder),
            fix="free some space, or choose another --output, then run the step again",
        )


def write_model_folder(folder: Path, weights: Weights, dtype: torch.dtype, tokenizer: Any, chat: ChatFormat, info: dict[str, Any]) -> None:
    """Write safetensors, config, generation config, tokenizer, chat format and `merge_info.json`."""
    write_shards(weights, folder, dtype)
    model = weights.structure.empty_model(dtype)
    config, generation = model.config, _generation_config(weights.structure.files.folder, model.config)
    config.dtype, config.architectures = dtype, [type(model).__name__]
    for each in (config, generation):
        each.eos_token_id, each.pad_token_id = list(chat.stop_ids), chat.pad_id
    config.save_pretrained(folder)
    generation.save_pretrained(folder)
    tokenizer.chat_template = chat.template
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(chat.pad_id)
    tokenizer.save_pretrained(folder)
    chat.save(folder)
    write_json(folder / INFO_FILE, info)


def _generation_config(base: Path, config: Any) -> Any:
    from transformers import GenerationConfig

    if (base / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(base, local_files_only=True)
    return GenerationConfig.from_model_config(config)


def check_model_folder(folder: Path, saved_tokenizer: Any, tokenizer: Any, chat: ChatFormat) -> dict[str, bool]:
    """Read the chat format and generation config back: with the tokenizer, the same ids, template and stop ids as in training.

    Args:
        saved_tokenizer: the tokenizer of `folder`, read back.
        tokenizer: the one that the adapter was trained with.

    Raises:
        ModelError: one of them differs.
    """
    from transformers import GenerationConfig

    saved_chat, generation = ChatFormat.load(folder), GenerationConfig.from_pretrained(folder)
    checks = {
        "token ids": all(saved_chat.example(saved_tokenizer, *probe) == chat.example(tokenizer, *probe) for probe in PROBES),
        "chat format": saved_chat.digest == chat.digest,
        "tokenizer's chat template": ChatFormat.of_tokenizer(saved_tokenizer, chat.system_prompt).digest == chat.digest,
        "tokenizer's pad id": saved_tokenizer.pad_token_id == chat.pad_id,
        "stop ids": generation.eos_token_id == list(chat.stop_ids),
        "pad id": generation.pad_token_id == chat.pad_id,
    }
    wrong = [name for name, right in checks.items() if not right]
    if wrong:
        raise ModelError(
            f"the saved model differs from what was trained: {', '.join(wrong)}", where=str(folder), fix="report this as a bug"
        )
    return checks
