"""The tensors of a model folder, read where they lie: safetensors maps its files, so a tensor takes no memory before it is used."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from components.common.errors import ModelError, first_line
from components.common.files import read_json

if TYPE_CHECKING:
    import torch

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


class WeightFiles:
    """The weights of a model folder by name, in the order in which they lie on the disk."""

    def __init__(self, folder: Path) -> None:
        """Read the headers of all the files.

        Raises:
            ModelError: no file, or one that is missing, cut or broken, or a tensor that is twice there or not where the index says.
        """
        self.folder = folder
        self._file_of: dict[str, Any] = {}
        index = _index(folder)
        for path in _files(folder, index):
            file = _opened(path)
            for name in file.offset_keys():
                if index and index.get(name) != path.name:
                    continue
                if name in self._file_of:
                    raise ModelError(f"the tensor {name} is in two files", where=str(folder), fix="fetch the model again")
                self._file_of[name] = file
        if absent := sorted(index.keys() - self._file_of.keys()):
            raise ModelError(f"the index names a tensor that its file lacks: {absent[0]}", where=str(folder), fix="fetch the model again")

    @property
    def names(self) -> list[str]:
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._file_of[name].get_slice(name).get_shape())

    def tensor(self, name: str) -> torch.Tensor:
        """The tensor, a view of the mapped file."""
        tensor: torch.Tensor = self._file_of[name].get_tensor(name)
        return tensor


def _index(folder: Path) -> dict[str, str]:
    """Tensor name → file name; empty without an index."""
    if not (folder / INDEX).is_file():
        return {}
    index = read_json(folder / INDEX, kind="index of the model's files")
    try:
        return {str(name): str(file) for name, file in index["weight_map"].items()}
    except (TypeError, KeyError, AttributeError):
        raise ModelError(
            "the index of the model's files has no weight_map", where=str(folder / INDEX), fix="fetch the model again"
        ) from None


def _files(folder: Path, index: dict[str, str]) -> list[Path]:
    if index:
        paths = [folder / name for name in sorted(set(index.values()))]
    elif (folder / SINGLE).is_file():
        paths = [folder / SINGLE]
    else:
        paths = sorted(folder.glob("model*.safetensors"))
    missing = next((path for path in paths if not path.is_file()), None if paths else folder / SINGLE)
    if missing:
        raise ModelError("the model has no such weight file", where=str(missing), fix="fetch the model again, as safetensors")
    return paths


def _opened(path: Path) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise ModelError(f"the weights are broken: {first_line(error)}", where=str(path), fix="fetch the model again") from None
