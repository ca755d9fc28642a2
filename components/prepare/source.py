"""The data file itself: where it lies, and that it is the file it should be."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from components.common.errors import DataError
from components.common.files import sha256_file
from components.common.storage import download_file


@contextmanager
def local_copy(data_path: str) -> Iterator[Path]:
    """The data file on the local disk: in place for a path or `file://…`, downloaded for the time of the block for `s3://…`.

    Raises:
        DataError: no such file. StorageError: object storage is down, or has no such object.
    """
    if "://" in data_path and not data_path.startswith("file://"):
        with tempfile.TemporaryDirectory(prefix="medical-qa-data-") as folder:
            path = Path(folder, data_path.rpartition("/")[2])
            print(f"downloading {data_path}", flush=True)
            download_file(data_path, path)
            yield path
        return
    path = Path(data_path.removeprefix("file://")).expanduser()
    if not path.is_file():
        problem = "the data path is a folder" if path.is_dir() else "the data file is missing"
        raise DataError(problem, where=str(path), fix="check --data_path: it names one file")
    yield path


def check_digest(path: Path, expected: str) -> str:
    """The file's sha256, as hex.

    Args:
        expected: the sha256 that the file must have; empty: any.

    Raises:
        DataError: another file than expected.
    """
    actual = sha256_file(path)
    if expected and actual != expected.lower():
        raise DataError(
            "the data changed between submit and run",
            where=f"{path}: sha256 {actual}, expected {expected.lower()}",
            fix="submit the run again with the data as it is now, or put the former file back",
        )
    return actual
