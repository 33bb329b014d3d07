"""What one noise of a chain takes: a solve watched round by round, and sample() beside the author's loop."""

from __future__ import annotations

import argparse
import inspect
import math
import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import deqdiff_fast as dq

from .._timing import Side, interleave, ratios
from ._members import Chain, Member, Request

TARGETS = (1e-2, 5e-2)
DEFAULT_TOL, TIGHT = 1e-2, 1e-5
FALSE = 3.0  # times tol: an error above that in a sample that is called converged is a false promise
HAS_WEIGHT = "weight" in inspect.signature(dq.DEQSampler.__init__).parameters


class Case:
    """One noise of one chain: the requests to the library and to the loop, and the serial chain's sample."""

    def __init__(self, args: argparse.Namespace, member: Member, net: nn.Module, chain: Chain, seed: int) -> None:
        self.args, self.member, self.chain, self.seed = args, member, chain, seed
        self.request: Request = member.ask(net, seed, args.device)
        self.schedule = member.schedule(chain)
        start = torch.randn(1, *member.shape, generator=torch.Generator().manual_seed(seed))
        self.noise = start.to(args.device)
        self.reference = self.sampler().serial(self.noise, self.request.kwargs, self.draws()).sample

    def draws(self) -> list[torch.Generator]:
        """Fresh generators of the noise on the way: the same draws for every solve."""
        return [torch.Generator().manual_seed(10**6 + self.seed)]

    def sampler(self, **settings: Any) -> dq.DEQSampler:
        settings = {"tol": self.args.tol} | settings
        if HAS_WEIGHT and self.request.weight is not None:
            settings["weight"] = self.request.weight
        return dq.DEQSampler(self.request.model, self.schedule, **settings)

    def error(self, sample: Tensor, *, weighted: bool = True) -> float:
        """Relative L2 error against the serial chain, over the entries that are used, or over all."""
        weight = 1.0 if self.request.weight is None or not weighted else self.request.weight.double()
        apart, size = (sample.double() - self.reference.double()) * weight, self.reference.double() * weight
        return float(apart.norm() / size.norm())

    def watched(self, *, until: float = 0.0, **settings: Any) -> tuple[dq.Solution, list[float]]:
        """A solve by quasi-Newton rounds over all timesteps, and the error after each round. until: ends it."""
        curve: list[float] = []

        def watch(info: dq.RoundInfo) -> bool:
            curve.append(self.error(info.sample()))
            return curve[-1] <= until

        sampler = self.sampler(solver="quasi-newton", **settings)
        return sampler.sample(self.noise, self.request.kwargs, self.draws(), callback=watch), curve

    def outcome(self, out: dq.Solution) -> dict[str, Any]:
        """What a solve promised and what it gave."""
        error, tol = self.error(out.sample), self.args.tol or DEFAULT_TOL
        converged = bool(out.converged.all())
        estimate = getattr(out.stats, "error_estimate", None)
        return {
            "rounds": out.stats.rounds, "evaluations": out.stats.model_evals, "converged": converged, "error": error,
            "error_of_all_entries": self.error(out.sample, weighted=False),
            "estimate": None if estimate is None else float(torch.as_tensor(estimate).max()),
            "false": converged and not error <= FALSE * tol, "stop_reason": out.stats.stop_reason,
        }  # fmt: skip


def reached(curve: list[float], target: float) -> float:
    """The round from which on the error stays within the target; infinity if it never does."""
    outside = [k for k, error in enumerate(curve, 1) if not error <= target]
    first = (outside[-1] if outside else 0) + 1
    return first if first <= len(curve) else math.inf


def rounds(case: Case) -> dict[str, Any]:
    """The solve at the asked tolerance, at its own stopping.

    Where that ends before the sample is within a target, the rounds are those of a solve at tolerance 1e-5.
    """
    out, curve = case.watched()
    found = case.outcome(out) | {"curve": curve, "rounds_to": [reached(curve, target) for target in TARGETS]}
    late = [math.isinf(value) for value in found["rounds_to"]]
    if any(late):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", dq.ConvergenceWarning)  # out of rounds: a missing figure
            _, curve = case.watched(until=min(TARGETS), tol=TIGHT, on_failure="warn")
        beyond = [reached(curve, target) for target in TARGETS]
        found["rounds_to"] = [b if missing else a for a, b, missing in zip(found["rounds_to"], beyond, late)]
    return found | {"by_tight": late}


def planned(case: Case, *, warm: bool, timed: bool) -> dict[str, Any]:
    """`sample()` with its defaults: what it promised and gave, and its seconds in turns with the author's loop."""
    sampler, request, args = case.sampler(), case.request, case.args
    if warm:
        sampler.warmup(case.member.shape, model_kwargs=request.kwargs, device=args.device)
    loop = case.member.loop(case.chain, request)
    runs: list[dq.Stats] = []
    sides = [
        Side("loop", partial(loop, case.noise)),
        Side("sample", lambda: runs.append(sampler.sample(case.noise, request.kwargs).stats)),
    ]
    if timed:
        interleave(sides, args.device, passes=args.passes, budget=args.budget, clock=args.clock)
    out = sampler.sample(case.noise, request.kwargs, case.draws())
    runs.append(out.stats)
    found = case.outcome(out)
    if case.chain.eta == 0.0:
        found["loop_error"] = case.error(loop(case.noise))
    return found | {
        "loop_seconds": sides[0].seconds, "sample_seconds": sides[1].seconds, "ratios": ratios(*sides),
        "serial_share": sum(stats.window == 1 for stats in runs) / len(runs),
    }  # fmt: skip


def measure(args: argparse.Namespace, member: Member, net: nn.Module, chain: Chain) -> dict[str, Any]:
    """A row: every noise of one chain. Once the budget is spent, the other noises are not timed."""
    runs, spent = [], 0.0
    with torch.no_grad():
        for seed in range(args.seed, args.seed + args.noises):
            case = Case(args, member, net, chain, seed)
            solve, first = rounds(case), seed == args.seed
            plan = planned(case, warm=first, timed=first or spent < args.budget)
            spent += sum(plan["sample_seconds"])
            runs.append({"seed": seed, "solve": solve, "planned": plan})
    return {"model": member.name, "steps": chain.steps, "eta": chain.eta, "runs": runs}
