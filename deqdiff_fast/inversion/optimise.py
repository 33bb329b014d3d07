"""Inversion by descent: minimise |sample(noise) - image|^2 over the noise, the paper's way (arXiv 2210.12867, 4.2)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..engine import arguments
from ..errors import NonFiniteError
from ..gradient import resolve as resolve_gradient
from ..gradient.base import Gradient
from ..loop.base import Solver
from ..schedule.noise import freeze
from ..solver import resolve as resolve_solver
from .base import InversionInfo, InversionStats, Method, Outcome, Task
from .chains import Chain, ParallelChain, SerialChain
from .counting import Counted
from .ddim import DDIMInversion

ACCURACY = 0.1  # of the chain that is differentiated, relative to the tolerance of the inversion


@dataclass
class OptimiseStats(InversionStats):
    """How a descent went. Evaluations and calls count those that a gradient repeats, and those of the initial noise;
    `rounds` those of the forward solves only."""

    steps: int = 0
    """Optimizer steps."""
    backpropagations: int = 0
    """Vector-Jacobian products of the model, samples x timesteps."""
    losses: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.float64))
    """(evaluations, B): the squared loss of every evaluation; an image that is done keeps its last one."""
    seconds: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))
    """(evaluations,): when each was made, from the start of the inversion."""


@dataclass(frozen=True, eq=False)
class Optimise:
    """Descent along the gradient of the whole chain, with any optimizer; the best noise of each image is returned.

    gradient: mode of `DEQSampler` that the descent follows. optimizer: a torch.optim class, or a function from a
    list of tensors, one for each image, to an optimizer; lr: of a class. One whose step couples its tensors (LBFGS)
    couples the images. steps: most optimizer steps.
    stop: the squared loss at which an image is done and leaves the batch (None: that of the inverter's `tol`).
    initial: "ddim", "equilibrium", "random" (seed: of that) or noise (B, *shape); a given `init_trajectory` goes first.
    solver, solver_tol: of the chain inside (None: a tenth of the inverter's `tol`, or the solver's own); warm_start:
    every solve starts from the trajectory of the one before. finish: end a solve that is out of rounds serially (True),
    or descend from where it is (False, as in the paper).
    baseline: "bptt" back-propagates through the serial chain instead, step by step with activation checkpointing.
    """

    gradient: str | Gradient = "implicit"
    optimizer: Callable[..., Optimizer] = torch.optim.Adam
    lr: float | None = 0.01
    steps: int = 300
    stop: float | None = None
    initial: str | Tensor = "ddim"
    seed: int = 0
    solver: str | Solver = "auto"
    solver_tol: float | None = None
    warm_start: bool = True
    finish: bool = True
    baseline: str | None = None

    def __post_init__(self) -> None:
        resolve_gradient(self.gradient)
        resolve_solver(self.solver)
        if not callable(self.optimizer):
            raise TypeError(
                f"optimizer: expected a torch.optim class or a function of parameters, got {self.optimizer!r}"
            )
        for name in ("lr", "stop", "solver_tol"):
            arguments.positive(name, getattr(self, name))
        if arguments.count("steps", self.steps) is None:
            raise ValueError("steps: expected an int >= 1, got None")
        arguments.choice("warm_start", self.warm_start, (True, False))
        arguments.choice("finish", self.finish, (True, False))
        arguments.choice("baseline", self.baseline, (None, "bptt"))
        if not isinstance(self.initial, Tensor):
            arguments.choice("initial", self.initial, ("ddim", "equilibrium", "random"))

    @property
    def name(self) -> str:
        return "bptt" if self.baseline else f"gradient, {resolve_gradient(self.gradient).name}"

    @property
    def exact(self) -> bool:
        return self.stop is None

    def solve(self, task: Task) -> Outcome:
        clock = time.perf_counter()
        model = Counted(task.model)
        stats = OptimiseStats(self.name, task.schedule.num_steps)
        shape, device = tuple(task.image.shape), task.image.device
        frozen = freeze(task.schedule, shape, task.generators(), task.image.dtype, device)
        task = replace(task, model=model, generator=frozen)
        noise, trajectory = self._start(task, stats)
        with torch.enable_grad():
            descent = _Descent(self, task, stats, noise, trajectory, model, clock)
            converged = descent.run()
        stats.model_evals, stats.model_calls = model.evals, model.calls
        stats.backpropagations = model.backpropagations
        stats.losses = torch.stack(descent.losses)
        stats.seconds = torch.tensor(descent.times, dtype=torch.float64)
        stats.wall_seconds = time.perf_counter() - clock
        return Outcome(descent.best, descent.best_trajectory, converged, stats)

    def make_optimizer(self, noises: list[Tensor]) -> Optimizer:
        extra = {"lr": self.lr} if isinstance(self.optimizer, type) and self.lr is not None else {}
        made = self.optimizer(noises, **extra)
        if not isinstance(made, Optimizer):
            raise TypeError(f"optimizer: expected it to return a torch.optim.Optimizer, got {type(made).__name__}")
        return made

    def chain(self, task: Task) -> Chain:
        if self.baseline:
            return SerialChain(task)
        tol = self.solver_tol
        if tol is None and getattr(resolve_solver(self.solver), "tol", None) is None:
            tol = ACCURACY * task.tol
        return ParallelChain(task, self.solver, tol, resolve_gradient(self.gradient), self.finish)

    def _start(self, task: Task, stats: InversionStats) -> tuple[Tensor, Tensor | None]:
        """The initial noise, and its trajectory where that is known; a trajectory that was given has both."""
        if task.init is not None:
            return task.init[0].detach().to(task.image.device, task.image.dtype), task.init.clone()
        if isinstance(self.initial, Tensor):
            if self.initial.shape != task.image.shape:
                raise ValueError(
                    f"initial: expected noise of the image's shape {tuple(task.image.shape)}, got "
                    f"{tuple(self.initial.shape)}"
                )
            return self.initial.detach().to(task.image.device, task.image.dtype), None
        if self.initial == "random":
            draw = torch.Generator().manual_seed(self.seed)
            noise = torch.randn(task.image.shape, generator=draw) * task.schedule.init_noise_sigma
            return noise.to(task.image.device, task.image.dtype), None
        outcome = _first(self.initial).solve(replace(task, report=None))
        stats.rounds += outcome.stats.rounds
        stats.notes.append(f"initial noise by {outcome.stats.solver}")
        return outcome.noise, outcome.trajectory


def _first(name: str) -> Method:
    if name == "ddim":
        return DDIMInversion()
    from . import resolve

    return resolve(name, {})


class _Descent:
    """One run: the noises that move, the best ones so far, and who is still moving."""

    def __init__(
        self, method: Optimise, task: Task, stats: OptimiseStats, noise: Tensor, trajectory: Tensor | None,
        model: Counted, clock: float,
    ) -> None:  # fmt: skip
        self.method, self.task, self.stats, self.model, self.clock = method, task, stats, model, clock
        self.chain = method.chain(task)
        self.moving = [row.clone().requires_grad_(True) for row in noise.detach()]
        self.best, self.trajectory = noise.detach().clone(), trajectory
        self.best_trajectory = None if trajectory is None else trajectory.clone()
        size = task.image.flatten(1).double().square().sum(1).cpu()
        self.stop = size * task.tol**2 if method.stop is None else torch.full_like(size, method.stop)
        self.size = size.clamp_min(torch.finfo(torch.float64).tiny)
        self.least = torch.full_like(size, math.inf)
        self.active = torch.arange(task.batch)
        self.losses: list[Tensor] = []
        self.times: list[float] = []
        self.stopped = False

    def run(self) -> Tensor:
        """(B,) whether the loss got to where the image counts as done."""
        optimizer, limit = self.method.make_optimizer(self.moving), self.task.max_rounds or math.inf
        while not (self.stopped or len(self.active) == 0):
            if self.stats.steps >= self.method.steps or self.stats.rounds >= limit:
                self.stats.stop_reason = "max_rounds"
                break
            try:
                optimizer.step(lambda: self.evaluate(optimizer))
            except NonFiniteError as error:
                if not self.losses:  # the initial noise is at fault, or the model
                    raise
                self.stats.notes.append(f"the descent left the model's range: {error}")
                self.stats.stop_reason = "diverged"
                break
            self.stats.steps += 1
            left = self.active[(self.least > self.stop)[self.active]]
            finite = torch.tensor([bool(self.moving[b].detach().isfinite().all()) for b in left.tolist()])
            if not bool(finite.all()):
                self.stats.notes.append("the optimizer made noise that is not finite; those images stopped early")
            self.active = left[finite.bool()]
        return self.least <= self.stop

    def evaluate(self, optimizer: Optimizer) -> float:
        """The loss of the active images, with their gradients in place."""
        optimizer.zero_grad(set_to_none=True)
        who = self.active
        at = who.to(self.task.image.device)
        noise = torch.stack([self.moving[b] for b in who.tolist()])
        warm = self.trajectory if self.method.warm_start else None
        sample, trajectory, rounds = self.chain(noise, at, None if warm is None else warm[:, at])
        wide = torch.promote_types(sample.dtype, torch.float32)
        loss = (sample.to(wide) - self.task.image[at].to(wide)).flatten(1).square().sum(1)
        torch.autograd.backward(loss.sum())
        self._note(who, noise.detach(), trajectory, loss.detach().double().cpu(), rounds)
        return float(loss.detach().sum())

    def _note(self, who: Tensor, noise: Tensor, trajectory: Tensor, loss: Tensor, rounds: int) -> None:
        at = who.to(noise.device)
        if self.trajectory is None:
            self.trajectory = trajectory.new_zeros(len(trajectory), self.task.batch, *trajectory.shape[2:])
            self.best_trajectory = self.trajectory.clone()
        assert self.best_trajectory is not None
        self.trajectory[:, at] = trajectory
        better = loss < self.least[who]  # never where the loss is NaN
        self.best[at[better]] = noise[better]
        self.best_trajectory[:, at[better]] = trajectory[:, better]
        self.least[who[better]] = loss[better]
        last = self.losses[-1].clone() if self.losses else torch.full_like(self.least, math.inf)
        last[who] = loss
        self.losses.append(last)
        self.times.append(time.perf_counter() - self.clock)
        self.stats.rounds += rounds
        if self.task.report is not None:
            info = InversionInfo(
                round=self.stats.rounds,
                max_rounds=self.task.max_rounds or self.method.steps * self.task.schedule.num_steps,
                num_steps=self.task.schedule.num_steps,
                front=(self.least <= self.stop).long() * self.task.schedule.num_steps,
                residual=(self.least / self.size).sqrt(),
                tolerance=float((self.stop / self.size).sqrt().min()),
                _sample=lambda: self.best.clone(),
            )
            if self.task.report(info) is True:
                self.stopped, self.stats.stop_reason = True, "callback"
