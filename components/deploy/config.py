"""Settings of the deploy step; the one place where their defaults are written."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from components.common.settings import StepSettings


class DeploySettings(StepSettings):
    """Model → answering service: candidate up, ready, smoke-tested, traffic moved; the former version stays if anything fails."""

    model_uri: str = Field("", description="merged model: folder, file:// or s3:// address")
    deploy_target: Literal["process", "docker"] = Field(
        "process", description="where the service runs: a local process, or a container on the local Docker Engine"
    )
    service_name: str = Field(
        "medical-qa", pattern=r"^[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?$", description="name of the service; one rollout at a time per name"
    )
    service_host: str = Field("127.0.0.1", description="address the service listens on")
    service_port: int = Field(8000, ge=1, le=65535, description="port the service listens on")
    service_image: str = Field("", description="image of the service, for the docker target")
    state_dir: Path = Field(Path("runs/services"), description="folder with what is live, its history and its logs")
    ready_timeout_s: float = Field(300, gt=0, description="longest wait for a candidate to become ready, seconds")
    smoke_timeout_s: float = Field(120, gt=0, description="longest wait for one smoke answer, seconds")
    watch_s: float = Field(3, ge=0, description="how long the new version is watched after the traffic moved, seconds")
    drain_s: float = Field(10, ge=0, description="longest wait for the former version to finish its answers, seconds")
    action: Literal["roll", "stop", "status", "rollback"] = Field(
        "roll",
        description="roll: serve model_uri; stop: stop the service; status: print what is live; rollback: serve the former version again",
    )
    rollout: Path = Field(Path("rollout.json"), description="output file: what was rolled out, step by step")
