"""Memory: what a device has left for this process, and how much the process has used at most."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path
from typing import Any, NamedTuple

CGROUP = Path("/sys/fs/cgroup")


class Memory(NamedTuple):
    """What a device has."""

    free_bytes: int
    total_bytes: int


def device_memory(device: Any, processes: int = 1, cgroup: Path = CGROUP) -> Memory:
    """What this process may use of a device; processes on a CPU share its memory, and the container's limit counts."""
    if device.type == "cuda":
        import torch

        return Memory(*torch.cuda.mem_get_info())
    import psutil

    machine = psutil.virtual_memory()
    free, total = machine.available, machine.total
    limit = _container_limit(cgroup)
    if limit is not None:
        total = min(total, limit)
        free = min(free, max(0, limit - _container_anonymous(cgroup)))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", processes))
    return Memory(free // here, total // here)


def free_bytes(device: Any) -> int:
    """What this process may still use of a device."""
    return device_memory(device).free_bytes


def _container_limit(cgroup: Path) -> int | None:
    try:
        text = (cgroup / "memory.max").read_text(encoding="ascii").strip()
    except OSError:  # not in a container
        return None
    return int(text) if text.isdigit() else None


def _container_anonymous(cgroup: Path) -> int:
    """Bytes that the container holds and can't drop; cached files can be."""
    try:
        lines = (cgroup / "memory.stat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("anon ")), 0)


def peak_memory_bytes() -> dict[str, int]:
    """Most memory in use so far: the process's, and the GPU's where there is one."""
    import torch

    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available():
        peak["gpu"] = torch.cuda.max_memory_allocated()
    return peak
