"""Files that are either whole or absent, and readable by the next step whatever user it runs as."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from components.common.errors import DataError

CHUNK_BYTES = 1 << 20


def write_atomically(path: Path, content: str | bytes | memoryview) -> None:
    """Write a file so that a reader sees the old content or the new, never a part; text as UTF-8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write JSON for people and programs: UTF-8, indented, whole or absent; NaN is refused."""
    write_atomically(path, json.dumps(value, ensure_ascii=False, indent=2, allow_nan=False) + "\n")


def read_json(path: Path, *, kind: str) -> Any:
    """Read a JSON file of ours.

    Raises:
        DataError: absent or broken; `kind` names what was expected there, such as "run record".
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"the {kind} is missing", where=str(path), fix="run the step that writes it first") from None
    except (UnicodeDecodeError, ValueError) as error:
        raise DataError(
            f"the {kind} is not JSON: {error}", where=str(path), fix="delete it and run the step that writes it again"
        ) from None


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A scratch folder that becomes `target` when the block ends well, and vanishes when it doesn't.

    A step killed half-way leaves `target` as it was; a later step never sees half an artifact. Modes are opened for other users:
    safetensors writes 0600, and the next step may run under another UID.
    """
    target = target.absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield scratch
        open_modes(scratch)
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
            target.replace(old / "content")
            scratch.replace(target)
            shutil.rmtree(old, ignore_errors=True)
        else:
            scratch.replace(target)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


def open_modes(folder: Path) -> None:
    """Make a folder readable by every user: 755 for folders, 644 for files."""
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o755 if path.is_dir() else 0o644)


def sha256_file(path: Path) -> str:
    """The sha256 of a file's bytes, as hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def sha256_text(text: str) -> str:
    """The sha256 of a text's UTF-8 bytes, as hex."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
