"""Settings of the service; the one place where their defaults are written."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import AliasChoices, Field

from components.common.settings import StepSettings


class ServeSettings(StepSettings):
    """The /ask service: FastAPI in front of a merged model."""

    model_uri: str = Field(
        "qwen-medical-qa-merged",
        validation_alias=AliasChoices("model_uri", "model_path"),
        description="merged model: folder, file:// or s3:// address",
    )
    host: str = Field("127.0.0.1", description="address to listen on; 0.0.0.0: every interface")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0: any free one")
    precision: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        "auto", description="compute precision; auto: bf16 where the device has it, else fp32"
    )
    max_new_tokens: int = Field(512, ge=1, description="longest answer that may be asked for, tokens")
    max_prompt_tokens: int = Field(2048, ge=16, description="longest prompt, tokens")
    max_concurrency: int = Field(16, ge=1, description="answers generated side by side")
    max_queue: int = Field(64, ge=0, description="requests that may wait; more are refused with 503")
    request_timeout_s: float = Field(120, gt=0, description="longest time for one answer, waiting included, seconds")
    drain_s: float = Field(10, ge=0, description="longest wait for running answers after SIGTERM, seconds")
    allowed_model_roots: str = Field(
        "", description="folders and addresses that /reload_model may load from, separated by commas; empty: only where model_uri lies"
    )
    log_file: Path = Field(Path("api_server.log"), description="file that gets the log lines too; empty: none")
