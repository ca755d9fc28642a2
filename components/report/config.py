"""Settings of the report step; the one place where their defaults are written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from components.common.settings import StepSettings


class ReportSettings(StepSettings):
    """The run record → the page of the run; runs last, also after a failure."""

    run_record: str = Field("", description="run.json of a local run; empty: only the final status is known")
    status: dict[str, Any] = Field(default_factory=dict, description="final status of the pipeline, as KFP gives it")
    page: Path = Field(Path("run.html"), description="output file of the page")
