"""Local runs: kfp.local walks the compiled graph; only the way a command is started is ours.

kfp.local has three bugs (2.17.0) that this module cures. Its Docker handler reports a container that ended before it was asked as a
success; it loses the artifacts of container components unless the step writes its executor output; and its `dsl.If` finds no output
that is not called `Output`. So here a step has succeeded only if its command ended with 0 *and* its executor output lies there.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import os
import re
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kfp import local as kfp_local
from kfp.local import cache as kfp_cache
from kfp.local import docker_task_handler, executor_input_utils, logging_utils, pipeline_orchestrator, status
from kfp.local.orchestrator.enhanced_dag_orchestrator import ConditionEvaluator
from kfp.pipeline_spec import pipeline_spec_pb2

from components.common.contract import FLAG, local_path
from orchestration import launch
from orchestration.cache import ExplainedCache
from orchestration.record import STEPS, RunRecord

PLACEHOLDER = re.compile(r"\{\{\$\.inputs\.parameters\['([^']+)'\]\}\}")
ERROR_LINE = re.compile(r"error: ")  # how our steps name a user's mistake
EXCEPTION_LINE = re.compile(r"[\w.]*(Error|Exception|Exit)\b.*")  # how Python ends a traceback
# A step's outcome also depends on these.
LIBRARIES = (
    "torch",
    "transformers",
    "peft",
    "accelerate",
    "bitsandbytes",
    "datasets",
    "tokenizers",
    "rouge-score",
    "bert-score",
    "pyarrow",
)


def say(step: str, line: str) -> None:
    """One line of a step, on standard output."""
    print(f"[{step}] {line}", flush=True)


class LocalRun:
    """One run of the compiled pipeline on this machine.

    Args:
        spec: the compiled pipeline.
        record: where the run's facts go.
        runner: "process" or "docker".
        use_cache: take the outputs of equal steps from earlier runs.
        replay: a past run whose outputs stand in for every step except `only`.
        only: the one step that shall run.
    """

    def __init__(
        self,
        spec: pipeline_spec_pb2.PipelineSpec,
        record: RunRecord,
        *,
        runner: str,
        use_cache: bool = True,
        replay: RunRecord | None = None,
        only: str | None = None,
    ) -> None:
        self.spec, self.record, self.runner, self.use_cache, self.replay, self.only = spec, record, runner, use_cache, replay, only
        self.runs_dir = record.folder.parent

    def execute(self) -> str:
        """Walk the graph to its end.

        Returns:
            "succeeded" or "failed".

        Raises:
            KeyboardInterrupt: interrupted; the record says so.
        """
        try:
            with self._ours_in_place():
                pipeline_orchestrator.run_local_pipeline(self.spec, dict(self.record.facts["parameters"]))
        except BaseException:
            self.record.finish("interrupted")
            raise
        states = {name: self.record.step(name)["state"] for name in STEPS}
        wanted = {self.only: states[self.only]} if self.only else states
        outcome = "failed" if "failed" in wanted.values() else "succeeded"
        self.record.finish(outcome)
        return outcome

    @contextlib.contextmanager
    def _ours_in_place(self) -> Iterator[None]:
        """kfp.local with our handler, our cache, our run folder and our output instead of its own."""
        run = self

        class Handler(docker_task_handler.DockerTaskHandler):
            def run(self) -> status.Status:
                return status.Status.SUCCESS if run.run_step(self.image, self.full_command, self.env_vars) else status.Status.FAILURE

        declared = {
            name: {*spec.input_definitions.parameters, *spec.input_definitions.artifacts} for name, spec in self.spec.components.items()
        }

        cache = ExplainedCache(
            str(self.runs_dir / ".cache"),
            record=self.record,
            code_of=self.code_of,
            replay=self.replay,
            only=self.only,
            say=say,
            declared=declared,
        )
        use_cache = self.use_cache or self.replay is not None

        with contextlib.ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
            for target, name, ours in (
                (docker_task_handler, "DockerTaskHandler", Handler),
                (kfp_cache, "get_local_cache", lambda: cache if use_cache else None),
                (executor_input_utils, "get_local_pipeline_resource_name", lambda _: self.record.id),
                (logging_utils, "local_logger_context", contextlib.nullcontext),
                (logging_utils, "indented_print", contextlib.nullcontext),
                (logging_utils, "print_horizontal_line", lambda: None),
                (ConditionEvaluator, "_resolve_pipeline_channel", staticmethod(_channel_value)),
                (logging.getLogger(), "disabled", True),  # what kfp.local logs, the record and our lines say already
            ):
                stack.enter_context(_replaced(target, name, ours))
            kfp_local.init(
                kfp_local.DockerRunner(),
                pipeline_root=str(self.runs_dir),
                workspace_root=str(self.record.folder / "workspace"),
                raise_on_error=False,
            )
            yield

    def run_step(self, image: str, command: list[str], env_vars: dict[str, str]) -> bool:
        """Run one step's command; True if it really succeeded."""
        executor_input = json.loads(command[command.index(FLAG) + 1])
        output_file = Path(executor_input["outputs"]["outputFile"])
        step = output_file.parent.name
        if self.only not in (None, step, "report") and step != "report":
            self.record.update(step, state="skipped", reason=f"only {self.only} was asked for")
            return False
        output_file.unlink(missing_ok=True)  # a retry uses the same folder: what an earlier attempt left proves nothing
        output_file.parent.mkdir(parents=True, exist_ok=True)
        log = self.record.folder / "logs" / f"{step}.log"
        parameters = executor_input.get("inputs", {}).get("parameterValues", {})
        image = PLACEHOLDER.sub(lambda match: str(parameters[match[1]]), image)
        started = time.time()
        self.record.update(
            step, state="running", started=started, log=str(log.relative_to(self.record.folder)), inputs=_declared_inputs(executor_input)
        )
        say(step, "started")
        with log.open("a", encoding="utf-8") as file:

            def on_line(line: str) -> None:
                file.write(line + "\n")
                file.flush()
                say(step, line)

            code = self._launch(step, image, command, env_vars, list(parameters.values()), on_line)
        seconds = round(time.time() - started, 2)
        facts: dict[str, Any] = {"ended": time.time(), "seconds": seconds, "exit_code": code}
        if code == 0 and output_file.is_file():
            outputs = _read_outputs(output_file)
            _name_pages(outputs)
            self.record.update(step, state="succeeded", outputs=outputs, **facts)
            say(step, f"done in {seconds:.1f} s")
            return True
        reason = _last_error(log) if code else "it ended without writing its outputs"
        self.record.update(step, state="failed", reason=reason, **facts)
        say(step, f"failed after {seconds:.1f} s, exit code {code}: {reason}; log: {log}")
        return False

    def _launch(
        self, step: str, image: str, command: list[str], env_vars: dict[str, str], values: list[Any], on_line: launch.OnLine
    ) -> int:
        if self.runner == "process":
            return launch.as_process(command, on_line)
        environment = (
            {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
            | {"MEDICAL_QA_CACHE": str(self.runs_dir / "cache")}
            | env_vars
        )
        mounts = launch.mounts_for(values, self.runs_dir)
        return launch.as_container(image, command, on_line, environment=environment, mounts=mounts, docker_access=step == "deploy")

    def code_of(self, step: str, arguments: dict[str, Any]) -> str:
        """The identity of a step's code, for the cache."""
        if self.runner == "process":
            return step_code_digest(step)
        name = str(arguments["pipelinechannel--image" if "pipelinechannel--image" in arguments else "pipelinechannel--light_image"])
        client = launch.docker_client()
        try:
            images = client.images.list(name=name)
        finally:
            client.close()
        return str(images[0].id) if images else name


def _channel_value(channel: str, io_store: Any) -> Any:
    """The value behind a channel in a condition: `pipelinechannel--<task>-<output>`, or an input of the graph."""
    name = channel.removeprefix("pipelinechannel--")
    parts = name.split("-")
    for at in range(1, len(parts)):
        with contextlib.suppress(ValueError, KeyError):
            return io_store.get_task_output("-".join(parts[:at]), "-".join(parts[at:]))
    return io_store.get_parent_input(channel)


@contextlib.contextmanager
def _replaced(target: Any, name: str, ours: Any) -> Iterator[None]:
    """`target.name` is ours while the block lasts."""
    theirs = target.__dict__[name]
    setattr(target, name, ours)
    try:
        yield
    finally:
        setattr(target, name, theirs)


def step_code_digest(step: str) -> str:
    """The sha256 over a step's sources, the common ones, and the versions of the libraries that decide its outcome."""
    root = launch.PROJECT / "components"
    digest = hashlib.sha256(sys.version.encode())
    for path in sorted([*(root / step).rglob("*.py"), *(root / "common").rglob("*.py")]):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    for library in LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            digest.update(f"{library}=={importlib.metadata.version(library)}".encode())
    return digest.hexdigest()


def _declared_inputs(executor_input: dict[str, Any]) -> dict[str, Any]:
    inputs = executor_input.get("inputs", {})
    parameters = {
        name: value
        for name, value in inputs.get("parameterValues", {}).items()
        if not name.startswith("pipelinechannel--") and "{{$" not in str(value)
    }
    return {
        "parameters": parameters,
        "artifacts": {name: entry["artifacts"][0]["uri"] for name, entry in inputs.get("artifacts", {}).items()},
    }


def _read_outputs(output_file: Path) -> dict[str, Any]:
    message = json.loads(output_file.read_text(encoding="utf-8"))
    artifacts = {name: entry["artifacts"][0] for name, entry in message["artifacts"].items()}
    return {
        "parameters": message["parameterValues"],
        "artifacts": {
            name: {"uri": str(local_path(artifact["uri"])), "type": artifact["type"]["schemaTitle"], "metadata": artifact["metadata"]}
            for name, artifact in artifacts.items()
        },
    }


def _name_pages(outputs: dict[str, Any]) -> None:
    """Give each HTML artifact a second name that ends in .html: a browser shows a file without it as text."""
    for artifact in outputs["artifacts"].values():
        path = Path(artifact["uri"])
        if artifact["type"] == "system.HTML" and path.is_file():
            named = path.with_name(f"{path.name}.html")
            named.unlink(missing_ok=True)
            named.hardlink_to(path)  # not a symlink: a browser judges the file that it leads to


def _last_error(log: Path) -> str:
    """The line of a log that best says what went wrong."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    for pattern in (ERROR_LINE, EXCEPTION_LINE):
        found = [line for line in lines if pattern.match(line)]
        if found:
            return found[-1].removeprefix("error: ")
    return lines[-1].strip() if lines else "no output"
