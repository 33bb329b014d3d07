"""`dq.equilibrium` against torchdeq at equal tolerance: forward and backward, in turns; medians, and ratios per turn.

torchdeq is no dependency: `pip install --no-deps torchdeq`. Both solve to the same relative residual, |f(z) - z| over
|f(z)|, with their own defaults otherwise (torchdeq: history 6, absolute ridge 1e-4; here: history 5, a relative ridge),
and both take the implicit gradient by the same kind of solver to the same tolerance. The loss is a sum over all
entries, so that cotangents are of order one: torchdeq's ridge is absolute. Errors are those against a solve to 1e-9 in
float64.
"""

from __future__ import annotations

import argparse
import copy
import math
import warnings
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import deqdiff_fast as dq

from ._common import environment, markdown, note, positive_float, positive_int, summary, write_json
from ._timing import CLOCKS, Side, interleave, ratios

SOLVERS = {"anderson": "anderson", "relaxed": "fixed_point_iter"}  # torchdeq's word for it
SIZES = {"mlp": (64, 512), "convolution": (8, 64, 32, 32)}


class Layer(nn.Module):
    """tanh(linear(z) + x), its linear part scaled so that the layer contracts."""

    def __init__(self, name: str, rate: float) -> None:
        super().__init__()
        width = SIZES[name][1]
        self.linear = nn.Linear(width, width) if name == "mlp" else nn.Conv2d(width, width, 3, padding=1)
        taps = 1 if name == "mlp" else 9
        nn.init.normal_(self.linear.weight, std=rate / math.sqrt(width * taps))
        self.register_buffer("x", torch.randn(SIZES[name]))

    def forward(self, z: Tensor) -> Tensor:
        return torch.tanh(self.linear(z) + self.x)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tol", type=positive_float, default=1e-4, help="relative residual (default 1e-4)")
    parser.add_argument("--rate", type=positive_float, default=0.9, help="scale of the linear part (default 0.9)")
    parser.add_argument("--max-steps", type=positive_int, default=100, help="of both passes (default 100)")
    parser.add_argument("--passes", type=positive_int, default=15, help="turns of all sides (default 15)")
    parser.add_argument("--sizes", nargs="+", choices=tuple(SIZES), default=list(SIZES), help="default: both")
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall", help="wall (default), or processor time")
    parser.add_argument("--check", action="store_true", help="exit 1 where a median ratio is above 1")


def run(args: argparse.Namespace) -> int:
    try:
        from torchdeq import get_deq
    except ImportError as error:
        raise ImportError("torchdeq is needed to compare with: pip install --no-deps torchdeq") from error
    facts, rows = environment(args.device), []
    for size in args.sizes:
        torch.manual_seed(0)
        layer = Layer(size, args.rate).to(args.device)
        exact = _solution(copy.deepcopy(layer).double())
        for solver, theirs in SOLVERS.items():
            note(f"{size} {SIZES[size]}, {solver} ...")
            deq = get_deq(
                core="sliced", ift=True, f_solver=theirs, b_solver=theirs, f_tol=args.tol, b_tol=args.tol,
                f_stop_mode="rel", b_stop_mode="rel", f_max_iter=args.max_steps, b_max_iter=args.max_steps,
            )  # fmt: skip
            rows += _compare(args, size, solver, layer, exact, deq)
            write_json(args, facts, rows)
    print(f"{summary(facts)}\ntol {args.tol:g}, rate {args.rate:g}, clock {args.clock}\n")
    header = (
        "layer",
        "solver",
        "library",
        "steps",
        "error of z",
        "forward ms",
        "ratio",
        "backward ms",
        "ratio",
        "error of gradient",
    )
    print(markdown(header, [_cells(row) for row in rows]))
    print("\nratio: deqdiff_fast / torchdeq, the median over turns; below 1 it is faster.")
    worst = max(row[key] for row in rows for key in ("forward_ratio", "backward_ratio") if row[key] is not None)
    return 1 if args.check and worst > 1 else 0


def _solution(layer: Layer) -> tuple[Tensor, Tensor]:
    """z and the gradients, all as one vector, in float64."""
    z, _ = dq.equilibrium(layer, torch.zeros_like(layer.x), tol=1e-9, max_steps=500, on_failure="raise")
    return z.detach(), _gradient(z, layer)


def _gradient(z: Tensor, layer: nn.Module) -> Tensor:
    grads = torch.autograd.grad(_loss(z), list(layer.parameters()))
    return torch.cat([grad.flatten() for grad in grads]).double()


def _loss(z: Tensor) -> Tensor:
    return z.square().sum()


def _compare(
    args: argparse.Namespace, size: str, solver: str, layer: Layer, exact: tuple[Tensor, Tensor], deq: Any
) -> list[dict[str, Any]]:
    start = torch.zeros_like(layer.x)
    found: dict[str, tuple[Tensor, Any]] = {}

    def ours() -> None:
        found["deqdiff_fast"] = dq.equilibrium(layer, start, solver=solver, tol=args.tol, max_steps=args.max_steps)

    def theirs() -> None:
        outputs, info = deq(layer, start)
        found["torchdeq"] = outputs[-1], info

    def backward(name: str) -> Callable[[], object]:
        return lambda: _loss(found[name][0]).backward()

    calls: dict[str, Callable[[], None]] = {"deqdiff_fast": ours, "torchdeq": theirs}
    sides = [Side(name, call) for name, call in calls.items()]
    back = [Side(name, backward(name), call) for name, call in calls.items()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dq.ConvergenceWarning)
        for group in (sides, back):
            interleave(group, args.device, passes=args.passes, budget=60, clock=args.clock, visit=0)
        rows = []
        for forward, other in zip(sides, back, strict=True):
            calls[forward.name]()
            z, info = found[forward.name]
            steps = info.evaluations if isinstance(info, dq.EquilibriumInfo) else _steps(info)
            rows.append({
                "layer": size, "solver": solver, "library": forward.name, "steps": steps,
                "error": _apart(z.double(), exact[0]), "gradient_error": _apart(_gradient(z, layer), exact[1]),
                "forward": median(forward.seconds), "backward": median(other.seconds),
                "forward_ratio": None, "backward_ratio": None,
            })  # fmt: skip
    rows[0]["forward_ratio"] = median(ratios(*sides))
    rows[0]["backward_ratio"] = median(ratios(*back))
    return rows


def _steps(info: Any) -> int:
    """Evaluations of torchdeq: its trace is filled up with the lowest residual once it has converged."""
    trace = info["rel_trace"].amax(0)
    return int((trace != trace[-1]).nonzero().max()) + 2 if len(trace) > 1 else 1


def _apart(value: Tensor, exact: Tensor) -> float:
    return float(((value - exact).norm() / exact.norm()).detach())


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    ratio = {key: "" if row[key] is None else f"{row[key]:.2f}" for key in ("forward_ratio", "backward_ratio")}
    return (
        row["layer"], row["solver"], row["library"], str(row["steps"]), f"{row['error']:.1e}",
        f"{row['forward'] * 1e3:.1f}", ratio["forward_ratio"], f"{row['backward'] * 1e3:.1f}",
        ratio["backward_ratio"], f"{row['gradient_error']:.1e}",
    )  # fmt: skip
