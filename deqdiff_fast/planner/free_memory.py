"""How much memory is free for a solve."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch

SHARE = 0.8  # of the free memory; the rest is left to the model's activations and to others


def free_bytes(device: torch.device) -> int | None:
    """Free memory of the device in bytes, what torch has cached included; None where nobody says."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    if device.type != "cpu":
        return None
    return min((found for found in (_available(), _container()) if found is not None), default=None)


def usable_bytes(device: torch.device) -> float:
    """How much a solve may ask for; infinite where nobody says what is free."""
    free = free_bytes(device)
    return math.inf if free is None else SHARE * free


def _available() -> int | None:
    """RAM that can be had without swapping; on systems without /proc, RAM that nobody uses."""
    try:
        return 1024 * _fields(Path("/proc/meminfo"))["MemAvailable:"]
    except (OSError, ValueError, IndexError, KeyError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _container() -> int | None:
    """What is left of the limit of the control group, where there is one; files that it has cached can be dropped."""
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((group / name).read_text(encoding="ascii")) for name in ("memory.max", "memory.current"))
        stat = _fields(group / "memory.stat")
    except (OSError, ValueError, IndexError):
        return None
    return max(limit - used + stat.get("inactive_file", 0) + stat.get("active_file", 0), 0)


def _fields(path: Path) -> dict[str, int]:
    """The second word of every line by its first."""
    lines = (line.split() for line in path.read_text(encoding="ascii").splitlines())
    return {words[0]: int(words[1]) for words in lines if words}
