"""`python -m bench gpu --tune FILE`: time launch shapes of every kernel on this device and write the quickest.

Nothing tunes itself in a user's call. A solver reads such a file if DEQDIFF_FAST_KERNEL_CONFIG names it; figures that
hold for all devices of an architecture belong into the table of kernels/_config.py.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from deqdiff_fast.kernels import _config
from deqdiff_fast.kernels._config import Config
from deqdiff_fast.kernels._launches import reset

from ._common import markdown, note
from ._operands import HISTORY_OPS, Fused, Inputs, Shape
from ._timing import Side, interleave

KERNELS = {
    "ddim_update": "ddim_update", "anderson_scan": "anderson_step", "anderson_solve": "anderson_step",
    "anderson_mix": "anderson_step",
    "newton_linear": "newton_scan", "newton_prepare": "newton_scan", "newton_advance": "newton_scan",
    "node_scan": "node_scan", "inverse_prepare": "inverse_scan", "inverse_advance": "inverse_scan",
}  # fmt: skip
"""Kernel -> the op that launches it; the others take what these leave them."""
SHAPE = Shape(8, 1000, 3072, 5)


def candidates(kernel: str, now: Config) -> list[Config]:
    """Launch shapes to try: the present one first."""
    if kernel == "anderson_solve":
        found = [replace(now, num_warps=w, rows=r) for w in (1, 2, 4, 8) for r in (8, 16, 32)]
    else:
        found = [replace(now, accesses=a, num_warps=w) for a in (1, 2, 4) for w in (1, 2, 4, 8)]
    return [now, *(c for c in found if c != now)]


def tune(args: argparse.Namespace, left: Callable[[], float], file: Path) -> str:
    """One kernel after the other, the others as they are by then, into the file; returns a table of them.

    Args:
        left: seconds that there are yet.
    """
    device = torch.device(args.device)
    architecture = _config.architecture(device)
    table = _config.TABLE[architecture] = dict(_config.TABLE[architecture])
    shape, rows = (args.shape or [SHAPE])[0], []
    for kernel, op in KERNELS.items():
        if left() < (25 if rows else 0):  # seconds that one may take
            note(f"{kernel}: left as it is, the time is up")
            continue
        before = table[kernel]
        inputs = Inputs(replace(shape, history=0) if kernel == "newton_linear" else shape, torch.float32, args.device)
        operands = Fused(inputs, "triton")
        if op in HISTORY_OPS:
            operands.fill(op)
        sides = []
        for config in candidates(kernel, before):
            table[kernel] = config
            note(f"{kernel}: {config} ...")
            try:
                reset()
                operands.prepare()
                getattr(operands, op)()
            except (RuntimeError, ValueError) as error:  # more registers or shared memory than there are
                note(f"{kernel}: {config} is left out: {str(error).strip().splitlines()[0]}")
                continue
            sides.append(Side(str(config), getattr(operands, op), _use(table, kernel, config, operands)))
        interleave(sides, args.device, passes=args.passes, budget=2.0)
        best = min(sides, key=lambda side: median(side.seconds))
        table[kernel] = next(c for c in candidates(kernel, before) if str(c) == best.name)
        gain = median(sides[0].seconds) / median(best.seconds)
        rows.append((kernel, str(before), str(table[kernel]), f"{gain:.2f}"))
    _config.save(file, {architecture: table})
    return markdown(("kernel", "before", "best", "times faster (whole op)"), rows)


def _use(table: dict[str, Config], kernel: str, config: Config, operands: Fused) -> Callable[[], None]:
    def prepare() -> None:
        table[kernel] = config
        reset()
        operands.prepare()

    return prepare
