"""Fixtures that several tests share: a tiny real model and rows that it knows."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

PROJECT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def tiny_rows() -> list[dict[str, str]]:
    """The 30 question/answer rows that ship with the project."""
    lines = (PROJECT / "data" / "medical_qa_data.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, tiny_rows: list[dict[str, str]]) -> Path:
    """A tiny Qwen2 pre-trained on half of the rows: LoRA on a random base learns nothing.

    Built once per machine and version of its recipe (about 20 s), then taken from the pytest cache folder.
    """
    from tests.tiny_model import build_tiny_model

    return build_tiny_model(tiny_rows, PROJECT / ".pytest_cache" / "models")


@pytest.fixture(scope="session")
def test_image() -> str:
    """An image with Python for Docker tests: $MEDICAL_QA_TEST_IMAGE, else the light image of the project."""
    return os.environ.get("MEDICAL_QA_TEST_IMAGE", "medical-qa-light:dev")


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, str]]]:
    """A real S3 server: the folder of its one bucket, `bucket`, and the environment variables to reach it."""
    data = tmp_path_factory.mktemp("s3")
    (data / "bucket").mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        host, port = probe.getsockname()
    rclone = [str(Path(sys.executable).with_name("rclone")), "--config", "/dev/null", "serve", "s3", "--addr", f"{host}:{port}"]
    server = subprocess.Popen([*rclone, "--auth-key", "key,secret", str(data)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(100):
        with socket.socket() as probe:
            if probe.connect_ex((host, port)) == 0:
                break
        time.sleep(0.1)
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}
    yield data / "bucket", keys | {"AWS_ENDPOINT_URL": f"http://{host}:{port}"}
    server.terminate()
    server.wait(10)
