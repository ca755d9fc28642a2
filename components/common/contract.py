"""The contract between KFP and a step: executor input in, executor output out, both JSON.

The same on a cluster and under `kfp.local`. A component passes `--executor_input '{{$}}'`; the step writes its executor output once,
atomically, at the end, with every output artifact in it: a step that failed leaves none, so it can't be taken for a success.
Source: KFP's `pipeline_spec.proto` (ExecutorInput, ExecutorOutput).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Self

from components.common.errors import UserError
from components.common.files import write_atomically

FLAG = "--executor_input"
# Where the KFP launcher mounts a bucket: s3://bucket/key is the file /s3/bucket/key.
_REMOTE_SCHEMES = ("gs", "s3", "minio")


def local_path(uri: str) -> Path:
    """The local path behind an artifact's URI, as the KFP launcher maps it."""
    scheme, separator, rest = uri.partition("://")
    if not separator or scheme == "file":
        return Path(rest if separator else uri)
    if scheme not in _REMOTE_SCHEMES:
        raise UserError(f"artifacts can't live at a {scheme}:// address", where=uri)
    return Path("/", "gcs" if scheme == "gs" else scheme, rest)


class ExecutorInput:
    """What KFP tells a step: its parameters, its input artifacts, and where its outputs go."""

    def __init__(self, message: dict[str, Any]) -> None:
        inputs = message.get("inputs", {})
        outputs = message["outputs"]
        self.parameters: dict[str, Any] = inputs.get("parameterValues", {})
        self.input_artifacts: dict[str, dict[str, Any]] = {
            name: entry["artifacts"][0] for name, entry in inputs.get("artifacts", {}).items()
        }
        self.output_artifacts: dict[str, dict[str, Any]] = {
            name: entry["artifacts"][0] for name, entry in outputs.get("artifacts", {}).items()
        }
        self.output_file = Path(outputs["outputFile"])

    @classmethod
    def take_from(cls, arguments: list[str]) -> Self | None:
        """Remove `--executor_input JSON` from a step's arguments and parse it; None when the step was started by hand."""
        if FLAG not in arguments:
            return None
        at = arguments.index(FLAG)
        try:
            message = json.loads(arguments[at + 1])
            executor_input = cls(message)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{FLAG} needs KFP's executor input as JSON", where=f"{type(error).__name__}: {error}") from None
        del arguments[at : at + 2]
        return executor_input

    def settings(self) -> dict[str, Any]:
        """Parameters and artifact paths by name; an empty string means that the pipeline leaves the setting at its default."""
        values = {name: value for name, value in self.parameters.items() if value != ""}
        artifacts = self.input_artifacts | self.output_artifacts
        return values | {name: str(local_path(artifact["uri"])) for name, artifact in artifacts.items()}


def _finite(value: Any) -> Any:
    """A metadata value that KFP accepts: NaN, infinity and null fail a finished step, so they become text."""
    if value is None:
        return ""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value if isinstance(value, (bool, int, float, str)) else str(value)


class StepOutputs:
    """Collects a step's output parameters and artifact metadata, and writes them once at the end.

    Started by hand (no executor input), `write` does nothing: the step's files are its result.
    """

    def __init__(self, executor_input: ExecutorInput | None) -> None:
        self._executor_input = executor_input
        if executor_input:
            for artifact in executor_input.output_artifacts.values():
                local_path(artifact["uri"]).parent.mkdir(parents=True, exist_ok=True)

    def write(self, *, parameters: dict[str, Any] | None = None, metadata: dict[str, dict[str, Any]] | None = None) -> None:
        """Write the executor output.

        Args:
            parameters: output parameters by name.
            metadata: facts by artifact name. The metadata of a `system.Metrics` artifact is what the UI shows as metrics.
        """
        if self._executor_input is None:
            return
        facts = metadata or {}
        unknown = facts.keys() - self._executor_input.output_artifacts.keys()
        if unknown:
            raise ValueError(f"no such output artifact: {sorted(unknown)}")
        artifacts = {
            name: {"artifacts": [artifact | {"metadata": _finite(facts.get(name, {}))}]}
            for name, artifact in self._executor_input.output_artifacts.items()
        }
        for artifact in self._executor_input.output_artifacts.values():
            path = local_path(artifact["uri"])
            if not path.exists():  # a Metrics artifact has only metadata, but the launcher uploads a file
                path.touch()
        message = {"parameterValues": _finite(parameters or {}), "artifacts": artifacts}
        self._executor_input.output_file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self._executor_input.output_file, json.dumps(message, ensure_ascii=False, allow_nan=False))
