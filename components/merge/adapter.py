"""The adapter to merge, read and checked before anything heavy is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from components.common.base_model import base_fingerprint
from components.common.chat import ChatFormat
from components.common.errors import ModelError
from components.common.files import read_json, sha256_file, sha256_text

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
INFO = "train_info.json"

# What the merge understands, or what says nothing about the weights. Any other setting that is switched on changes what LoRA computes.
_UNDERSTOOD = {"peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "target_modules"}
_HARMLESS = {
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_dropout",
    "megatron_core",  # unused without megatron_config
    "peft_version",
    "qalora_group_size",  # unused without use_qalora
    "revision",
    "task_type",
}
_INITIAL_WEIGHTS = (True, False, "gaussian", "orthogonal")  # the others (PiSSA, OLoRA, …) change the base's weights too


@dataclass(frozen=True)
class Adapter:
    """An adapter folder that train wrote.

    Attributes:
        base_model: the name of the base model it was trained on.
        info: its `train_info.json`.
        config: its `adapter_config.json`.
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

    @property
    def scale(self) -> float:
        """What the product B A is multiplied by: alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv 2312.03732)."""
        rank = self.config["r"]
        return float(self.config["lora_alpha"]) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    @property
    def quantization(self) -> str:
        """How the base was quantised in training: none, nf4 or int8."""
        settings = self.info.get("settings", {})
        asked = "nf4" if settings.get("load_in_4bit") else "int8" if settings.get("load_in_8bit") else settings.get("quantization")
        found = self.info.get("plan", {}).get("quantization") or asked
        return found if found in ("nf4", "int8") else "none"


def read_adapter(folder: Path) -> Adapter:
    """Read everything but the weights.

    Raises:
        ModelError: the folder or its weights are missing, or it is of a kind that this program can't merge.
        DataError: a JSON file is missing or broken.
    """
    if not folder.is_dir():
        raise ModelError("the adapter's folder does not exist", where=str(folder), fix="run the train step first, or give its folder")
    if not (folder / WEIGHTS).is_file():
        raise ModelError("the adapter has no weights", where=str(folder / WEIGHTS), fix="run the train step again")
    config = read_json(folder / CONFIG, kind="LoRA configuration")
    _check_config(config, folder)
    info = read_json(folder / INFO, kind="adapter's train_info.json")
    digest = sha256_text(f"{sha256_file(folder / WEIGHTS)} {sha256_file(folder / CONFIG)}")
    return Adapter(folder, str(config.get("base_model_name_or_path") or ""), ChatFormat.load(folder), info, config, digest)


def base_of(adapter: Adapter, asked: str) -> str:
    """The base model's name: the one asked for, else the one that the adapter was trained on; says so when they differ."""
    if asked and asked != adapter.base_model:
        print(f"warning: the adapter was trained on {adapter.base_model}, and is merged into {asked}", flush=True)
    return asked or adapter.base_model


def is_its_base(adapter: Adapter, base: Path) -> bool | None:
    """Whether the base looks as it did in training; None when training didn't note it. Warns of another one.

    Only a warning: the fingerprint also changes when the same weights are cut into other files.
    """
    noted = adapter.info.get("base_fingerprint")
    if not noted:
        return None
    if same := noted == base_fingerprint(base):
        return same
    print(
        f"warning: {base} is not the base model as it was in training: its config.json or the sizes of its weight files differ. "
        "The certificate proves the merge, not that this base suits the adapter: see the evaluation",
        flush=True,
    )
    return False


def _check_config(config: dict[str, Any], folder: Path) -> None:
    where = str(folder / CONFIG)
    if config.get("peft_type") != "LORA":
        raise ModelError(f"not a LoRA adapter: {config.get('peft_type')}", where=where, fix="give an adapter that train wrote")
    for name in ("r", "lora_alpha"):
        if not isinstance(config.get(name), (int, float)) or config[name] <= 0:
            raise ModelError(f"the LoRA configuration has no usable {name}", where=where, fix="run the train step again")
    neutral: tuple[Any, ...] = (None, False, "none", [], {})
    unknown = {name: value for name, value in config.items() if name not in _UNDERSTOOD | _HARMLESS and value not in neutral}
    if unknown.get("init_lora_weights") in _INITIAL_WEIGHTS:
        del unknown["init_lora_weights"]
    if unknown:
        raise ModelError(
            f"this kind of adapter can't be merged here: {', '.join(f'{name}={value}' for name, value in sorted(unknown.items()))}",
            where=where,
            fix="train with LoRA, rsLoRA or DoRA on linear layers, one rank and alpha for all",
        )
