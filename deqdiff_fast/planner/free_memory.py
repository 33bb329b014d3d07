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
    found = [bytes_ for bytes_ in (_available(), _container()) if bytes_ is not None]
    return min(found) if found else None


def usable_bytes(device: torch.device) -> float:
    """How much a solve may ask for; infinite where nobody says what is free."""
    free = free_bytes(device)
    return math.inf if free is None else SHARE * free


def _available() -> int | None:
    """RAM that can be had without swapping."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def _container() -> int | None:
    """What is left of the limit of the control group, where there is one."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text(encoding="ascii"))
        used = int((group / "memory.current").read_text(encoding="ascii"))
        cached = [
            int(line.split()[1])
            for line in (group / "memory.stat").read_text(encoding="ascii").splitlines()
            if line.startswith(("inactive_file ", "active_file "))
        ]
    except (OSError, ValueError, IndexError):
        return None
    return max(limit - used + sum(cached), 0)
