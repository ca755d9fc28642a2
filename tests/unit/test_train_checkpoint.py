"""Checkpoints in a folder and in object storage: the newest whole one is found, whatever happened to the others."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import obstore
import pytest
import torch
from obstore.store import from_url

from components.common.errors import StorageError
from components.train.checkpoint import Checkpoints, code_version, run_key

PROJECT = Path(__file__).resolve().parents[2]
KEY = run_key({"data": "d", "plan": {"learning_rate": 2e-4}})


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path]:
    """An address for checkpoints, and the folder where their files lie."""
    if request.param == "folder":
        return str(tmp_path / "checkpoints"), tmp_path / "checkpoints"
    bucket, variables = request.getfixturevalue("s3_server")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return f"s3://bucket/{tmp_path.name}", bucket / tmp_path.name


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False)
    if mounted.returncode != 0:
        pytest.skip("only root can make a small file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def state_of(step: int, size: int = 1000) -> dict[str, Any]:
    return {"step": step, "weights": torch.full((size,), float(step))}


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def assert_bit_equal(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype and found.shape == expected.shape
        assert torch.equal(found.reshape(-1).view(torch.uint8), expected.reshape(-1).view(torch.uint8))  # NaN and -0.0 too
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for name in expected:
            assert_bit_equal(found[name], expected[name])
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_bit_equal(one, other)
    else:
        assert repr(found) == repr(expected)  # NaN too


def trained_optimizer() -> torch.optim.AdamW:
    layer = torch.nn.Linear(8, 4)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
    for _ in range(3):
        layer(torch.randn(5, 8)).square().sum().backward()
        optimizer.step()
    return optimizer


def test_d10_a_state_comes_back_bit_by_bit(place: tuple[str, Path]) -> None:
    optimizer = trained_optimizer()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    dtypes = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.uint8, torch.bool)
    state = {
        "tensors": [torch.randn(7, 3).mul(50).to(dtype) for dtype in dtypes],
        "not finite": torch.tensor([float("nan"), float("inf"), -0.0]),
        "empty": torch.empty(0, 4),
        "random": {"cpu": torch.get_rng_state(), "cuda": []},
        "optimizer": optimizer.state_dict(),
        "schedule": schedule.state_dict(),
        "plain": {"none": None, "text": "高血压", "yes": True, "count": 3, "share": 0.1, "nan": float("nan"), "pair": [1, [2.5, "x"]]},
    }
    Checkpoints.at(place[0], KEY).save(12, state)
    found = Checkpoints.at(place[0], KEY).newest()
    assert found is not None and found[0] == 12
    assert_bit_equal(found[1], state)


def test_the_newest_two_are_kept_and_success_leaves_nothing(place: tuple[str, Path]) -> None:
    checkpoints = Checkpoints.at(place[0], KEY)
    assert checkpoints.newest() is None
    for step in (10, 9_999, 100_000_000):
        assert checkpoints.save(step, state_of(step))
    assert names_in(place[1]) == ["step-00009999.json", "step-00009999.pt", "step-100000000.json", "step-100000000.pt"]
    found = checkpoints.newest()
    assert found is not None and found[0] == 100_000_000
    checkpoints.clear()
    assert names_in(place[1]) == [] and checkpoints.newest() is None
    if place[0].startswith("/"):
        assert not place[1].exists()
    checkpoints.clear()


def test_clearing_leaves_what_is_not_of_this_run(tmp_path: Path) -> None:
    mine, other = Checkpoints.at(str(tmp_path / "c"), KEY), Checkpoints.at(str(tmp_path / "c"), run_key({"other": 1}))
    mine.save(1, state_of(1))
    other.save(2, state_of(2))
    mine.clear()
    assert other.newest() is not None and mine.newest() is None


@pytest.mark.parametrize("damage", ["cut", "one bit", "no data", "no manifest", "manifest cut", "manifest of another step", "foreign key"])
def test_a_broken_checkpoint_is_skipped_for_the_one_before(
    place: tuple[str, Path], damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = Checkpoints.at(place[0], KEY)
    for step in (5, 6):
        checkpoints.save(step, state_of(step))
    data, manifest = place[1] / KEY / "step-00000006.pt", place[1] / KEY / "step-00000006.json"
    content = bytearray(data.read_bytes())
    if damage == "cut":
        data.write_bytes(content[:-1])
    elif damage == "one bit":
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
    elif damage == "no data":
        checkpoints.location.delete([data.name])  # through the server: it caches its listings
    elif damage == "no manifest":
        checkpoints.location.delete([manifest.name])
    elif damage == "manifest cut":
        manifest.write_text(manifest.read_text()[:20])
    elif damage == "manifest of another step":
        manifest.write_text(manifest.read_text().replace('"step": 6', '"step": 7'))
    else:
        manifest.write_text(manifest.read_text().replace(KEY, run_key({"learning_rate": 1})))
    found = checkpoints.newest()
    assert found is not None and found[0] == 5 and float(found[1]["weights"][0]) == 5.0
    assert "checkpoint of step 6 is skipped: " in capsys.readouterr().out
    checkpoints.save(7, state_of(7))
    found = checkpoints.newest()
    assert found is not None and found[0] == 7


def test_a_checkpoint_after_this_step_is_a_broken_one_and_goes(tmp_path: Path) -> None:
    """After a fall back from step 9 to step 6, what lies at step 9 must not push good ones out."""
    checkpoints = Checkpoints.at(str(tmp_path), KEY)
    for step in (6, 9):
        checkpoints.save(step, state_of(step))
    (tmp_path / KEY / "step-00000009.pt").write_bytes(b"broken")
    checkpoints.save(7, state_of(7))
    assert names_in(tmp_path) == ["step-00000006.json", "step-00000006.pt", "step-00000007.json", "step-00000007.pt"]


def test_files_that_are_no_checkpoints_are_no_checkpoints(tmp_path: Path) -> None:
    folder = tmp_path / KEY
    folder.mkdir()
    for name in ("notes.txt", "step-x.pt", "step-1.pt", ".step-00000003.pt.abc", "step-00000004.pt.tmp"):
        (folder / name).write_text("{}")
    assert Checkpoints.at(str(tmp_path), KEY).newest() is None


def test_reading_runs_no_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever can write to the storage could also write a manifest that fits."""

    class Evil:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    checkpoints = Checkpoints.at(str(tmp_path), KEY)
    checkpoints.save(1, {"x": Evil()})
    assert checkpoints.newest() is None
    assert not (tmp_path / "ran").exists()
    assert "torch can't read it" in capsys.readouterr().out


