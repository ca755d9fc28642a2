"""Where and in which precision a model computes, with the reason of each choice."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

Precision = Literal["auto", "bf16", "fp16", "fp32"]


class Compute(NamedTuple):
    """A device and a dtype of torch, and one line that says why they were chosen."""

    device: Any
    dtype: Any
    reason: str


def choose_compute(precision: Precision = "auto") -> Compute:
    """The device and dtype to load a model with.

    `auto` means bf16 where the device computes it natively, else fp32; never fp16, in which Qwen models overflow.
    """
    # Idle OpenMP threads that spin starve every other thread of a small machine; libgomp reads this once, when torch loads it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    threads = _use_cpus(torch)
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    where = f"{device} ({torch.cuda.get_device_name(0) if on_gpu else f'no GPU found; {threads}'})"
    if precision != "auto":
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]
        return Compute(device, dtype, f"device: {where}; precision: {precision} (as asked)")
    native = torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else _cpu_has_bf16(torch)
    dtype = torch.bfloat16 if native else torch.float32
    why = "bf16 (this device computes it natively)" if native else "fp32 (this device has no native bf16)"
    return Compute(device, dtype, f"device: {where}; precision: {why}")


def usable_cpus() -> int:
    """How many CPUs this process may use: its affinity, cut by the container's CPU limit, at least one."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        limit = affinity if quota == "max" else -(-int(quota) // int(period))
    except (OSError, ValueError):
        limit = affinity
    return max(1, min(affinity, limit))


def _use_cpus(torch: Any) -> str:
    """Let torch use the CPUs that are ours: by itself it starts a thread for every core of the node, whatever the container's limit."""
    if "OMP_NUM_THREADS" in os.environ:
        return f"{torch.get_num_threads()} threads, from OMP_NUM_THREADS"
    torch.set_num_threads(usable_cpus())
    return f"{torch.get_num_threads()} threads, one for each usable CPU"


def _cpu_has_bf16(torch: Any) -> bool:
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
