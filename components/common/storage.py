"""Move a folder between the local disk and object storage (`file://`, `s3://`), whole or not at all.

A stored folder has a `manifest.json` that names every file with its size and sha256 and is written last: a folder without its
manifest does not exist, one that does not match it is refused. A model is addressed by its content (`models/<digest>/`), so writing
the same content twice moves nothing. Credentials and endpoint come from the usual `AWS_*` environment variables.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from filelock import FileLock

from components.common.errors import ModelError, StorageError
from components.common.files import CHUNK_BYTES, read_json, sha256_file, sha256_text, whole_folder, write_atomically, write_json
from components.common.progress import progress

MANIFEST = "manifest.json"
PARALLEL_FILES = 4
PART_BYTES = 64 << 20
RETRY_S = 180.0


@dataclass(frozen=True)
class Manifest:
    """What a stored folder holds.

    Attributes:
        files: relative path → (size in bytes, sha256).
        facts: what made it (base model, adapter digest, …); not part of the digest.
    """

    files: dict[str, tuple[int, str]]
    facts: dict[str, Any]

    @property
    def digest(self) -> str:
        """The sha256 over every path and content digest: the model's name."""
        return sha256_text("".join(f"{sha}  {path}\n" for path, (_, sha) in sorted(self.files.items())))

    @property
    def size_bytes(self) -> int:
        return sum(size for size, _ in self.files.values())

    @classmethod
    def of_folder(cls, folder: Path, facts: dict[str, Any] | None = None) -> Manifest:
        """Read every file of a folder, except an old manifest."""
        paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
        return cls({path.relative_to(folder).as_posix(): (path.stat().st_size, sha256_file(path)) for path in paths}, facts or {})

    @classmethod
    def from_json(cls, value: Any, where: str) -> Manifest:
        """Parse a manifest.

        Raises:
            ModelError: fields are missing, or the digest is not that of the files it lists.
        """
        try:
            manifest = cls({file["path"]: (int(file["size_bytes"]), str(file["sha256"])) for file in value["files"]}, dict(value["facts"]))
            matches = value["digest"] == manifest.digest
        except (KeyError, TypeError, ValueError):
            raise ModelError("the manifest has missing or wrong fields", where=where, fix="store the model again") from None
        if not matches or any(Path(path).is_absolute() or ".." in Path(path).parts for path in manifest.files):
            raise ModelError(
                "the manifest was altered: its digest is not that of the files it lists", where=where, fix="store the model again"
            )
        return manifest

    def to_json(self) -> dict[str, Any]:
        files = [{"path": path, "size_bytes": size, "sha256": sha} for path, (size, sha) in sorted(self.files.items())]
        return {"format": 1, "digest": self.digest, "size_bytes": self.size_bytes, "facts": self.facts, "files": files}


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a local folder.

    Raises:
        DataError: absent or not JSON. ModelError: altered.
    """
    path = folder / MANIFEST
    return Manifest.from_json(read_json(path, kind="model manifest"), str(path))


def verify(folder: Path) -> Manifest:
    """Compare every file of a stored folder with its manifest.

    Raises:
        ModelError: a file is missing, cut, or not what was stored.
    """
    manifest = read_manifest(folder)
    for name, (size, sha) in manifest.files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size or sha256_file(path) != sha:
            raise ModelError("the model does not match its manifest", where=str(path), fix="fetch or merge the model again")
    return manifest


def store_model(folder: Path, storage_uri: str, facts: dict[str, Any] | None = None) -> tuple[str, Manifest]:
    """Store a model folder under its content address and return its URI; moves nothing if it is there already.

    Args:
        folder: the model's files.
        storage_uri: root of the storage, `file:///…`, `s3://bucket/prefix` or a folder.
        facts: goes into the manifest.
    """
    manifest = Manifest.of_folder(folder, facts)
    target = Location.parse(f"{storage_uri.rstrip('/')}/models/{manifest.digest}")
    if target.local is not None:
        if not (target.local / MANIFEST).exists():
            with whole_folder(target.local) as scratch:
                shutil.copytree(folder, scratch, dirs_exist_ok=True, ignore=shutil.ignore_patterns(MANIFEST))
                write_json(scratch / MANIFEST, manifest.to_json())
        return f"file://{target.local}", manifest
    if not target.exists(MANIFEST):
        with progress(f"upload to {target.uri}, MiB", manifest.size_bytes >> 20) as meter, ThreadPoolExecutor(PARALLEL_FILES) as pool:
            for size in pool.map(lambda name: target.upload(folder / name, name), manifest.files):
                meter.advance(size >> 20)
        target.write(MANIFEST, json.dumps(manifest.to_json(), ensure_ascii=False))
    return target.uri, manifest


def fetch_model(model_uri: str, cache_dir: Path) -> tuple[Path, Manifest]:
    """A verified local folder with the model: in place for a local address, else downloaded once into `cache_dir`.

    Files that an interrupted download left whole are kept; the folder counts only once every file matches.

    Raises:
        StorageError: storage is down, or nothing is there. ModelError: the content does not match the manifest.
    """
    source = Location.parse(model_uri)
    if source.local is not None:
        if not source.local.is_dir():
            raise StorageError("no model is stored here", where=model_uri, fix="check the address, or run the merge step again")
        return source.local, verify(source.local)
    manifest = Manifest.from_json(json.loads(source.read(MANIFEST)), f"{model_uri}/{MANIFEST}")
    target = cache_dir / "models" / manifest.digest
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f"{manifest.digest}.lock")):  # the processes of a machine share the download
        if not (target / MANIFEST).exists():
            _download(source, manifest, target)
    return target, verify(target)


def _download(source: Location, manifest: Manifest, target: Path) -> None:
    partial = target.with_name(f"{manifest.digest}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    with progress(f"download from {source.uri}, MiB", manifest.size_bytes >> 20) as meter, ThreadPoolExecutor(PARALLEL_FILES) as pool:
        for size in pool.map(lambda name: source.download(name, partial / name, manifest.files[name]), manifest.files):
            meter.advance(size >> 20)
    write_json(partial / MANIFEST, manifest.to_json())
    partial.replace(target)


def download_file(uri: str, path: Path) -> None:
    """Fetch one object, such as `s3://bucket/folder/rows.jsonl`, into a local file.

    Raises:
        StorageError: storage is down, or nothing is there.
    """
    scheme, _, rest = uri.partition("://")
    folder, _, name = rest.rpartition("/")
    if not folder or not name:
        raise StorageError("this address names no file in a bucket", where=uri, fix="give s3://bucket/path/to/file")
    nothing_to_compare = (-1, "")
    Location.parse(f"{scheme}://{folder}").download(name, path, nothing_to_compare)


class Location:
    """A folder on the local disk (`local`), or a prefix in a bucket."""

    def __init__(self, uri: str, local: Path | None, retry_s: float = RETRY_S) -> None:
        self.uri, self.local, self.retry_s = uri, local, retry_s
        self._store: Any = None

    @classmethod
    def parse(cls, uri: str, retry_s: float = RETRY_S) -> Location:
        """The place of an address; `retry_s`: how long a request to object storage is tried again."""
        scheme, separator, rest = uri.partition("://")
        if not separator or scheme == "file":
            return cls(uri, Path(rest if separator else uri).absolute())
        if scheme != "s3":
            raise StorageError(f"{scheme}:// is not a storage that we know", where=uri, fix="use file:///folder or s3://bucket/prefix")
        return cls(uri, None, retry_s)

    def _open(self) -> Any:
        if self._store is None:
            from obstore.store import from_url

            endpoint = os.environ.get("AWS_ENDPOINT_URL", "")
            options: Any = {"allow_http": endpoint.startswith("http://")}
            self._store = from_url(self.uri, client_options=options, retry_config={"retry_timeout": timedelta(seconds=self.retry_s)})
        return self._store

    def _refused(self, error: Exception, name: str) -> StorageError:
        fix = "check that the storage is up, and AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        return StorageError(
            f"object storage refused: {type(error).__name__}: {str(error).splitlines()[0][:200]}", where=f"{self.uri}/{name}", fix=fix
        )

    def exists(self, name: str) -> bool:
        import obstore

        try:
            obstore.head(self._open(), name)
        except FileNotFoundError:
            return False
        except Exception as error:
            raise self._refused(error, name) from None
        return True

    def names(self) -> list[str]:
        """The files that lie here, in no order; none where the folder doesn't exist."""
        if self.local is not None:
            try:
                return [path.name for path in self.local.iterdir() if path.is_file()]
            except FileNotFoundError:
                return []
        import obstore

        try:
            return [str(entry["path"]) for entry in obstore.list(self._open()).collect()]
        except Exception as error:
            raise self._refused(error, "") from None

    def read(self, name: str) -> bytes:
        """A small file's content."""
        if self.local is not None:
            return (self.local / name).read_bytes()
        import obstore

        try:
            return bytes(obstore.get(self._open(), name).bytes())
        except Exception as error:
            raise self._refused(error, name) from None

    def write(self, name: str, content: str | bytes | memoryview) -> None:
        """Write a file, whole or not at all."""
        if self.local is not None:
            write_atomically(self.local / name, content)
            return
        import obstore

        data = content.encode("utf-8") if isinstance(content, str) else content
        try:
            obstore.put(self._open(), name, data, use_multipart=len(data) > PART_BYTES, chunk_size=PART_BYTES)
        except Exception as error:
            raise self._refused(error, name) from None

    def delete(self, names: Sequence[str]) -> None:
        """Delete files; one that is gone already is no error."""
        if self.local is not None:
            for name in names:
                (self.local / name).unlink(missing_ok=True)
            return
        import obstore

        try:
            obstore.delete(self._open(), names)
        except Exception as error:
            raise self._refused(error, "") from None

    def upload(self, path: Path, name: str) -> int:
        """Send one file in parallel parts; its size in bytes."""
        import obstore

        try:
            obstore.put(self._open(), name, path, use_multipart=path.stat().st_size > PART_BYTES, chunk_size=PART_BYTES)
        except OSError as error:
            if error.errno is not None:
                raise
            raise self._refused(error, name) from None
        except Exception as error:
            raise self._refused(error, name) from None
        return path.stat().st_size

    def download(self, name: str, path: Path, expected: tuple[int, str]) -> int:
        """Fetch one file unless it is there and whole; its size in bytes."""
        import obstore

        size, sha = expected
        if path.is_file() and path.stat().st_size == size and sha256_file(path) == sha:
            return size
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            chunks: Iterable[Any] = obstore.get(self._open(), name).stream(min_chunk_size=CHUNK_BYTES)
            with path.open("wb") as file:
                for chunk in chunks:
                    file.write(chunk)
        except OSError as error:
            if error.errno is not None:
                raise
            raise self._refused(error, name) from None
        except Exception as error:
            raise self._refused(error, name) from None
        return size