def test_another_version_of_torch_is_used_but_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = Checkpoints.at(str(tmp_path), KEY)
    checkpoints.save(3, state_of(3))
    assert checkpoints.newest() is not None and capsys.readouterr().out == ""
    manifest = tmp_path / KEY / "step-00000003.json"
    facts = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(facts | {"versions": facts["versions"] | {"torch": "2.1.0"}}))
    assert checkpoints.newest() is not None
    assert "written with torch 2.1.0, now" in capsys.readouterr().out


def test_the_next_run_may_be_another_user(tmp_path: Path) -> None:
    Checkpoints.at(str(tmp_path), KEY).save(3, state_of(3))
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in (tmp_path / KEY).iterdir())


def test_the_key_depends_on_every_fact_and_not_on_their_order() -> None:
    facts = {"data": "d", "base": "b", "plan": {"learning_rate": 2e-4, "seed": 42}, "code": code_version()}
    assert run_key(facts) == run_key(dict(reversed(facts.items())))
    changed = [facts | {"plan": {"learning_rate": 2e-4 * (1 + 1e-15), "seed": 42}}, facts | {"base": "c"}, facts | {"code": "other"}]
    assert len({run_key(facts), *map(run_key, changed)}) == 4
    with pytest.raises(ValueError, match="JSON"):
        run_key({"loss": float("nan")})


def test_the_code_version_is_that_of_the_sources(tmp_path: Path) -> None:
    """Another text or another name of a source file is other code; compiled files and other stages are not part of it."""
    program = "from components.train.checkpoint import code_version; print(code_version())"

    def version_here() -> str:
        return subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    subprocess.run(["cp", "-r", str(PROJECT / "components"), str(tmp_path)], check=True)
    before = version_here()
    (tmp_path / "components" / "evaluate" / "gate.py").write_text("")
    assert version_here() == before
    (tmp_path / "components" / "common" / "html.py").write_text("other = 1\n")
    assert version_here() != before


SAVE_FOR_EVER = """
import sys, torch
from components.train.checkpoint import Checkpoints
checkpoints = Checkpoints.at(sys.argv[1], sys.argv[2])
found = checkpoints.newest()
step = found[0] if found else 0
while True:
    step += 1
    checkpoints.save(step, {"step": step, "weights": torch.full((300_000,), float(step))})
    print(step, flush=True)
"""


