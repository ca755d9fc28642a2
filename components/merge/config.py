"""Settings of the merge step; the one place where their defaults are written."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import AliasChoices, Field

from components.common.settings import StepSettings

DEFAULT_OUTPUT = Path("qwen-medical-qa-merged")


class MergeSettings(StepSettings):
    """Base model + LoRA adapter → merged model in a usual folder, stored by its digest, with `merge_info.json` and a report."""

    base_model: str = Field(
        "", description="base model: hub id, folder, s3:// address, or package:gemma3-270m; empty: the one the adapter was trained on"
    )
    adapter: Path = Field(
        Path("qwen-medical-qa-lora"), validation_alias=AliasChoices("adapter", "lora_model"), description="adapter folder that train wrote"
    )
    dataset: Path | None = Field(
        None,
        description="data set folder that prepare wrote: rows of its validation split measure the merge; without it, four built-in questions",
    )
    output: Path | None = Field(
        None, description=f"folder to write the merged model to; ./{DEFAULT_OUTPUT} when there is no storage_uri either"
    )
    storage_uri: str = Field(
        "",
        description="storage root (file:///… or s3://bucket/prefix) to store the merged model in, at models/<digest>/; empty: output only",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="where the models are compared (weights are merged on the CPU, piece by piece); auto: cuda when there is one"
    )
    precision: Literal["bf16", "fp16", "fp32"] = Field(
        "bf16", description="precision of the merged weights; the merge itself is done in fp32"
    )
    merge_base: Literal["auto", "original", "dequantized"] = Field(
        "auto",
        description="weights that an adapter trained on a quantised base is merged into: the original ones, or those after quantising and back; "
        "auto: measure both and keep the better",
    )
    export: Literal["none", "int8", "int4", "both"] = Field(
        "none", description="also write the merged model quantised for serving, beside the output (<output>-int8, <output>-int4)"
    )
    compare: bool = Field(False, description="print the sizes of adapter, base and merged model as a table")
    merge_info: Path = Field(Path("merge_info.json"), description="output file: what was merged and how well it agrees with the adapter")
    report: Path = Field(Path("merge_report.html"), description="output file: the same as a page to read")
    metrics: Path = Field(Path("merge_metrics.json"), description="output file of the metrics")

    @property
    def folder(self) -> Path | None:
        """The folder to keep the merged model in; None when it is only stored."""
        return self.output or (None if self.storage_uri else DEFAULT_OUTPUT)

    @property
    def schemes(self) -> tuple[Literal["int8", "int4"], ...]:
        """The quantised exports that are asked for."""
        return {"none": (), "int8": ("int8",), "int4": ("int4",), "both": ("int8", "int4")}[self.export]  # type: ignore[return-value]
