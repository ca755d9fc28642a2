"""The whole pipeline in process mode, with a tiny real model; docker mode is held to the same assertions."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.pipeline.journey import Journey, check_journey, outputs


def test_process_mode(tiny_model: Path, tmp_path: Path) -> None:
    journey = Journey(tmp_path, tiny_model, "process", {})
    try:
        check_journey(journey)
    finally:
        journey.command("stop")


def test_the_model_travels_through_a_bucket(
    tiny_model: Path, tmp_path: Path, s3_server: tuple[Path, dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Merge stores it there, evaluate and the service fetch it from there; nothing is left of it in the run's folder."""
    for name, value in (s3_server[1] | {"MEDICAL_QA_CACHE": str(tmp_path / "cache")}).items():
        monkeypatch.setenv(name, value)
    journey = Journey(tmp_path, tiny_model, "process", {})
    try:
        result, record = journey.run(storage_uri="s3://bucket/storage")
        assert result.returncode == 0, result.stdout[-6000:]
        model_uri = outputs(record, "merge")["parameters"]["model_uri"]
        assert model_uri.startswith("s3://bucket/storage/models/")
        assert journey.ask("肺部感染怎么办？")["model_digest"] == model_uri.rsplit("/", 1)[1]
        assert not list((tmp_path / "runs").rglob("model*.safetensors"))
    finally:
        journey.command("stop")


@pytest.mark.docker
def test_docker_mode(tiny_model: Path, tmp_path: Path) -> None:
    images = {
        "image": os.environ.get("MEDICAL_QA_IMAGE", "medical-qa:dev"),
        "light_image": os.environ.get("MEDICAL_QA_LIGHT_IMAGE", "medical-qa-light:dev"),
    }
    journey = Journey(tmp_path, tiny_model, "docker", images)
    try:
        check_journey(journey)
    finally:
        journey.command("stop")
