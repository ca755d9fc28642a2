"""The adapter to merge, read and checked before anything heavy is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.common.chat import ChatFormat
from components.common.errors import ModelError
from components.common.files import read_json, sha256_file, sha256_text

WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Adapter:
    """An adapter folder that train wrote.

    Attributes:
        base_model: the name of the base model it was trained on.
        info: its `train_info.json`.
        digest: the sha256 over its weights and its LoRA configuration.
    """

    folder: Path
    base_model: str
    chat: ChatFormat
    info: dict[str, Any]
    config: dict[str, Any]
    digest: str

    @property
    def size_bytes(self) -> int:
        return (self.folder / WEIGHTS).stat().st_size


def read_adapter(folder: Path) -> Adapter:
    """Read everything but the weights.

    Raises:
        ModelError: the folder or its weights are missing. DataError: a JSON file is missing or broken.
    """
    if not folder.is_dir():
        raise ModelError("the adapter's folder does not exist", where=str(folder), fix="run the train step first, or give its folder")
    if not (folder / WEIGHTS).is_file():
        raise ModelError("the adapter has no weights", where=str(folder / WEIGHTS), fix="run the train step again")
    config = read_json(folder / "adapter_config.json", kind="LoRA configuration")
    if config.get("peft_type") != "LORA":
        raise ModelError(f"not a LoRA adapter: {config.get('peft_type')}", where=str(folder), fix="give an adapter that train wrote")
    info = read_json(folder / "train_info.json", kind="adapter's train_info.json")
    digest = sha256_text(f"{sha256_file(folder / WEIGHTS)} {sha256_file(folder / 'adapter_config.json')}")
    return Adapter(folder, str(config.get("base_model_name_or_path") or ""), ChatFormat.load(folder), info, config, digest)


def base_of(adapter: Adapter, asked: str) -> str:
    """The base model's name: the one asked for, else the one that the adapter was trained on; says so when they differ."""
    if asked and asked != adapter.base_model:
        print(f"warning: the adapter was trained on {adapter.base_model}, and is merged into {asked}", flush=True)
    return asked or adapter.base_model
