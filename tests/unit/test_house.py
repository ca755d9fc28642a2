"""The sentences of the design that a program can check."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[2]
STAGES = ("prepare", "train", "merge", "evaluate", "deploy", "serve", "report")
HELP_SECONDS = 1.5  # measured: about 0.3 s; the bound leaves room for a busy machine


def imports(path: Path) -> Iterator[str]:
    """The modules a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def test_a_stage_imports_only_itself_and_common() -> None:
    for stage in STAGES:
        for path in (PROJECT / "components" / stage).rglob("*.py"):
            ours = [name for name in imports(path) if name.split(".")[0] in ("components", "orchestration", "pipeline")]
            wrong = [name for name in ours if not name.startswith((f"components.{stage}", "components.common"))]
            assert not wrong, f"{path}: {wrong}"


def test_common_imports_no_stage() -> None:
    for path in (PROJECT / "components" / "common").rglob("*.py"):
        assert all(name.startswith("components.common") for name in imports(path) if name.startswith(("components", "orchestration"))), path


def test_orchestration_knows_no_stage_inside() -> None:
    for path in (PROJECT / "orchestration").rglob("*.py"):
        wrong = [name for name in imports(path) if name.startswith("components.") and not name.startswith("components.common")]
        assert not wrong, f"{path}: {wrong}"


def test_kfp_stays_out_of_the_steps() -> None:
    for path in (PROJECT / "components").rglob("*.py"):
        if path.name == "component.py":
            assert set(imports(path)) == {"kfp"}, path
        else:
            assert not [name for name in imports(path) if name.split(".")[0] == "kfp"], path


@pytest.mark.parametrize("stage", STAGES)
def test_help_is_light_and_explains_every_flag(stage: str) -> None:
    """`--help` never imports torch, and every flag has a description and its default."""
    program = f"import sys, runpy; sys.argv = ['x', '--help']\ntry:\n    runpy.run_module('components.{stage}', run_name='__main__')\nfinally:\n    heavy = {{'torch', 'transformers', 'datasets', 'pandas'}} & set(sys.modules)\n    print('HEAVY', sorted(heavy))"
    started = time.monotonic()
    result = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, timeout=60, check=False)
    seconds = time.monotonic() - started
    assert result.returncode == 0, result.stderr
    assert "HEAVY []" in result.stdout
    assert f"python -m components.{stage}" in result.stdout
    assert seconds < HELP_SECONDS * 4, f"{seconds:.1f} s"
    from importlib import import_module

    fields = getattr(import_module(f"components.{stage}.config"), f"{stage.capitalize()}Settings").model_fields
    for name, field in fields.items():
        assert field.description, f"{stage}.{name} has no description"
        assert f"--{name}" in result.stdout, f"{stage}.{name} is not in --help"


def test_an_unknown_flag_is_refused() -> None:
    for stage in STAGES:
        result = subprocess.run(
            [sys.executable, "-m", f"components.{stage}", "--no_such_flag", "1"],
            cwd=PROJECT,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert result.returncode == 2, stage
        assert "no_such_flag" in result.stderr and "Traceback" not in result.stderr


def test_no_file_is_a_book() -> None:
    """A file fits in a head."""
    for path in [PROJECT / "pipeline.py", *(PROJECT / "components").rglob("*.py"), *(PROJECT / "orchestration").rglob("*.py")]:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path
