"""What a base model consists of, known without loading it: its layers, on the meta device, and the files that hold their weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from components.common.errors import ModelError, first_line
from components.common.loading import quiet_libraries
from components.merge.adapter import Adapter
from components.merge.weight_files import WeightFiles


@dataclass(frozen=True)
class Structure:
    """A causal language model without its weights.

    Attributes:
        config: the library's configuration of the model.
        names: of the weights that are stored, in the order in which they lie on the disk.
        tied: name of a weight that isn't stored → name of the stored one that it is.
    """

    config: Any
    files: WeightFiles
    names: list[str]
    tied: dict[str, str]

    def empty_model(self, dtype: torch.dtype = torch.float32) -> Any:
        """The model in evaluation mode; its parameters take no memory and have no values."""
        return _empty_model(self.config, dtype, self.files.folder)

    @property
    def parameters(self) -> int:
        """How many weights are stored."""
        return sum(torch.Size(self.files.shape(name)).numel() for name in self.names)


def read_structure(folder: Path) -> Structure:
    """Read a model folder's config.json and the headers of its weight files.

    Raises:
        ModelError: quantised, of an unknown kind, or with weights that don't match its layers.
    """
    from transformers import AutoConfig

    quiet_libraries()
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"the model's config.json can't be used: {first_line(error)}", where=str(folder), fix="fetch the model again"
        ) from None
    if getattr(config, "quantization_config", None):
        raise ModelError("the base model is quantised", where=str(folder), fix="merge into the base model in its original precision")
    files, model = WeightFiles(folder), _empty_model(config, torch.float32, folder)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = _tied(model, files)
    names = [name for name in files.names if name in expected and name not in tied]
    _check_names(expected, names, tied, files)
    return Structure(config, files, names, tied)


def with_adapter(model: Any, adapter: Adapter) -> Any:
    """A model with the adapter's layers around its own, without their weights.

    Raises:
        ModelError: the adapter has no place in this model.
    """
    from peft import LoraConfig, get_peft_model

    try:
        config = LoraConfig.from_pretrained(str(adapter.folder))
        return get_peft_model(model, config, low_cpu_mem_usage=True, autocast_adapter_dtype=False).eval()
    except (RuntimeError, ValueError, TypeError) as error:
        raise _unfit(adapter, f"the adapter does not fit this base model: {first_line(error)}") from None


def check_fit(structure: Structure, adapter: Adapter, tensors: dict[str, torch.Tensor]) -> None:
    """Make sure that every tensor of the adapter has its layer in the base, and every such layer its tensors.

    Raises:
        ModelError: the adapter belongs to another model, or changes a weight that two layers share.
    """
    from peft import get_peft_model_state_dict

    model = structure.empty_model()
    linear = {f"base_model.model.{name}" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    expected = get_peft_model_state_dict(with_adapter(model, adapter), save_embedding_layers=False)
    strangers = sorted(tensors.keys() ^ expected.keys())
    if strangers:
        raise _unfit(adapter, f"the adapter has other layers than this base model: {strangers[0]}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            shapes = f"{tuple(tensor.shape)}, not {tuple(expected[name].shape)}"
            raise _unfit(adapter, f"the adapter does not fit this base model: {name} is {shapes}")
        layer = name.split(".lora_")[0]
        weight = f"{layer.removeprefix('base_model.model.')}.weight"
        if layer not in linear or weight in {*structure.tied, *structure.tied.values()}:
            raise _unfit(adapter, f"the adapter changes a layer that is not linear, or whose weight another layer shares: {layer}")


def _empty_model(config: Any, dtype: torch.dtype, folder: Path) -> Any:
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    try:
        with init_empty_weights():
            return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    except (ValueError, KeyError) as error:
        raise ModelError(f"this kind of model is not known: {first_line(error)}", where=str(folder), fix="choose another model") from None


def _tied(model: Any, files: WeightFiles) -> dict[str, str]:
    """Name of a weight that need not be stored → the stored one that it shares; whichever of the two the files have."""
    tied, stored = {}, set(files.names)
    for name, source in model.all_tied_weights_keys.items():
        alias, kept = (source, name) if source not in stored and name in stored else (name, source)
        if {alias, kept} <= stored and not torch.equal(files.tensor(alias), files.tensor(kept)):
            raise ModelError(
                f"config.json says that {alias} and {kept} are one weight, but they differ",
                where=str(files.folder),
                fix="set `tie_word_embeddings` to false in its config.json",
            )
        tied[alias] = kept
    return tied


def _check_names(expected: dict[str, tuple[int, ...]], names: list[str], tied: dict[str, str], files: WeightFiles) -> None:
    where = str(files.folder)
    if missing := sorted(expected.keys() - set(names) - tied.keys()):
        others = sorted(set(files.names) - expected.keys())
        names_differ = f"; the files call their weights otherwise, such as {others[0]}" if others else ""
        raise ModelError(
            f"{len(missing)} weights are missing, such as {missing[0]}{names_differ}",
            where=where,
            fix="load the model with transformers and save it again, then merge into that copy" if others else "fetch the model again",
        )
    if wrong := [name for name in names if files.shape(name) != expected[name]]:
        raise ModelError(
            f"{wrong[0]} is {files.shape(wrong[0])}, where config.json asks for {expected[wrong[0]]}",
            where=where,
            fix="fetch the model again",
        )


def _unfit(adapter: Adapter, what: str) -> ModelError:
    return ModelError(what, where=str(adapter.folder), fix=f"merge it into its own base model, {adapter.base_model}")
