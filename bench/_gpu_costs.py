"""What a model call on some rows costs: for the planner's sake, and for `bench ranks --costs`."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from . import _gpu_models
from ._common import note

ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 100)


def measure_costs(args: argparse.Namespace, left: Callable[[], float]) -> list[dict[str, Any]]:
    """A row for each network: {"model", "calls": {rows: seconds}}, medians of `--repeats` calls after one more."""
    found = []
    for name in args.models:
        model, shape, _, _ = _gpu_models.load(name, args.device)
        calls: dict[int, float] = {}
        for rows in args.rows:
            if left() < 15:
                note(f"{name}, {rows} rows: left out, the time is up")
                break
            x = torch.randn(rows, *shape, generator=torch.Generator().manual_seed(0)).to(args.device)
            t = torch.full((rows,), 500, device=args.device)
            with torch.no_grad():
                calls[rows] = median(_seconds(model, x, t) for _ in range(args.repeats + 1))
        found.append({"part": "costs", "model": name, "calls": calls})
    return found


def _seconds(model: Any, x: Tensor, t: Tensor) -> float:
    if x.is_cuda:
        torch.cuda.synchronize()
    began = time.perf_counter()
    model(x, t)
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - began
