"""Inversion by descent: minimise |sample(noise) - image|^2 over the noise, the paper's way (arXiv 2210.12867, 4.2)."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..engine import arguments
from ..gradient import resolve as resolve_gradient
from ..gradient.base import Gradient, refuse_inference_mode
from ..loop.base import Solver
from ..solver import resolve as resolve_solver
from .base import InversionProblem, InversionStats, MethodResult, check_count
from .counting_model import CountingModel
from .ddim import DDIMInversion
from .descent import GradientDescent
from .equilibrium import Equilibrium
from .forward_pass import CheckpointedForward, ForwardPass, ParallelForward

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
    """(evaluations, B): the squared loss of every evaluation; an image that is done repeats its last one."""
    seconds: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))
    """(evaluations,): when each was made, from the start of the inversion."""


@dataclass(frozen=True, eq=False)
class Optimise:
    """Descent along the gradient of the whole chain, with any optimizer; the best noise of each image is returned.

    Pokle, Geng, Kolter 2022, arXiv 2210.12867, section 4.2.

    Args:
        gradient: mode of `DEQSampler` that the descent follows.
        optimizer: a torch.optim class, or a function from a list of tensors, one for each image, to an optimizer. One
            whose step couples its tensors (LBFGS) couples the images.
        lr: learning rate of an optimizer class (None: its default).
        steps: most optimizer steps.
        stop: the squared loss at which an image is done and leaves the batch (None: that of the inverter's `tol`).
        initial: "ddim", "equilibrium", "random" or noise (B, *shape); a given `init_trajectory` goes first.
        seed: of the random initial noise.
        solver, solver_tol: of the chain inside (None: a tenth of the inverter's `tol`, or the solver's own).
        warm_start: every solve starts from the trajectory of the one before.
        finish: end a solve that is out of rounds serially (True), or descend from where it is (False, as in the paper).
        baseline: "bptt" back-propagates through the serial chain instead, step by step with activation checkpointing.

    Raises:
        ValueError, TypeError: a setting is out of its range or of the wrong type.
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
        check_count("steps", self.steps)
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

    def solve(self, problem: InversionProblem) -> MethodResult:
        """Find the noise, see `Method.solve`.

        Raises:
            ValueError: `initial` is noise of another shape than the image.
            TypeError: `optimizer` made something else than an optimizer. RuntimeError: under `torch.inference_mode`.
        """
        refuse_inference_mode("method: 'gradient'")
        start_time = time.perf_counter()
        model = CountingModel(problem.model)
        stats = OptimiseStats(self.name, problem.schedule.num_steps)
        problem = replace(problem, model=model).with_frozen_noise()
        noise, trajectory = self._initial_noise(problem, stats)
        with torch.enable_grad():
            forward = self.forward_pass(problem)
            descent = GradientDescent(self, problem, stats, forward, noise, trajectory, start_time)
            converged = descent.run()
        stats.model_evals, stats.model_calls = model.evals, model.calls
        stats.backpropagations = model.backpropagations
        stats.losses = torch.stack(descent.losses) if descent.losses else stats.losses.new_empty(0, problem.batch)
        stats.seconds = torch.tensor(descent.seconds, dtype=torch.float64)
        return MethodResult(descent.best, descent.best_trajectory, converged, stats)

    def make_optimizer(self, noises: list[Tensor]) -> Optimizer:
        """The optimizer of these tensors, (*shape) each. Raises TypeError where it is none."""
        settings = {"lr": self.lr} if isinstance(self.optimizer, type) and self.lr is not None else {}
        optimizer = self.optimizer(noises, **settings)
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer: expected it to return a torch.optim.Optimizer, got {type(optimizer).__name__}")
        return optimizer

    def forward_pass(self, problem: InversionProblem) -> ForwardPass:
        """The chain that the descent goes through."""
        if self.baseline:
            return CheckpointedForward(problem)
        tol = self.solver_tol
        if tol is None and resolve_solver(self.solver).tol is None:
            tol = ACCURACY * problem.tol
        return ParallelForward(problem, self.solver, tol, resolve_gradient(self.gradient), self.finish)

    def _initial_noise(self, problem: InversionProblem, stats: InversionStats) -> tuple[Tensor, Tensor | None]:
        """The initial noise, and its trajectory where that is known; a trajectory that was given has both."""
        image, init = problem.image, problem.init_trajectory
        if init is not None:
            return init[0].detach().to(image.device, image.dtype), init.clone()
        if isinstance(self.initial, Tensor):
            if self.initial.shape != image.shape:
                raise ValueError(
                    f"initial: expected noise of the image's shape {tuple(image.shape)}, got "
                    f"{tuple(self.initial.shape)}"
                )
            return self.initial.detach().to(image.device, image.dtype), None
        if self.initial == "random":
            generator = torch.Generator().manual_seed(self.seed)
            noise = torch.randn(image.shape, generator=generator) * problem.schedule.init_noise_sigma
            return noise.to(image.device, image.dtype), None
        method = DDIMInversion() if self.initial == "ddim" else Equilibrium()
        result = method.solve(replace(problem, report=None))
        stats.rounds += result.stats.rounds
        stats.notes.append(f"initial noise by {result.stats.solver}")
        return result.noise, result.trajectory