def test_d10_killed_while_saving_the_newest_is_whole(place: tuple[str, Path]) -> None:
    """SIGKILL at random moments of a process that does nothing but save: never behind what it said was saved, never a half one."""
    moments, last, cut_short = random.Random(7), 0, 0
    for _ in range(5):
        arguments = [sys.executable, "-c", SAVE_FOR_EVER, place[0], KEY]
        with subprocess.Popen(arguments, cwd=PROJECT, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            first = next(line for line in process.stdout if line.strip().isdecimal())
            time.sleep(moments.uniform(0.02, 0.15))
            process.send_signal(signal.SIGKILL)
            said = [int(line) for line in [first, *process.stdout] if line.endswith("\n") and line.strip().isdecimal()]
        cut_short += len(names_in(place[1])) != 4
        found = Checkpoints.at(place[0], KEY).newest()
        assert found is not None
        assert found[0] >= said[-1] and said[0] == last + 1, "a process goes on after the newest one"
        assert bool((found[1]["weights"] == found[0]).all())
        last = found[0]
    assert cut_short, "no kill hit a save: the test shows nothing"
    Checkpoints.at(place[0], KEY).save(last + 1, state_of(last + 1))
    assert len(names_in(place[1])) == 4, "what killed processes left is cleaned up"


def test_a_full_disk_is_a_warning_once_and_the_older_one_stays(small_disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoints = Checkpoints.at(str(small_disk), KEY)
    assert checkpoints.save(1, state_of(1, 100_000))
    assert not checkpoints.save(2, state_of(2, 1_000_000))
    warning = capsys.readouterr().out
    assert "WARNING: no checkpoint of step 2 is stored; training goes on" in warning and "the disk is full" in warning
    assert str(small_disk) in warning and "fix:" in warning and "--checkpoint_uri" in warning
    assert names_in(small_disk) == ["step-00000001.json", "step-00000001.pt"]
    assert not checkpoints.save(3, state_of(3, 1_000_000))
    assert capsys.readouterr().out == "", "one warning an outage"
    found = checkpoints.newest()
    assert found is not None and found[0] == 1
    assert checkpoints.save(4, state_of(4))
    assert "works again" in capsys.readouterr().out


def test_no_room_for_the_manifest_leaves_no_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = Checkpoints.at(str(tmp_path), KEY)
    checkpoints.save(1, state_of(1))
    calls, fsync = itertools.count(), os.fsync

    def full_at_the_second_file(handle: int) -> None:
        if next(calls) == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full_at_the_second_file)
    assert not checkpoints.save(2, state_of(2))
    assert names_in(tmp_path) == ["step-00000001.json", "step-00000001.pt"]


def test_a_file_where_the_folder_should_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "taken").write_text("")
    checkpoints = Checkpoints.at(str(tmp_path / "taken"), KEY)
    with pytest.raises(StorageError, match="a file stands where a folder is needed") as caught:
        checkpoints.newest()
    assert str(tmp_path / "taken") in caught.value.where and "--checkpoint_uri" in caught.value.fix
    assert not checkpoints.save(1, state_of(1))
    assert "WARNING" in capsys.readouterr().out


def test_an_address_that_is_none() -> None:
    with pytest.raises(StorageError, match="ftp://"):
        Checkpoints.at("ftp://x/y", KEY)


@pytest.mark.parametrize(("name", "value"), [("AWS_ENDPOINT_URL", "http://127.0.0.1:9"), ("AWS_SECRET_ACCESS_KEY", "wrong")])
def test_s3_down_or_denied_is_a_warning_while_saving_and_an_error_at_the_start(
    s3_server: tuple[Path, dict[str, str]],
    tmp_path: Path,
    name: str,
    value: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for variable, working in s3_server[1].items():
        monkeypatch.setenv(variable, working)
    uri = f"s3://bucket/{tmp_path.name}-{name}"
    checkpoints = Checkpoints.at(uri, KEY)
    assert checkpoints.save(1, state_of(1))
    monkeypatch.setenv(name, value)
    refused = Checkpoints.at(uri, KEY)
    with pytest.raises(StorageError, match="object storage refused") as caught:
        refused.newest()
    assert uri in caught.value.where and "AWS_ENDPOINT_URL" in caught.value.fix
    started = time.monotonic()
    assert not refused.save(2, state_of(2))
    assert time.monotonic() - started < 30, "an outage must not hold the training up for long"
    assert "WARNING: no checkpoint of step 2" in capsys.readouterr().out
    refused.clear()
    found = checkpoints.newest()
    assert found is not None and found[0] == 1


def test_s3_a_bucket_that_is_not_there(s3_server: tuple[Path, dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in s3_server[1].items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(StorageError, match="refused"):
        Checkpoints.at("s3://no-such-bucket/x", KEY).newest()


def test_s3_large_states_travel_in_parts(s3_server: tuple[Path, dict[str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable, value in s3_server[1].items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setattr("components.common.storage.PART_BYTES", 5 << 20)
    state = {"weights": torch.randn(3_000_000)}
    checkpoints = Checkpoints.at(f"s3://bucket/{tmp_path.name}", KEY)
    assert checkpoints.save(1, state)
    listed = obstore.list(from_url(f"s3://bucket/{tmp_path.name}/{KEY}", client_options={"allow_http": True})).collect()
    assert max(entry["size"] for entry in listed) > 12_000_000
    found = checkpoints.newest()
    assert found is not None
    assert_bit_equal(found[1], state)
