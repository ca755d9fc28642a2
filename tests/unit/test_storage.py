"""Object storage: whole or not at all, by content; against a real S3 server."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import obstore
import pytest
from obstore.store import from_url

from components.common.errors import DataError, ModelError, StorageError
from components.common.storage import MANIFEST, Manifest, fetch_model, read_manifest, store_model, verify


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "sub" / "model.safetensors").write_bytes(os.urandom(3 << 20))
    (folder / "中文.txt").write_text("高血压")
    return folder


@pytest.fixture
def s3(s3_server: tuple[Path, dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The bucket's folder; this process's variables lead to the server."""
    for name, value in s3_server[1].items():
        monkeypatch.setenv(name, value)
    return s3_server[0]


def test_the_address_is_the_content(model: Path, tmp_path: Path) -> None:
    uri, manifest = store_model(model, f"file://{tmp_path}/storage", {"base_model": "b"})
    assert uri == f"file://{tmp_path}/storage/models/{manifest.digest}"
    stored = tmp_path / "storage" / "models" / manifest.digest
    before = (stored / MANIFEST).stat().st_mtime_ns
    assert store_model(model, f"file://{tmp_path}/storage", {"base_model": "other"})[0] == uri
    assert (stored / MANIFEST).stat().st_mtime_ns == before, "the same content is written once"
    folder, read = fetch_model(uri, tmp_path / "cache")
    assert folder == stored and read.facts == {"base_model": "b"}


def test_the_digest_depends_on_content_and_names_only(model: Path) -> None:
    digest = Manifest.of_folder(model).digest
    (model / "config.json").touch()
    assert Manifest.of_folder(model, {"other": "facts"}).digest == digest
    (model / "config.json").rename(model / "config2.json")
    assert Manifest.of_folder(model).digest != digest


@pytest.mark.parametrize("damage", ["cut", "flip", "missing"])
def test_a_model_that_does_not_match_is_refused(model: Path, tmp_path: Path, damage: str) -> None:
    uri, _ = store_model(model, str(tmp_path / "storage"))
    weights = Path(uri.removeprefix("file://")) / "sub" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    if damage == "missing":
        weights.unlink()
    else:
        content[100] ^= 1
        weights.write_bytes(content[:-1] if damage == "cut" else content)
    with pytest.raises(ModelError, match="does not match"):
        fetch_model(uri, tmp_path)


def test_an_altered_or_broken_manifest_is_refused(model: Path, tmp_path: Path) -> None:
    folder = Path(store_model(model, str(tmp_path / "storage"))[0].removeprefix("file://"))
    value = json.loads((folder / MANIFEST).read_text())
    for change in (
        {"files": value["files"][1:]},
        {"digest": "0" * 64},
        {"files": [{"path": "../x", "size_bytes": 1, "sha256": "0"}]},
        {"facts": None},
    ):
        (folder / MANIFEST).write_text(json.dumps(value | change))
        with pytest.raises(ModelError):
            read_manifest(folder)
    (folder / MANIFEST).write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        verify(folder)
    (folder / MANIFEST).unlink()
    with pytest.raises(DataError, match="missing"):
        verify(folder)


def test_nothing_there_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no model is stored"):
        fetch_model(f"file://{tmp_path}/none", tmp_path)
    with pytest.raises(StorageError, match="ftp://"):
        fetch_model("ftp://x/y", tmp_path)


def test_s3_round_trip_moves_content_once(model: Path, tmp_path: Path, s3: Path) -> None:
    uri, manifest = store_model(model, "s3://bucket/root", {"k": "v"})
    stored = s3 / "root" / "models" / manifest.digest
    assert (stored / "sub" / "model.safetensors").read_bytes() == (model / "sub" / "model.safetensors").read_bytes()
    before = (stored / "sub" / "model.safetensors").stat().st_mtime_ns
    assert store_model(model, "s3://bucket/root")[0] == uri
    assert (stored / "sub" / "model.safetensors").stat().st_mtime_ns == before
    folder, read = fetch_model(uri, tmp_path / "cache")
    assert read.digest == manifest.digest and (folder / "中文.txt").read_text() == "高血压"
    assert fetch_model(uri, tmp_path / "cache")[0] == folder


def test_s3_an_upload_without_manifest_does_not_exist(model: Path, tmp_path: Path, s3: Path) -> None:
    uri, manifest = store_model(model, "s3://bucket/half")
    obstore.delete(from_url(uri, client_options={"allow_http": True}), MANIFEST)
    with pytest.raises(StorageError):
        fetch_model(uri, tmp_path / "cache")
    store_model(model, "s3://bucket/half")
    assert fetch_model(uri, tmp_path / "cache")[1].digest == manifest.digest


def test_s3_an_interrupted_download_goes_on(model: Path, tmp_path: Path, s3: Path) -> None:
    uri, manifest = store_model(model, "s3://bucket/again")
    partial = tmp_path / "cache" / "models" / f"{manifest.digest}.partial"
    (partial / "sub").mkdir(parents=True)
    (partial / "sub" / "model.safetensors").write_bytes(b"half")
    (partial / "config.json").write_text("{}")
    whole = (partial / "config.json").stat().st_mtime_ns
    folder, _ = fetch_model(uri, tmp_path / "cache")
    assert (folder / "config.json").stat().st_mtime_ns == whole, "a whole file is not fetched again"
    assert (folder / "sub" / "model.safetensors").stat().st_size == 3 << 20 and not partial.exists()


def test_s3_damaged_in_storage_is_refused(model: Path, tmp_path: Path, s3: Path) -> None:
    uri, manifest = store_model(model, "s3://bucket/damaged")
    (s3 / "damaged" / "models" / manifest.digest / "config.json").write_text("{ }")
    with pytest.raises(ModelError, match="does not match"):
        fetch_model(uri, tmp_path / "cache")


def test_s3_wrong_key_and_storage_down(model: Path, s3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StorageError, match="refused"):
        store_model(model, "s3://bucket/denied")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(StorageError, match="refused") as caught:
        store_model(model, "s3://bucket/down")
    assert "AWS_ENDPOINT_URL" in caught.value.fix
    assert time.monotonic() - started < 60
