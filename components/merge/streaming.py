"""Base weights → merged weights, a few rows at a time: nothing is in memory but those rows, and one layer where it is de-quantised."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from components.common.errors import ModelError
from components.common.files import write_json
from components.common.progress import progress
from components.merge.adapter import Adapter
from components.merge.lora import LoraLayer, adapter_tensors, lora_layers
from components.merge.quantised import quantised_layers, round_trip
from components.merge.structure import Structure, check_fit, read_structure
from components.merge.weight_files import INDEX, SINGLE

BLOCK_WEIGHTS = 1 << 20  # 4 MiB in fp32: stays in the cache between reading, folding and writing
SHARD_BYTES = 5 * 10**9  # files of a large model travel side by side; the size that the libraries cut at
_SAFETENSORS_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64"}


@dataclass(frozen=True)
class Weights(Mapping[str, torch.Tensor]):
    """The weights of a model by name, computed when they are asked for.

    Attributes:
        layers: the adapter to fold in, by the name of the weight; empty: none.
        quantization: nf4 or int8: quantise and back what bitsandbytes would; none: the weights as they are stored.
        dtype: of the tensors that `weights[name]` gives.
    """

    structure: Structure
    layers: Mapping[str, LoraLayer] = field(default_factory=dict)
    quantization: str = "none"
    quantised: frozenset[str] = frozenset()
    dtype: torch.dtype = torch.float32

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """A weight's rows from first to last, some at a time: fp32 where the adapter changes it, else as they are stored."""
        weight = self.structure.files.tensor(name)
        if self.quantization != "none" and name in self.quantised:
            weight = round_trip(weight, self.quantization)
        layer = self.layers.get(name)
        rows = max(1, BLOCK_WEIGHTS * max(1, len(weight)) // max(1, weight.numel())) if weight.dim() else 1
        for first in range(0, len(weight), rows) if weight.dim() else (0,):
            block = weight[first : first + rows] if weight.dim() else weight
            yield layer.fold(block, first) if layer else block

    def __getitem__(self, name: str) -> torch.Tensor:
        stored = self.structure.tied.get(name, name)
        found = torch.empty(self.structure.files.shape(stored), dtype=self.dtype)
        first = 0
        for block in self.blocks(stored):
            found.view(-1)[first : first + block.numel()] = block.reshape(-1)
            first += block.numel()
        return found

    def __iter__(self) -> Iterator[str]:
        return iter([*self.structure.names, *self.structure.tied])

    def __len__(self) -> int:
        return len(self.structure.names) + len(self.structure.tied)


def merged_weights(structure: Structure, adapter: Adapter, merge_base: str) -> Weights:
    """The weights of base + adapter.

    Args:
        merge_base: original, or dequantized: those that training on a quantised base computed with.

    Raises:
        ModelError: the adapter is broken, or belongs to another model.
    """
    tensors = adapter_tensors(adapter)
    check_fit(structure, adapter, tensors)
    layers = lora_layers(tensors, adapter.scale)
    if merge_base == "original":
        return Weights(structure, layers)
    quantised = frozenset(f"{name}.weight" for name in quantised_layers(structure.empty_model()))
    return Weights(structure, layers, adapter.quantization, quantised)


def merge_shards(base: Path, adapter: Adapter, target: Path, *, dtype: torch.dtype = torch.bfloat16, merge_base: str = "original") -> int:
    """Merge an adapter into the base model of a folder; writes only the weight files. Returns their size in bytes.

    Raises:
        ModelError: see `read_structure`, `merged_weights` and `write_shards`.
    """
    return write_shards(merged_weights(read_structure(base), adapter, merge_base), target, dtype)


def write_shards(weights: Weights, target: Path, dtype: torch.dtype, shard_bytes: int = SHARD_BYTES) -> int:
    """Write all the weights as safetensors, with an index where there is more than one file. Returns the size in bytes.

    The same weights give the same bytes: files are cut by size alone, and hold no time and no path. The caller makes the folder
    whole or absent.

    Raises:
        ModelError: a weight is not finite, or too large for the precision.
    """
    files = weights.structure.files
    sizes = {name: math.prod(files.shape(name)) * dtype.itemsize for name in weights.structure.names}
    shards = _shards(sizes, shard_bytes)
    total = sum(sizes.values())
    place: dict[str, str] = {}
    with progress("merge, MiB", math.ceil(total / 2**20)) as meter:
        done = 0
        for number, names in enumerate(shards, 1):
            path = target / (SINGLE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors")
            place |= dict.fromkeys(names, path.name)
            with path.open("wb", buffering=0) as file:
                _write(file, _header({name: files.shape(name) for name in names}, dtype))
                for name in names:
                    for block in weights.blocks(name):
                        _write(file, _stored(block, dtype, name).reshape(-1).view(torch.uint8).numpy())
                    done += sizes[name]
                    meter.advance(math.ceil(done / 2**20) - meter.done)
    if len(shards) > 1:
        write_json(target / INDEX, {"metadata": {"total_size": total}, "weight_map": place})
    return total


def _shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Names in their order, cut into files of at most `limit` bytes; a larger weight gets a file of its own."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _header(shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype) -> bytes:
    """The head of a safetensors file, whose tensors follow in this order without gaps.

    Format: https://github.com/huggingface/safetensors#format. Written here because the library wants a whole file's tensors at once.
    """
    head: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    first = 0
    for name, shape in shapes.items():
        last = first + math.prod(shape) * dtype.itemsize
        head[name] = {"dtype": _SAFETENSORS_NAMES[dtype], "shape": list(shape), "data_offsets": [first, last]}
        first = last
    text = json.dumps(head, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8 bytes
    return len(text).to_bytes(8, "little") + text


def _stored(block: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """Rows in the precision they are stored in, on the condition that they are finite."""
    stored = block.to(dtype).contiguous()
    if not stored.numel() or all(end.isfinite() for end in stored.aminmax()):  # a NaN is both ends
        return stored
    if block.isfinite().all():
        raise ModelError(f"a merged weight is too large for {dtype}: {name}", fix="use --precision bf16")
    raise ModelError(
        f"a merged weight is not a finite number: {name}",
        fix="train with a lower learning rate; if the base has such weights, fetch it again",
    )


def _write(file: Any, data: Any) -> None:
    """Write all the bytes: an unbuffered file may take only some at once."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]
