"""The whole pipeline in process mode, with a tiny real model; docker mode is held to the same assertions."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.pipeline.journey import Journey, check_journey


def test_process_mode(tiny_model: Path, tmp_path: Path) -> None:
    journey = Journey(tmp_path, tiny_model, "process", {})
    try:
        check_journey(journey)
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
