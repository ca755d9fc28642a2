"""Fold LoRA into a weight, as the PEFT library computes it, in fp32 and a few rows at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from components.common.errors import ModelError, first_line
from components.merge.adapter import WEIGHTS, Adapter

_PREFIX = "base_model.model."
_A, _B, _MAGNITUDE = ".lora_A.weight", ".lora_B.weight", ".lora_magnitude_vector"


@dataclass(frozen=True)
class LoraLayer:
    """The adapter of one linear layer.

    Attributes:
        a: (rank, in). b: (out, rank). Both fp32.
        magnitude: the length of each output's weights with DoRA, (out,); None without.
    """

    a: torch.Tensor
    b: torch.Tensor
    magnitude: torch.Tensor | None
    scale: float

    def fold(self, weight: torch.Tensor, first: int) -> torch.Tensor:
        """Some rows of the merged weight, fp32.

        W' = W + scale · B A; with DoRA (arXiv 2402.09353, section 4) m · W' / ‖W'‖, a length for each output, that is each row.

        Args:
            weight: rows (rows, in) of the base's weight, from the row `first` on.
        """
        rows = slice(first, first + len(weight))
        folded = torch.addmm(weight.float(), self.b[rows], self.a, alpha=self.scale)
        if self.magnitude is not None:
            folded *= (self.magnitude[rows] / torch.linalg.norm(folded, dim=1)).unsqueeze(1)
        return folded


def adapter_tensors(adapter: Adapter) -> dict[str, torch.Tensor]:
    """All tensors of an adapter by their names in its file, fp32.

    Raises:
        ModelError: broken, or not finite.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    where = str(adapter.folder)
    try:
        tensors = load_file(adapter.folder / WEIGHTS)
    except SafetensorError as error:
        raise ModelError(f"the adapter's weights are broken: {first_line(error)}", where=where, fix="run the train step again") from None
    unusable = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if unusable:
        raise ModelError(f"the adapter has weights that are not finite numbers: {unusable[0]}", where=where, fix="train it again")
    return {name: tensor.float() for name, tensor in tensors.items()}


def lora_layers(tensors: dict[str, torch.Tensor], scale: float) -> dict[str, LoraLayer]:
    """The adapter's layers by the names of the base's weights that they change."""
    modules = [name.removesuffix(_A) for name in tensors if name.endswith(_A)]
    return {
        f"{module.removeprefix(_PREFIX)}.weight": LoraLayer(
            tensors[module + _A], tensors[module + _B], tensors.get(module + _MAGNITUDE), scale
        )
        for module in modules
    }
