"""What every benchmark shares: where it ran, how its figures are printed and written."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import torch

from . import ROOT


def environment(device: str = "cpu") -> dict[str, Any]:
    """Where and with what a benchmark runs; plain data."""
    import deqdiff_fast

    facts: dict[str, Any] = {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "device": _device(device),
        "cpu": _cpu_model(),
        "cores_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "deqdiff_fast": deqdiff_fast.__version__,
        "commit": _commit(),
        "backends": deqdiff_fast.kernels.available_backends(),
        "python": platform.python_version(),
    }
    return facts | {package: _version(package) for package in ("torch", "triton", "diffusers")}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _device(device: str) -> str:
    return torch.cuda.get_device_name(torch.device(device)) if torch.device(device).type == "cuda" else device


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str:
    """The commit of this checkout, with "-dirty" where tracked files differ from it."""

    def git(*words: str) -> str:
        ran = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True)
        return ran.stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown: not a git checkout"


def summary(environment: dict[str, Any]) -> str:
    """The environment as one line of markdown."""
    keys = ("device", "cpu", "threads", "load_average", "torch", "deqdiff_fast", "commit")
    return ", ".join(f"{key} {environment[key]}" for key in keys)


def markdown(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """An aligned markdown table."""
    lines = [tuple(map(str, header)), *(tuple(map(str, row)) for row in rows)]
    widths = [max(len(line[k]) for line in lines) for k in range(len(header))]
    text = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    text.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(text)


def write_json(args: argparse.Namespace, environment: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write the figures to `args.json`, if it was asked for; NaN and infinity become null.

    Benchmarks call this after every part, so that what a long run has measured survives its interruption.
    """
    if args.json is None:
        return
    settings = {key: value for key, value in vars(args).items() if key not in ("json", "plot")}
    if "model" in settings:
        settings["model"] = Path(settings["model"]).name
    report = {"benchmark": args.benchmark, "environment": environment, "settings": settings, "rows": rows}
    args.json.write_text(json.dumps(_plain(report), indent=1) + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, (int, str, type(None))) else str(value)


def note(text: str) -> None:
    """Progress, on stderr: the tables alone go to stdout."""
    print(text, file=sys.stderr, flush=True)


def spread(values: Sequence[float], form: str = ".2f", unit: str = "") -> str:
    """median (min..max)."""
    return f"{median(values):{form}}{unit} ({min(values):{form}}..{max(values):{form}})"


def positive_int(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number >= 1, got {text!r}")
    return int(text)


def positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number > 0, got {text!r}")
    return value


def module_at(*parts: str) -> ModuleType:
    """A file of this checkout, imported: its place below the top folder."""
    file = ROOT.joinpath(*parts)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
