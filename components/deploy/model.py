"""Which model is to be served: its address and its digest, known before anything is started."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from components.common.errors import ModelError, StorageError


@dataclass(frozen=True)
class Model:
    """A stored model.

    Attributes:
        uri: an absolute address, so that it means the same in the history and in the service's own process.
        digest: the sha256 of its content; the service must report the same.
        folder: where it lies on the local disk; None in object storage.
        size_bytes: what its files take together; None where only storage knows.
    """

    uri: str
    digest: str
    folder: Path | None = None
    size_bytes: int | None = None


def find_model(uri: str) -> Model:
    """The model behind an address.

    A local model is known by its manifest; a plain folder without one by its files. In object storage a model's address ends in its digest, so nothing is read here: the
    service itself fetches the model and compares every file with the manifest.

    Raises:
        ModelError: nothing is stored there, or the address names no digest. StorageError: an unknown kind of address.
    """
    from components.common.storage import MANIFEST, Manifest, read_manifest

    scheme, separator, rest = uri.partition("://")
    if not separator or scheme == "file":
        folder = Path(rest if separator else uri).resolve()
        if not folder.is_dir():
            raise ModelError(
                "the model to deploy does not exist", where=str(folder), fix="check --model_uri, or run the merge step, which prints it"
            )
        manifest = read_manifest(folder) if (folder / MANIFEST).exists() else Manifest.of_folder(folder)
        return Model(f"file://{folder}", manifest.digest, folder, manifest.size_bytes)
    if scheme != "s3":
        raise StorageError(f"{scheme}:// is not a storage that we know", where=uri, fix="use file:///folder or s3://bucket/prefix")
    address = uri.rstrip("/")
    digest = address.rpartition("/")[2]
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise ModelError(
            "the address does not end in a model's digest",
            where=uri,
            fix="give the model_uri that the merge step printed: …/models/<digest>",
        )
    return Model(address, digest)
