"""Whole samples at B = 1: `sample()` against the serial chain in its quickest forms."""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

import deqdiff_fast as dq

from . import _gpu_models
from ._common import note
from ._problems import relative_error

SET_UP, TIMED = 6.0, 12.0  # seconds of one way at which no further run is begun

Way = Callable[[], Tensor]


class Syncs:
    """Counts torch's reports of a waiting host while a model call has been made and the solve has not ended."""

    def __init__(self, model: Any, device: str) -> None:
        self.model, self.on = model, torch.device(device).type == "cuda"

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        if self.on:
            torch.cuda.set_sync_debug_mode("warn")
        out: Tensor = self.model(x, t)
        return out

    def count(self, solve: Callable[[Any], Any]) -> int | None:
        """How often the host waited; None where there is no device to wait for."""
        if not self.on:
            return None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                solve(self)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(w.message) for w in caught)


def measure_samples(args: argparse.Namespace, left: Callable[[], float]) -> list[dict[str, Any]]:
    """A row for each network, T and way."""
    rows: list[dict[str, Any]] = []
    for name in args.models:
        model, shape, kind, aids = _gpu_models.load(name, args.device)
        noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0)).to(args.device)
        compiled = None if args.compiler == "none" else torch.compile(model, backend=args.compiler, dynamic=False)
        for steps in args.steps:
            if left() < 30:
                note(f"{name}, T = {steps}: left out, the time is up")
                continue
            schedule = _gpu_models.schedule(steps, kind)
            rows += _ways(args, name, model, compiled, schedule, noise, aids, left)
    return rows


def _ways(
    args: argparse.Namespace, name: str, model: Any, compiled: Any, schedule: dq.Schedule, noise: Tensor,
    aids: dict[str, Any], left: Callable[[], float],
) -> list[dict[str, Any]]:  # fmt: skip
    cuda, steps = noise.is_cuda, schedule.num_steps
    stats: dict[str, Any] = {}

    def parallel(way: str, network: Any, graph: bool | str, solver: str = "quasi-newton") -> Way:
        sampler = dq.DEQSampler(network, schedule, solver=solver, cuda_graph=graph, **aids)

        def run() -> Tensor:
            out = sampler.sample(noise)
            stats[way] = out.stats
            return out.sample

        return run

    # each side is made when its turn comes: compiling and capturing count towards the time that is left
    makers: dict[str, Callable[[], Way]] = {
        "serial, eager": lambda: _gpu_models.Chain(model, schedule, noise).run,
        "sample, eager": lambda: parallel("sample, eager", model, False),
    }
    makers["sample, planned"] = lambda: parallel("sample, planned", model, "auto", "auto")
    if aids.get("draft") is not None:
        makers["draft, eager"] = lambda: parallel("draft, eager", model, False, "draft")
    if cuda and aids.get("draft") is not None:
        makers["draft, graph"] = lambda: parallel("draft, graph", model, True, "draft")
    if cuda:
        makers["serial, graph"] = lambda: _gpu_models.Chain(model, schedule, noise, graph=True).run
        makers["sample, graph"] = lambda: parallel("sample, graph", model, True)
    if compiled is not None:
        makers["serial, compiled"] = lambda: _gpu_models.Chain(compiled, schedule, noise).run
    if compiled is not None and args.compile_sample:
        makers["sample, compiled"] = lambda: parallel("sample, compiled", compiled, False)
    rows, truth = [], None
    for way, make in makers.items():
        if left() < 15:
            note(f"{name}, T = {steps}, {way}: left out, the time is up")
            continue
        note(f"{name}, T = {steps}, {way} ...")
        with torch.no_grad():
            run = make()
            sample, runs = _timed(run, args.repeats, left, cuda)
            truth = sample if truth is None else truth
            watch, syncs = Syncs(model, args.device), None
            solver = {"sample, eager": "quasi-newton", "draft, eager": "draft"}.get(way)
            if solver is not None:
                syncs = watch.count(partial(_solve, schedule, solver, noise, aids))
        found = stats.get(way)
        rows.append({
            "part": "samples", "model": name, "steps": steps, "way": way, "runs": runs, "syncs": syncs,
            "rounds": steps if found is None else found.rounds + found.finished_serially,
            "evaluations": steps if found is None else found.model_evals,
            "error": float(relative_error(sample, truth).max()),
        })  # fmt: skip
    return rows


def _solve(schedule: dq.Schedule, solver: str, noise: Tensor, aids: dict[str, Any], model: Any) -> Any:
    return dq.DEQSampler(model, schedule, solver=solver, **aids).sample(noise)


def _timed(run: Way, repeats: int, left: Callable[[], float], cuda: bool) -> tuple[Tensor, list[float]]:
    """The sample and the seconds of up to `repeats` runs, after up to three that set things up: a shape is recorded in
    its first three solves. Slow ways get fewer of both."""

    def once() -> tuple[Tensor, float]:
        begin = time.perf_counter()
        sample = run()
        if cuda:
            torch.cuda.synchronize()
        return sample, time.perf_counter() - begin

    spent: list[float] = []
    while len(spent) < 3 and sum(spent) < SET_UP and 3 * sum(spent) < left():
        sample, seconds = once()
        spent.append(seconds)
    runs: list[float] = []
    while not runs or (len(runs) < repeats and sum(runs) < TIMED and 3 * runs[-1] < left()):
        sample, seconds = once()
        runs.append(seconds)
    return sample.clone(), runs
