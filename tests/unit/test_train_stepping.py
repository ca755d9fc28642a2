"""Full memory: the micro-batches are halved, the effective batch and its gradients stay; the rest is said."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from components.common.errors import UserError
from components.train import stepping
from components.train.batches import Batch
from components.train.model import add_lora, load_base
from components.train.rows import Example
from components.train.run import Run
from components.train.stepping import accumulate_gradients, is_out_of_memory, micro_batches
from tests.unit.train_support import PAD, assert_close, encoded, gradients, plan_of, with_some_training

PROJECT = Path(__file__).resolve().parents[2]


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    AcceleratorState._reset_state(True)
    yield Accelerator(mixed_precision="no", cpu=True)
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="module")
def examples(tiny_model: Path, tiny_rows: list[dict[str, str]]) -> list[Example]:
    return encoded(tiny_model, tiny_rows[:8])


def memory_for(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the forward pass fail as a card does when a micro-batch has more tokens than this."""
    real = stepping.answer_nll

    def limited(model: Any, batch: Batch) -> torch.Tensor:
        if batch.tokens > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return real(model, batch)

    monkeypatch.setattr(stepping, "answer_nll", limited)


def test_full_memory_halves_the_micro_batches_and_the_gradients_stay(
    tiny_model: Path, examples: list[Example], accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_of(batch_size=8)
    model = with_some_training(add_lora(load_base(tiny_model, plan), plan))
    whole = accumulate_gradients(model, examples, plan, PAD, accelerator, Run())
    wanted = gradients(model)
    total = sum(len(row.ids) for row in examples)
    memory_for(total // 3, monkeypatch)  # eight rows don't fit, nor four; two do
    run = Run()
    loss = accumulate_gradients(model, examples, plan, PAD, accelerator, run)
    assert loss == pytest.approx(whole, rel=1e-5)
    assert_close(gradients(model), wanted)
    assert run.micro_batches == 4
    assert len(run.out_of_memory) == 2
    said = capsys.readouterr().out
    assert "the memory was full with 8 rows at a time" in said
    assert "effective batch stays" in said
    accumulate_gradients(model, examples, plan, PAD, accelerator, run)
    assert len(run.out_of_memory) == 2, "the next step tried the size that did not fit again"


def test_a_row_that_does_not_fit_alone_is_told_with_what_would_help(
    tiny_model: Path, examples: list[Example], accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(batch_size=8)
    model = add_lora(load_base(tiny_model, plan), plan)
    memory_for(10, monkeypatch)
    with pytest.raises(UserError, match="even with one row") as error:
        accumulate_gradients(model, examples, plan, PAD, accelerator, Run())
    for setting in ("--gradient_checkpointing", "--quantization nf4", "--max_length"):
        assert setting in error.value.fix


def test_another_error_of_the_library_is_not_taken_for_full_memory(
    tiny_model: Path, examples: list[Example], accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(model: Any, batch: Batch) -> torch.Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(stepping, "answer_nll", broken)
    plan = plan_of()
    with pytest.raises(RuntimeError, match="illegal memory access"):
        accumulate_gradients(add_lora(load_base(tiny_model, plan), plan), examples, plan, PAD, accelerator, Run())


def test_the_machines_own_full_memory_is_recognised() -> None:
    """A real allocation that a limit of the operating system refuses, in a process of its own."""
    program = (
        "import resource, torch\n"
        "from components.train.stepping import is_out_of_memory\n"
        "resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))\n"
        "try:\n    torch.ones(16 << 30, dtype=torch.uint8)\n"
        "except RuntimeError as error:\n    print('recognised' if is_out_of_memory(error) else error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, check=False, env=os.environ)
    assert done.stdout.strip() == "recognised", done.stderr
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))


def test_micro_batches_have_about_the_asked_size(examples: list[Example]) -> None:
    assert [len(micro_batches(examples, size)) for size in (8, 4, 3, 1)] == [1, 2, 3, 8]
    assert len(micro_batches(examples, 4, cut=2)) == 4
    assert len(micro_batches(examples, 4, cut=100)) == 8
    assert micro_batches([], 4) == []
