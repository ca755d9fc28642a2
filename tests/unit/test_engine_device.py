"""Where a model computes."""

from __future__ import annotations

import os

import pytest
import torch

from components.common.device import choose_compute, usable_cpus


def test_an_asked_precision_is_used() -> None:
    assert choose_compute("fp32").dtype is torch.float32
    assert choose_compute("bf16").dtype is torch.bfloat16
    assert choose_compute("fp16").dtype is torch.float16
    assert "as asked" in choose_compute("fp16").reason


def test_d17_auto_is_never_fp16_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    old = choose_compute()
    assert old.dtype is torch.float32
    assert "no native bf16" in old.reason
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    new = choose_compute()
    assert new.dtype is torch.bfloat16
    assert "natively" in new.reason


def test_threads_are_those_that_the_process_may_use() -> None:
    assert 1 <= usable_cpus() <= (os.cpu_count() or 1)
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert usable_cpus() == 1
    finally:
        os.sched_setaffinity(0, allowed)
