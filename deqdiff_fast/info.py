"""`python -m deqdiff_fast.info`: what is installed, which backends work here and why the others do not."""

from __future__ import annotations

import contextlib
import getpass
import os
import platform
import re
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from .kernels import available_backends
from .memory.pool import DEFAULT_BYTE_BUDGET, default_memory
from .planner.outlook import whether_rounds_pay

_PACKAGES = (
    "deqdiff_fast", "torch", "triton", "diffusers", "k-diffusion", "safetensors", "numpy", "pillow", "matplotlib",
)  # fmt: skip


def collect() -> dict[str, Any]:
    """What is installed and works here.

    Returns:
        Plain data, ready for JSON: versions, platform, extension, devices, backends (name -> "available" or why not),
        the statistics of the default solver memory in bytes, and the size of the caches of compiled code on disk.
    """
    return {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}},
        "platform": platform.platform(),
        "extension": _extension(),
        "devices": _devices(),
        "backends": available_backends(),
        "memory": {**default_memory().stats(), "byte_budget": DEFAULT_BYTE_BUDGET},
        "caches": _caches(),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _extension() -> dict[str, str]:
    try:
        from . import _C  # type: ignore[attr-defined, unused-ignore]
    except ImportError as error:
        return {"error": str(error)}
    return {str(key): str(value) for key, value in _C.build_info().items()}


def _devices() -> dict[str, str]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads, vectors = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
    found = {"cpu": f"{usable} cores usable, {threads} torch threads, {vectors}"}
    for k in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(k)
        found[f"cuda:{k}"] = f"{device.name}, sm_{device.major}{device.minor}, {device.total_memory / 2**30:.0f} GiB"
    if len(found) == 1:
        built = torch.version.cuda or torch.version.hip
        found["cuda"] = "no device found" if built else "this torch is built without CUDA"
    return found


def _caches() -> dict[str, str]:
    """Where Triton and torch.compile keep compiled kernels, and how much."""
    triton = os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache"
    inductor = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or Path(tempfile.gettempdir()) / f"torchinductor_{_user()}"
    return {"triton": _folder(Path(triton)), "torch.compile": _folder(Path(inductor))}


def _user() -> str:
    try:
        return re.sub(r'[\\/:*?"<>|]', "_", getpass.getuser())
    except (KeyError, OSError):  # a user id without a name
        return str(os.getuid())


def _folder(path: Path) -> str:
    if not path.is_dir():
        return f"empty ({path})"
    sizes = []
    for folder, _, files in os.walk(path):
        for name in files:
            with contextlib.suppress(OSError):  # another process may clean up
                sizes.append(os.lstat(os.path.join(folder, name)).st_size)
    return f"{sum(sizes)} bytes in {len(sizes)} files ({path})"


def render(facts: dict[str, Any]) -> str:
    """The facts as indented text."""
    lines = []
    for title, value in facts.items():
        if isinstance(value, dict):
            width = max(map(len, value), default=0)
            lines.append(f"{title}:")
            lines += [f"  {key.ljust(width)}  {item}" for key, item in value.items()]
        else:
            lines.append(f"{title}: {value}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the facts. Returns the exit status: 0, or 2 where arguments were given."""
    if argv is None:
        argv = sys.argv[1:]
    if argv:
        print(f"deqdiff_fast.info takes no arguments, got {' '.join(argv)}", file=sys.stderr)
        return 2
    print(render(collect()))
    print(_whether_rounds_pay(), flush=True)
    return 0


def _whether_rounds_pay() -> str:
    try:
        return whether_rounds_pay()
    except Exception as error:  # a device that is there and cannot be used; what is installed was said all the same
        return f"whether rounds pay could not be measured: {' '.join(str(error).split())}"


if __name__ == "__main__":
    sys.exit(main())
