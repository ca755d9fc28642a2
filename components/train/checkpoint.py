"""Checkpoints of a run, in a folder or in object storage: a run that was killed goes on from the newest whole one.

`<place>/<key>/step-00000120.pt` holds the state, `step-00000120.json` beside it its manifest, written last: a state without its
manifest, or unlike it, does not exist. The key is a digest of all that decides the result, so a run never takes another run's state.
"""

from __future__ import annotations

import io
import json
import time
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from components.common.errors import StorageError, UserError, explain_os_error, first_line
from components.common.files import sha256_file, sha256_text
from components.common.storage import Location

KEPT = 2  # the newest, and one more for when that can't be read
SLOW_S = 5.0
RETRY_S = 15.0  # training waits for a storage that hangs
LIBRARIES = ("torch", "transformers", "peft")


@dataclass
class Checkpoints:
    """Where a run's state is saved while it trains, and how the newest whole one is found.

    A state is nested dicts and lists of tensors, numbers, strings, booleans and None; reading one back can't run code.

    Attributes:
        key: what `run_key` gives for this run.
    """

    location: Location
    key: str
    _failing: bool = field(default=False, init=False)

    @classmethod
    def at(cls, place: str, key: str) -> Checkpoints:
        """The checkpoints of one run.

        Args:
            place: folder, `file:///folder` or `s3://bucket/prefix`.

        Raises:
            StorageError: another kind of address.
        """
        return cls(Location.parse(f"{place.rstrip('/')}/{key}", RETRY_S), key)

    def save(self, step: int, state: dict[str, Any]) -> bool:
        """Save the state after a step, and delete all but the newest two; whether it is stored.

        A storage that is down or full never ends the training: it is a warning, once until it works again.
        """
        started = time.monotonic()
        buffer = io.BytesIO()
        torch.save(state, buffer)
        content = buffer.getbuffer()
        stored = False
        try:
            self._store(step, content)
            stored = True
            self._prune(step)
        except (UserError, OSError) as error:
            self._warn(
                "older checkpoints can't be deleted" if stored else f"no checkpoint of step {step} is stored; training goes on", error
            )
            return stored
        if self._failing:
            print(f"the storage of checkpoints works again; that of step {step} is stored", flush=True)
        self._failing = False
        seconds = time.monotonic() - started
        if seconds > SLOW_S:
            print(f"checkpoint of step {step}: {len(content) >> 20} MiB in {seconds:.0f} s", flush=True)
        return True

    def newest(self) -> tuple[int, dict[str, Any]] | None:
        """The newest whole state and its step, on the CPU; None without one. A broken one is skipped, with a line that says why.

        Raises:
            StorageError: the storage is down or refuses. To start anew then would silently repeat work.
        """
        try:
            names = set(self.location.names())
            for step in sorted({_step_of(name) for name in names} - {-1}, reverse=True):
                problem, state = self._read(step, names)
                if state is not None:
                    return step, state
                print(f"checkpoint of step {step} is skipped: {problem}", flush=True)
        except OSError as error:
            raise _explained(error, self.location.uri) from error
        return None

    def clear(self) -> None:
        """Delete all checkpoints of this run, after its success; a storage that refuses is a warning."""
        try:
            self.location.delete(self.location.names())
        except (UserError, OSError) as error:
            self._warn("the checkpoints can't be deleted", error)
            return
        if self.location.local is not None:
            with suppress(OSError):  # not ours alone
                self.location.local.rmdir()
                self.location.local.parent.rmdir()

    def _store(self, step: int, content: memoryview) -> None:
        data, manifest = _names_of(step)
        self.location.write(data, content)
        facts = {
            "step": step,
            "key": self.key,
            "size_bytes": len(content),
            "sha256": sha256(content).hexdigest(),
            "versions": {name: version(name) for name in LIBRARIES},
        }
        try:
            self.location.write(manifest, json.dumps(facts, indent=2) + "\n")
        except (UserError, OSError):
            with suppress(UserError, OSError):  # the error that matters is the first
                self.location.delete([data])
            raise

    def _prune(self, step: int) -> None:
        """Keep this step and the one before; what comes after this step was broken, or this run would have gone on from there."""
        names = self.location.names()
        whole = sorted(_step_of(name) for name in names if name.endswith(".json") and _step_of(name) <= step)
        kept = {name for number in whole[-KEPT:] for name in _names_of(number)}
        if old := sorted(set(names) - kept, key=lambda name: name.endswith(".pt")):  # a manifest goes before its data
            self.location.delete(old)

    def _read(self, step: int, names: set[str]) -> tuple[str, dict[str, Any] | None]:
        """A state, or what is wrong with it."""
        data, manifest = _names_of(step)
        if not {data, manifest} <= names:
            return "it was never finished", None
        try:
            facts = json.loads(self.location.read(manifest))
            expected = (facts["step"], facts["key"], facts["size_bytes"], facts["sha256"])
            written_with = dict(facts["versions"])
        except (ValueError, KeyError, TypeError) as error:
            return f"its manifest is broken ({type(error).__name__})", None
        if expected[:2] != (step, self.key):
            return "it belongs to another run", None
        content = self.location.read(data)
        if expected[2:] != (len(content), sha256(content).hexdigest()):
            return "its content is not what was saved", None
        try:
            state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except Exception as error:  # torch promises no certain class
            return f"torch can't read it: {first_line(error)}", None
        _say_other_versions(step, written_with)
        return "", state

    def _warn(self, what: str, error: UserError | OSError) -> None:
        if not self._failing:
            explained = error if isinstance(error, UserError) else _explained(error, self.location.uri)
            print(f"WARNING: {what}\n{explained}", flush=True)
        self._failing = True


def run_key(facts: dict[str, Any]) -> str:
    """The sha256 of all that decides a run's result, as canonical JSON: equal facts give an equal key, in any process.

    Raises:
        TypeError, ValueError: a fact is no JSON value.
    """
    return sha256_text(json.dumps(facts, sort_keys=True, separators=(",", ":"), allow_nan=False))


def code_version() -> str:
    """The sha256 over the sources that train: other code does not go on from a state that this code made."""
    root = Path(__file__).resolve().parents[1]
    sources = sorted(path for folder in ("common", "train") for path in (root / folder).rglob("*.py"))
    return sha256_text("".join(f"{sha256_file(path)}  {path.relative_to(root).as_posix()}\n" for path in sources))


def _names_of(step: int) -> tuple[str, str]:
    return f"step-{step:08d}.pt", f"step-{step:08d}.json"


def _step_of(name: str) -> int:
    """The step a file belongs to; -1: none."""
    number = Path(name).stem.removeprefix("step-")
    return int(number) if number.isdecimal() and name in _names_of(int(number)) else -1


def _explained(error: OSError, where: str) -> StorageError:
    known = explain_os_error(error)
    fix = "check the folder and the space on its disk, or choose another --checkpoint_uri"
    return StorageError(known.what if known else f"the folder can't be used: {error}", where=where, fix=fix)


def _say_other_versions(step: int, written_with: dict[str, str]) -> None:
    other = [f"{name} {was}, now {version(name)}" for name, was in written_with.items() if name in LIBRARIES and was != version(name)]
    if other:
        print(f"checkpoint of step {step} was written with {'; '.join(other)}: the result may differ from an unbroken run's", flush=True)
