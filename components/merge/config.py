"""Settings of the merge step; the one place where their defaults are written."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import AliasChoices, Field

from components.common.settings import StepSettings

DEFAULT_OUTPUT = Path("qwen-medical-qa-merged")


class MergeSettings(StepSettings):
    """Base model + LoRA adapter → merged model in a usual folder, stored by its digest, with `merge_info.json`."""

    base_model: str = Field(
        "", description="base model: hub id, folder, s3:// address, or package:gemma3-270m; empty: the one the adapter was trained on"
    )
    adapter: Path = Field(
        Path("qwen-medical-qa-lora"), validation_alias=AliasChoices("adapter", "lora_model"), description="adapter folder that train wrote"
    )
    output: Path | None = Field(
        None, description=f"folder to write the merged model to; ./{DEFAULT_OUTPUT} when there is no storage_uri either"
    )
    storage_uri: str = Field(
        "",
        description="storage root (file:///… or s3://bucket/prefix) to store the merged model in, at models/<digest>/; empty: output only",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where to merge; auto: cuda when there is one")
    precision: Literal["bf16", "fp16", "fp32"] = Field(
        "bf16", description="precision of the merged weights; the merge itself is done in fp32"
    )
    compare: bool = Field(False, description="print the sizes of adapter, base and merged model as a table")
    merge_info: Path = Field(Path("merge_info.json"), description="output file: what was merged and how well it agrees with the adapter")
    metrics: Path = Field(Path("merge_metrics.json"), description="output file of the metrics")

    @property
    def folder(self) -> Path | None:
        """The folder to keep the merged model in; None when it is only stored."""
        return self.output or (None if self.storage_uri else DEFAULT_OUTPUT)
