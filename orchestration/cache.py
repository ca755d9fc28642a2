"""Which steps of a local run need not run again, and why: the reason is said for every step.

kfp.local asks its cache before each step. Ours answers by what really decides a step's outcome: the code of that step, its
parameters, and the *content* of its inputs (an artifact's digest rather than its place). Before it answers, it checks that what it
would return still exists.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kfp import dsl
from kfp.local import cache as kfp_cache

from components.common.errors import UserError
from components.common.files import sha256_text, write_json
from components.common.storage import MANIFEST
from orchestration.record import RunRecord


class ExplainedCache(kfp_cache.LocalCache):
    """kfp.local's file-backed cache, with reasons.

    Args:
        cache_root: where the entries are.
        record: the run that asks.
        code_of: the identity of a step's code: its sources in process mode, its image's id in docker mode.
        replay: the past run whose outputs are taken for every step except `only`.
        only: the one step that shall run.
        say: prints a line about a step.
    """

    def __init__(
        self,
        cache_root: str,
        *,
        record: RunRecord,
        code_of: Any,
        replay: RunRecord | None,
        only: str | None,
        say: Any,
        declared: dict[str, set[str]],
    ) -> None:
        super().__init__(cache_root)
        self._record, self._code_of, self._replay, self._only, self._say, self._declared = record, code_of, replay, only, say, declared
        self._step, self._facts = "", {}  # type: str, dict[str, Any]

    def compute_key(
        self,
        component_name: str,
        image: str,
        full_command: list[str],
        arguments: dict[str, Any],
        env_vars: dict[str, str] | None = None,
        custom_cache_key: str | None = None,
    ) -> str:
        """The key of a step; also remembers what it was made of, to explain a miss."""
        self._step = component_name.removeprefix("comp-")
        given = {name: value for name, value in arguments.items() if name in self._declared[component_name]}
        self._facts = {"code": self._code_of(self._step, arguments), "command": full_command} | {
            name: _identity(value) for name, value in sorted(given.items())
        }
        return sha256_text(json.dumps([component_name, self._facts], sort_keys=True, default=str))

    def get(self, key: str) -> dict[str, Any] | None:
        """The outputs of an equal step, if they all still exist."""
        if self._replay is not None:
            return self._replayed()
        outputs = super().get(key)
        if outputs is None:
            self._say(self._step, f"runs: {self._why_not()}")
            return None
        missing = [value for value in outputs.values() if isinstance(value, str) and _is_gone(value)]
        if missing:
            self._say(self._step, f"runs: an earlier result exists, but its model was deleted: {missing[0]}")
            return None
        source = self._read_source(key)
        self._say(self._step, f"taken from the cache: same code, settings and inputs as in run {source}")
        self._record.update(self._step, state="cached", seconds=0.0, source_run=source, outputs=describe_outputs(outputs))
        return outputs

    def put(self, key: str, outputs: dict[str, Any]) -> None:
        super().put(key, outputs)
        write_json(self._source_path(key), {"run": self._record.id})
        write_json(self._last_path(), self._facts)

    def _replayed(self) -> dict[str, Any] | None:
        assert self._replay is not None
        if self._step == self._only:
            return None
        past = self._replay.step(self._step)
        if "outputs" not in past:
            return None  # the handler refuses to run it, so nothing downstream of it runs either
        self._say(self._step, f"taken from run {self._replay.id}")
        self._record.update(self._step, state="cached", seconds=0.0, source_run=self._replay.id, outputs=past["outputs"])
        return restore_outputs(past["outputs"], self._step)

    def _why_not(self) -> str:
        try:
            last = json.loads(self._last_path().read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return "it never ran before"
        changed = [name for name in self._facts if json.dumps(self._facts[name], default=str) != json.dumps(last.get(name), default=str)]
        if not changed:
            return "its earlier outputs are gone"
        return "changed since the last time: " + "; ".join(_difference(name, last.get(name), self._facts[name]) for name in changed)

    def _source_path(self, key: str) -> Path:
        return Path(self.cache_root) / "sources" / f"{key}.json"

    def _last_path(self) -> Path:
        return Path(self.cache_root) / "last" / f"{self._step}.json"

    def _read_source(self, key: str) -> str:
        try:
            return str(json.loads(self._source_path(key).read_text(encoding="utf-8"))["run"])
        except (OSError, ValueError, KeyError):
            return "an earlier one"


def _identity(value: Any) -> Any:
    """What a step's outcome depends on in one input: content, where it is known."""
    if isinstance(value, dsl.Artifact):
        return value.metadata.get("digest") or value.uri
    if isinstance(value, str) and value.startswith("/") and Path(value).is_dir():
        files = sorted(path for path in Path(value).rglob("*") if path.is_file())
        return [value, sha256_text(json.dumps([[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files]))]
    return value


def _difference(name: str, old: Any, new: Any) -> str:
    if isinstance(new, (int, float, bool)) or (isinstance(new, str) and len(new) < 60 and len(str(old)) < 60 and name != "code"):
        return f"{name} {old} → {new}"
    return name


def _is_gone(value: str) -> bool:
    return value.startswith("file://") and not (Path(value.removeprefix("file://")) / MANIFEST).is_file()


def describe_outputs(outputs: dict[str, Any]) -> dict[str, Any]:
    """A step's outputs as they stand in the run record: parameters, and artifacts with uri, type and metadata."""
    artifacts = {name: value for name, value in outputs.items() if isinstance(value, dsl.Artifact)}
    return {
        "parameters": {name: value for name, value in outputs.items() if name not in artifacts},
        "artifacts": {
            name: {"uri": value.uri, "type": value.schema_title, "metadata": value.metadata} for name, value in artifacts.items()
        },
    }


def restore_outputs(described: dict[str, Any], step: str) -> dict[str, Any]:
    """The outputs that a run record describes, as kfp.local wants them.

    Raises:
        UserError: an artifact was deleted.
    """
    from kfp.dsl import executor

    outputs = dict(described["parameters"])
    gone = [value for value in outputs.values() if isinstance(value, str) and _is_gone(value)]
    gone += [
        artifact["uri"]
        for artifact in described["artifacts"].values()
        if "://" not in artifact["uri"] and not Path(artifact["uri"]).exists()
    ]
    if gone:
        raise UserError(f"an output of {step} in the past run was deleted", where=gone[0], fix="start a new run")
    for name, artifact in described["artifacts"].items():
        message = {"name": name, "uri": artifact["uri"], "metadata": artifact["metadata"], "type": {"schemaTitle": artifact["type"]}}
        outputs[name] = executor.create_artifact_instance(message)
    return outputs
