"""How every command reads its settings: one pydantic model gives the flags, the validation and the help.

A stage subclasses `StepSettings` in its `config.py`: the one place where a default is written. The same names are the command's
flags, the component's parameters and the pipeline's parameters. Environment variables are not read: what a step does must follow
from its arguments, or a cached result would lie.
"""

from __future__ import annotations

import json
import sys
from typing import Any, Self

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
    def parse(cls, program: str, argv: list[str] | None = None) -> tuple[Self, StepOutputs]:
        """Settings and outputs of a step, from flags or from KFP's `--executor_input JSON`.

        Args:
            program: the name that the help shows, such as ``python -m components.train``.
            argv: the arguments; `sys.argv[1:]` when None.

        Raises:
            UserError: a value is missing or wrong; all mistakes are named at once.
        """
        arguments = list(sys.argv[1:] if argv is None else argv)
        executor_input = ExecutorInput.take_from(arguments)
        cls.model_config["cli_prog_name"] = program
        try:
            settings = CliApp.run(cls, cli_args=arguments, **cls._given(executor_input))
        except ValidationError as error:
            raise UserError(
                f"{error.error_count()} setting(s) of `{program}` can't be used",
                where="; ".join(_describe(problem) for problem in error.errors()),
                fix=f"see `{program} --help`",
            ) from None
        return settings, StepOutputs(executor_input)

    @classmethod
    def _given(cls, executor_input: ExecutorInput | None) -> dict[str, Any]:
        """What KFP gives for our settings; it adds inputs of its own (image, resources) to a task, which are not ours."""
        if executor_input is None:
            return {}
        return {name: value for name, value in executor_input.settings().items() if name in cls.model_fields}


def _describe(problem: Any) -> str:
    name = ".".join(str(part) for part in problem["loc"]) or "settings"
    given = "" if problem["type"] == "missing" else f" (given: {json.dumps(problem['input'], default=str, ensure_ascii=False)[:80]})"
    return f"--{name}: {problem['msg'].removeprefix('Value error, ')}{given}"
