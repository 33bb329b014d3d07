"""One random problem by its number: a model, a chain, a solver and its settings, and what came of it."""

from __future__ import annotations

import random
import time
import warnings
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from chains import Chain, random_chain
from models import FAMILIES, Model, random_model, random_shape
from torch import Tensor

import deqdiff_fast as dq

SOLVERS = (
    "auto", "auto", "quasi-newton", "quasi-newton", "quasi-newton", "draft", "draft", "triangular", "anderson",
    "parataa", "deq-ddim", "picard", "parareal", "paradigms",
)  # fmt: skip
DTYPES = (torch.float32, torch.float32, torch.float64, torch.float64, torch.bfloat16)
SMALLEST = {torch.float32: 1e-5, torch.float64: 1e-9, torch.bfloat16: 1e-2}
"""The tightest tolerance that is asked for."""
UNIT = {torch.float32: 2e-7, torch.float64: 3e-16, torch.bfloat16: 1e-5}
"""What rounding may do to a state in each step: some of what a model in bfloat16 is given is rounded the other way."""


@dataclass
class Outcome:
    """What a problem was, and how it went."""

    number: int
    family: str
    chain: str
    solver: str
    dtype: str
    certify: str
    tol: float
    what: str
    """The settings, in one line."""
    ratios: list[float] = field(default_factory=list)
    """Error over tolerance of each sample that is called converged, over all solves."""
    unconverged: int = 0
    ill: float = 0.0
    """What rounding does to the sample, over the tolerance."""
    gain: float = 0.0
    """By how much the chain amplifies a small relative change of each of its states."""
    fault: str = ""
    """An exception that nothing asked for, or a result that is not what it should be."""
    rounds: int = 0
    evals: float = 0.0
    """Model evaluations, over those of the serial chain."""
    seconds: float = 0.0
    """Of processor time."""

    def plain(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Problem:
    """What is asked of the library, and what it should answer."""

    outcome: Outcome
    chain: Chain
    model: Model
    settings: dict[str, Any]
    noises: list[Tensor]
    kwargs: dict[str, Tensor]
    seed: int
    warm: bool
    shaken: int = 0

    def reference(self, noise: Tensor, perturbed: float = 0.0) -> Tensor:
        """The sample of a plain loop, states in float64, each of them `perturbed` by so much, relatively."""
        dtype = noise.dtype
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        integers = not self.chain.schedule.timesteps.is_floating_point()
        normal = torch.Generator().manual_seed(self.seed)
        self.shaken += 1
        shaken = torch.Generator().manual_seed(self.seed + self.shaken)

        def keep(x: Tensor) -> Tensor:
            return x * (1 + perturbed * torch.randn(x.shape, generator=shaken, dtype=x.dtype)) if perturbed else x

        def call(x: Tensor, t: float, scale: float = 1.0) -> Tensor:
            times = torch.full((len(x),), t, dtype=torch.int64 if integers else wide)
            return self.model(x.to(dtype) * scale, times, **self.kwargs).double()

        def draw() -> Tensor:
            return torch.randn(noise.shape, generator=normal, dtype=dtype).double()

        return self.chain.loop(call, keep(noise.double()), draw, keep)


def random_problem(seed: int, number: int) -> Problem:
    """Problem `number` of a campaign."""
    draw = random.Random(f"{seed} {number}")
    chain, family = random_chain(draw), draw.choice(FAMILIES)
    shape, dtype = random_shape(draw, family), draw.choice(DTYPES)
    steps, batch = chain.schedule.num_steps, draw.choice((1, 1, 2, 3, 5, 8))
    model = random_model(draw, family, chain, shape, dtype)
    tol = max(SMALLEST[dtype], 10 ** -draw.uniform(1.3, 9 if dtype == torch.float64 else 5))
    tol = draw.choice((1e-2, tol))
    solver, settings = draw.choice(SOLVERS), dict[str, Any](tol=tol)
    if solver in ("parataa", "anderson", "triangular") and chain.schedule.lags > 1:
        solver = "quasi-newton"
    if solver == "parareal" and chain.schedule.lags > 1:
        solver = "picard"
    if solver == "draft":
        scale = draw.choice((0.02, 0.1, 0.5))
        settings["draft"] = lambda x, t, **kw: model(x, t, **kw) + scale * torch.sin(3 * x.float()).to(x.dtype)
    settings["solver"] = solver
    if draw.random() < 0.25 and solver != "parareal":
        settings["window"] = draw.randint(1, steps)
    if draw.random() < 0.2:
        settings["max_batch"] = draw.randint(1, 3 * batch)
    if draw.random() < 0.2:
        settings["max_rounds"] = draw.randint(1, 8)
        settings["on_failure"] = draw.choice(("serial", "warn"))
    settings["certify"] = draw.choice(("estimate", "estimate", "estimate", "full"))
    if draw.random() < 0.25 and steps <= 20:  # the reference is slow
        settings["backend"] = "reference"
    start = torch.Generator().manual_seed(draw.getrandbits(40))
    times = draw.choice((1, 1, 2, 3))
    noises = [torch.randn(batch, *shape, generator=start, dtype=torch.float64) * chain.start for _ in range(times)]
    kwargs = {"label": torch.randint(0, len(model.means), (batch,), generator=start)} if family == "labels" else {}
    shown = ", ".join(f"{key}={value if key != 'draft' else scale}" for key, value in settings.items())
    what = f"T={steps} B={batch} shape={shape} {chain.prediction} {times} solves; {shown}"
    name = str(dtype).removeprefix("torch.")
    outcome = Outcome(number, family, chain.kind, solver, name, settings["certify"], tol, what)
    warm = draw.random() < 0.15
    return Problem(outcome, chain, model, settings, [x.to(dtype) for x in noises], kwargs, draw.getrandbits(30), warm)


def error(found: Tensor, expected: Tensor) -> Tensor:
    """(B,) relative L2 error."""
    off, size = (x.double().flatten(1).norm(dim=1) for x in (found.double() - expected, expected))
    return off / size


def run(seed: int, number: int) -> Outcome:
    """Solve one problem and compare."""
    started = time.process_time()
    torch.set_num_threads(1)
    problem = random_problem(seed, number)
    with torch.no_grad():
        try:
            _solve(problem)
        except Exception as caught:
            problem.outcome.fault = f"{type(caught).__name__}: {' '.join(str(caught).split())[:300]}"
    problem.outcome.seconds = time.process_time() - started
    return problem.outcome


def _solve(problem: Problem) -> None:
    outcome, chain = problem.outcome, problem.chain
    sampler = dq.DEQSampler(problem.model, chain.schedule, **problem.settings)
    before: Tensor | None = None
    for noise in problem.noises:
        given, expected = noise.clone(), problem.reference(noise)
        kept = {"init_trajectory": before} if before is not None and problem.warm else {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", dq.ConvergenceWarning)
            generator = torch.Generator().manual_seed(problem.seed)
            found = sampler.sample(given, problem.kwargs, generator, return_trajectory=problem.warm, **kept)
        before = found.trajectory
        off = error(found.sample, expected)
        size = outcome.tol + (2e-3 if noise.dtype == torch.bfloat16 else 0)  # a sample is rounded to its dtype
        moved = [float(error(problem.reference(noise, UNIT[noise.dtype]), expected).max()) for _ in range(2)]
        outcome.ill = max(outcome.ill, *(move / outcome.tol for move in moved))
        outcome.gain = max(outcome.gain, *(move / UNIT[noise.dtype] for move in moved))
        outcome.ratios += [float(e / size) for e, done in zip(off, found.converged) if done]
        outcome.unconverged += int((~found.converged).sum())
        outcome.rounds = found.stats.rounds
        outcome.evals = found.stats.model_evals / len(noise) / chain.schedule.num_steps
        if not torch.equal(given, noise):
            raise AssertionError("the noise was written to")
        if found.sample.dtype != noise.dtype or found.sample.shape != noise.shape:
            raise AssertionError(f"a sample of shape {tuple(found.sample.shape)} and {found.sample.dtype}")
        failing = problem.settings.get("on_failure", "serial")
        if failing == "serial" and not bool(found.converged.all()) and found.stats.stop_reason != "rounding":
            raise AssertionError(f"not converged, though finished serially ({found.stats.stop_reason})")
