"""The merged model's folder: written so that any tool loads it, then read back to prove it (d07).

The same inputs give the same bytes: no time, path or measured value is in it, because the folder's digest is the model's name.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from components.common.chat import ChatFormat
from components.common.errors import ModelError, StorageError
from components.common.files import write_json
from components.merge.certificate import PROBES

INFO_FILE = "merge_info.json"
SHARD_SIZE = "5GB"  # files of a large model travel side by side
SPARE_BYTES = 64 << 20  # tokenizer and JSON files


def require_space(folder: Path, model: Any, dtype: Any) -> None:
    """Look for a full disk before the merge, not after it: the library's own error says nothing of a disk.

    Raises:
        StorageError: the folder's disk has too little space for the model.
    """
    needed = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize + SPARE_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StorageError(
            f"the disk is too full: the merged model needs {needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free",
            where=str(folder),
            fix="free some space, or choose another --output, then run the step again",
        )


def write_model_folder(folder: Path, model: Any, tokenizer: Any, chat: ChatFormat, info: dict[str, Any]) -> None:
    """Write config, safetensors, generation config, tokenizer, chat format and `merge_info.json`."""
    for config in (model.config, model.generation_config):
        config.eos_token_id, config.pad_token_id = list(chat.stop_ids), chat.pad_id
    tokenizer.chat_template = chat.template
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(chat.pad_id)
    model.save_pretrained(folder, max_shard_size=SHARD_SIZE)
    tokenizer.save_pretrained(folder)
    chat.save(folder)
    write_json(folder / INFO_FILE, info)


def check_model_folder(folder: Path, saved_tokenizer: Any, tokenizer: Any, chat: ChatFormat) -> None:
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
