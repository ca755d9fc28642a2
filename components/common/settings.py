"""How every command reads its settings: one pydantic model gives the flags, the validation and the help.

A stage subclasses `StepSettings` in its `config.py`: the one place where a default is written. The same names are the command's
flags, the component's parameters and the pipeline's parameters. Environment variables are not read: what a step does must follow
from its arguments, or a cached result would lie.
"""

from __future__ import annotations

import json
import sys
from typing import Any, Self, get_args

from pydantic import ValidationError
from pydantic_settings import BaseSettings, CliApp, PydanticBaseSettingsSource, SettingsConfigDict

from components.common.contract import ExecutorInput, StepOutputs
from components.common.errors import UserError


class StepSettings(BaseSettings):
    """Base of the settings of a step: flags only, unknown flags refused."""

    model_config = SettingsConfigDict(
        extra="forbid",
        cli_implicit_flags=True,
        cli_avoid_json=True,
        cli_enforce_required=False,
        populate_by_name=True,
        protected_namespaces=(),
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return (init_settings,)

    @classmethod
    def default(cls, name: str) -> Any:
        """The default of one setting, for the pipeline's parameters of the same name."""
        return cls.model_fields[name].get_default(call_default_factory=True)

    @classmethod
    def problems(cls, values: dict[str, Any]) -> list[str]:
        """What is wrong with those of the values that are settings of this step, a line each; other names are not looked at."""
        try:
            cls(**{name: value for name, value in values.items() if name in cls.model_fields})
        except ValidationError as error:
            return _described(error)
        return []

    @classmethod
    def parse(cls, program: str, argv: list[str] | None = None) -> tuple[Self, StepOutputs]:
        """Settings and outputs of a step, from flags or from KFP's `--executor_input JSON`.

        Args:
            program: the name that the help shows, such as ``python -m components.train``.
            argv: the arguments; `sys.argv[1:]` when None.

        Raises:
            UserError: a value is missing or wrong; all mistakes are named at once.
        """
        arguments = cls._with_values(list(sys.argv[1:] if argv is None else argv))
        executor_input = ExecutorInput.take_from(arguments)
        cls.model_config["cli_prog_name"] = program
        try:
            settings = CliApp.run(cls, cli_args=arguments, **cls._given(executor_input))
        except ValidationError as error:
            lines = _described(error)
            raise UserError(
                f"{len(lines)} setting(s) of `{program}` can't be used",
                where="; ".join(lines),
                fix=f"see `{program} --help`",
            ) from None
        return settings, StepOutputs(executor_input)

    @classmethod
    def _with_values(cls, arguments: list[str]) -> list[str]:
        """Flags as they may be typed: `--show-row` is `--show_row`, and a bare flag of a setting that may be true means true."""
        named = {name.replace("_", "-"): name for name in cls.model_fields}
        arguments = [f"--{named[part[2:]]}" if part[:2] == "--" and part[2:] in named else part for part in arguments]
        choices = {f"--{name}" for name, field in cls.model_fields.items() if bool in get_args(field.annotation)}
        followed = [*arguments, "--"][1:]
        pairs = zip(arguments, followed, strict=True)
        return [part for flag, value in pairs for part in ((flag, "true") if flag in choices and value.startswith("--") else (flag,))]

    @classmethod
    def _given(cls, executor_input: ExecutorInput | None) -> dict[str, Any]:
        """What KFP gives for our settings; it adds inputs of its own (image, resources) to a task, which are not ours."""
        if executor_input is None:
            return {}
        return {name: value for name, value in executor_input.settings().items() if name in cls.model_fields}


def _described(error: ValidationError) -> list[str]:
    """One line for each setting that can't be used; where several kinds of value are allowed, what each of them needs."""
    by_name: dict[str, list[Any]] = {}
    for problem in error.errors():
        by_name.setdefault(str(problem["loc"][0]) if problem["loc"] else "settings", []).append(problem)
    lines = []
    for name, problems in by_name.items():
        needs = " or ".join(problem["msg"].removeprefix("Value error, ") for problem in problems).replace(" or Input should be ", ", or ")
        first = problems[0]
        given = "" if first["type"] == "missing" else f" (given: {json.dumps(first['input'], default=str, ensure_ascii=False)[:80]})"
        lines.append(f"--{name}: {needs}{given}")
    return lines
