"""The compiled pipeline: one file for every cluster, and for local runs."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from kfp import compiler
from kfp.pipeline_spec import pipeline_spec_pb2

from components.common.errors import UserError

TRUE, FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")


def compile_pipeline(target: Path) -> Path:
    """Compile the pipeline into a YAML file."""
    from pipeline import medical_qa

    target.parent.mkdir(parents=True, exist_ok=True)
    compiler.Compiler().compile(medical_qa, str(target))
    return target


def compiled_spec() -> pipeline_spec_pb2.PipelineSpec:
    """The compiled pipeline, read back from its file as a cluster would."""
    from kfp.components import load_component_from_file

    with tempfile.TemporaryDirectory() as folder:
        path = compile_pipeline(Path(folder) / "pipeline.yaml")
        spec: pipeline_spec_pb2.PipelineSpec = load_component_from_file(str(path)).pipeline_spec
    return spec


def parameter_defaults(spec: pipeline_spec_pb2.PipelineSpec) -> dict[str, Any]:
    """Every pipeline parameter with its default."""
    from kfp.local.executor_output_utils import cast_protobuf_numbers, pb2_value_to_python

    parameters = spec.root.input_definitions.parameters
    values = {name: pb2_value_to_python(parameter.default_value) for name, parameter in parameters.items()}
    return cast_protobuf_numbers(values, parameters)


def parse_assignments(assignments: list[str], defaults: dict[str, Any]) -> dict[str, Any]:
    """`name=value` texts as parameter values of the right type.

    Raises:
        UserError: no `=`, an unknown name, or a value of the wrong type.
    """
    values: dict[str, Any] = {}
    for assignment in assignments:
        name, separator, text = assignment.partition("=")
        if not separator:
            raise UserError("--set needs name=value", where=f"--set {assignment}", fix="for example: --set learning_rate=1e-4")
        values[name] = text
    return check_parameters(values, defaults, where="--set")


def check_parameters(values: dict[str, Any], defaults: dict[str, Any], *, where: str) -> dict[str, Any]:
    """Values converted to the type of their parameter's default.

    Raises:
        UserError: an unknown name, or a value of the wrong type.
    """
    import difflib

    from pipeline import SETTINGS

    checked = {}
    for name, value in values.items():
        if name not in defaults:
            near = difflib.get_close_matches(name, defaults, 3)
            raise UserError(
                f"the pipeline has no parameter {name!r}",
                where=where,
                fix=f"did you mean {' or '.join(near)}?" if near else f"one of: {', '.join(sorted(defaults))}",
            )
        try:
            checked[name] = _as_type_of(value, defaults[name])
        except (ValueError, TypeError):
            raise UserError(f"{name} needs {_kind(defaults[name])}, not {value!r}", where=where) from None
    problems = []
    for component, settings in SETTINGS:
        taken = component.component_spec.inputs or {}
        found = settings.problems({name: value for name, value in checked.items() if name in taken})
        problems += [problem.removeprefix("--") for problem in found]
    if problems:
        raise UserError(f"{len(set(problems))} parameter(s) can't be used", where=f"{where}: {'; '.join(dict.fromkeys(problems))}")
    return checked


def _as_type_of(value: Any, default: Any) -> Any:
    import json

    if isinstance(default, bool):
        text = str(value).strip().lower()
        if text not in TRUE + FALSE:
            raise ValueError(text)
        return text in TRUE
    if isinstance(default, int):
        number = float(value)
        if number != int(number):
            raise ValueError(value)
        return int(number)
    if isinstance(default, float):
        return float(value)
    if isinstance(default, (list, dict)):
        parsed = json.loads(value) if isinstance(value, str) else value
        if not isinstance(parsed, type(default)):
            raise TypeError(value)
        return parsed
    return str(value)


def _kind(default: Any) -> str:
    kinds = {bool: "true or false", int: "a whole number", float: "a number", list: "a JSON list", dict: "a JSON object"}
    return kinds.get(type(default), "text")
