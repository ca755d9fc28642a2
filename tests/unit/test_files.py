"""Files that are whole or absent, and the errors a user can mend."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from components.common.errors import StorageError, UserError, explain_os_error, run_command
from components.common.files import read_json, whole_folder, write_atomically, write_json


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    with whole_folder(target) as scratch:
        (scratch / "a").write_text("1")
        (scratch / "a").chmod(0o600)
        assert not target.exists()
    assert (target / "a").read_text() == "1"
    assert (target / "a").stat().st_mode & 0o777 == 0o644, "the next step may run as another user"


def test_a_failure_leaves_the_old_folder(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(RuntimeError), whole_folder(target) as scratch:
        (scratch / "new").write_text("half")
        raise RuntimeError
    assert [path.name for path in target.iterdir()] == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_new_folder_replaces_the_old_one(tmp_path: Path) -> None:
    target = tmp_path / "model"
    for text in ("one", "two"):
        with whole_folder(target) as scratch:
            (scratch / text).write_text(text)
    assert [path.name for path in target.iterdir()] == ["two"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_killed_writer_leaves_no_folder(tmp_path: Path) -> None:
    program = "import sys, time, pathlib\nfrom components.common.files import whole_folder\nwith whole_folder(pathlib.Path(sys.argv[1])) as scratch:\n    (scratch / 'half').write_text('x')\n    print('ready', flush=True)\n    time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path / "model")], stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "model").exists()


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write_json(path, {"n": 0})
    program = "import sys, pathlib\nfrom components.common.files import write_json\nfor n in range(300): write_json(pathlib.Path(sys.argv[1]), {'n': n, 'x': 'y' * 20000})"
    process = subprocess.Popen([sys.executable, "-c", program, str(path)])
    reads = 0
    while process.poll() is None:
        assert "n" in read_json(path, kind="record")
        reads += 1
    assert process.returncode == 0 and reads > 10


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    write_atomically(path, "old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new")
    assert path.read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    def raising(error: BaseException) -> int:
        def main() -> int:
            raise error

        with pytest.raises(SystemExit) as caught:
            run_command(main)
        return int(caught.value.code or 0)

    assert raising(UserError("what", where="where", fix="fix")) == 2
    assert capsys.readouterr().err == "error: what\n  where: where\n  fix:   fix\n"
    assert raising(OSError(errno.ENOSPC, "full", "/x")) == 2
    assert "the disk is full" in capsys.readouterr().err
    assert raising(KeyboardInterrupt()) == 130
    with pytest.raises(ZeroDivisionError):
        run_command(lambda: 1 // 0)


def test_os_errors_are_explained() -> None:
    assert isinstance(explain_os_error(OSError(errno.EACCES, "x", "/y")), StorageError)
    assert "port" in str(explain_os_error(OSError(errno.EADDRINUSE, "x")))
    assert explain_os_error(OSError(errno.EBADF, "x")) is None, "a bug keeps its traceback"


def test_numbers_that_are_not_numbers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert not list(tmp_path.iterdir())


def test_time_left_is_shown_in_plain_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from components.common import progress

    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    with progress.progress("work", 4) as meter:
        for _ in range(4):
            time.sleep(0.01)
            meter.advance(note="loss 1.0")
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("work: 2/4, about ") and "s left, loss 1.0" in lines[1]
    assert lines[-1].startswith("work: 4/4, done in")
