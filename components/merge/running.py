"""Run a model whose weights are computed on demand: whole in memory where it fits, else with one layer in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch

from components.common.device import choose_compute
from components.common.errors import UserError
from components.common.memory import free_bytes
from components.merge.adapter import Adapter
from components.merge.lora import adapter_tensors
from components.merge.streaming import Weights
from components.merge.structure import with_adapter

FP32_BYTES = 4
SPARE = 1.2  # activations, logits and the allocator's waste, on top of the weights


class Place(NamedTuple):
    """Where models are compared.

    Attributes:
        whole: all weights in memory; otherwise every layer's are read for each forward pass, and dropped after it.
        reason: why, in words.
    """

    device: torch.device
    whole: bool
    reason: str


def choose_place(asked: Literal["auto", "cpu", "cuda"], parameters: int, largest: int) -> Place:
    """The place to compare fp32 models of so many parameters, printed with its reason.

    Args:
        largest: parameters of the largest weight.

    Raises:
        UserError: a GPU was asked for, and there is none; or not even one layer fits.
    """
    compute = choose_compute("fp32")
    if asked == "cuda" and compute.device.type != "cuda":
        raise UserError("there is no GPU", where="--device cuda", fix="use --device cpu, or auto")
    device = compute.device if asked == "auto" else torch.device(asked)
    needed, free = int(parameters * FP32_BYTES * SPARE), free_bytes(device)
    if device.type == "cuda" and asked == "auto" and needed > free and needed <= free_bytes(torch.device("cpu")):
        device, free = torch.device("cpu"), free_bytes(torch.device("cpu"))
    sizes = f"an fp32 model needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
    if needed > free and 2 * largest * FP32_BYTES > free:
        raise UserError(
            f"the memory of the {device.type} is too small to prove the merge: one layer alone needs {2 * largest * FP32_BYTES / 2**30:.1f} GiB, "
            f"{free / 2**30:.1f} GiB are free",
            fix="give the step more memory",
        )
    place = Place(device, needed <= free, f"{sizes}: {'whole in memory' if needed <= free else 'one layer at a time, from the disk'}")
    print(f"merging in fp32; models are compared on the {device}: {place.reason}", flush=True)
    return place


class _AdapterOnBase(Mapping[str, torch.Tensor]):
    """The tensors of a PEFT model by the library's names for them."""

    def __init__(self, base: Weights, adapter: Adapter) -> None:
        self._base, self._tensors = base, adapter_tensors(adapter)

    def __getitem__(self, name: str) -> torch.Tensor:
        if ".lora_" not in name:
            return self._base[name.removeprefix("base_model.model.").replace(".base_layer.", ".")]
        stored = name.replace(".default", "")
        return self._tensors[stored if stored in self._tensors else stored.removesuffix(".weight")]

    def __iter__(self) -> Iterator[str]:  # a mapping needs it; the libraries ask by name only
        return iter((*self._base, *self._tensors))

    def __len__(self) -> int:
        return len(self._base) + len(self._tensors)


def plain_model(weights: Weights, place: Place) -> Any:
    """A model with these weights."""
    return _placed(weights.structure.empty_model(weights.dtype), weights, place)


def adapted_model(base: Weights, adapter: Adapter, place: Place) -> Any:
    """The base with the adapter's layers beside its own, as it was trained: PEFT's own forward pass, not a merge."""
    return _placed(with_adapter(base.structure.empty_model(), adapter), _AdapterOnBase(base, adapter), place)


def _placed(model: Any, tensors: Mapping[str, torch.Tensor], place: Place) -> Any:
    """A model on the meta device, given its weights: all now, or each layer's at its turn (accelerate's hooks)."""
    if not place.whole:
        from accelerate.hooks import attach_align_device_hook

        # A LoRA layer reads the weight beside it, so it is loaded with all that is in it; both libraries call the class Linear.
        attach_align_device_hook(model, execution_device=place.device, offload=True, weights_map=tensors, preload_module_classes=["Linear"])
        return model
    filled: dict[int, torch.Tensor] = {}  # a weight that two layers share is filled once
    state = {}
    for name, parameter in model.state_dict(keep_vars=True).items():
        if id(parameter) not in filled:
            filled[id(parameter)] = tensors[name].to(place.device)
        state[name] = filled[id(parameter)]
    model.load_state_dict(state, assign=True)
    return model.to(place.device)
