"""DEQSampler: the same sample as the serial chain, in a few rounds of batched model calls."""

from __future__ import annotations

import time
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from . import arguments
from ._types import Backend, Generators, Model, OnFailure
from .errors import ConvergenceWarning, NotConvergedError
from .gradient import differentiable
from .memory import SolverMemory, default_memory
from .noise import check_generator
from .progress import Reporter
from .schedule import Schedule
from .serial import finish, non_finite
from .solution import Callback, Solution, Stats
from .solver import Picard, Solver, iterate, resolve
from .spectral import SpectralSlope
from .system import System
from .workspace import Workspace

DEFAULT_TOL = 1e-2
FREEZE = 0.1  # a timestep is frozen early at this part of the residual at which the solve may end
CPU_ROWS, CPU_ELEMENTS = 64, 1 << 18
ADJOINT_TOL = 1e-4
FLOOR = {torch.float64: 1e-14, torch.float32: 5e-7}  # what rounding alone leaves of a residual


class DEQSampler:
    """Solve the whole sampling chain as one fixed-point system (Pokle, Geng, Kolter 2022, arXiv 2210.12867).

    model: `model(x, t, **model_kwargs)` -> prediction, a tensor or an object with `.sample`; x: (n, *shape), t: (n,), n
    any batch size. It must treat the rows of a batch independently and be deterministic (no dropout, no batch norm in
    training mode). schedule: see `Schedule`.
    solver: "auto" (quasi-Newton), "picard", "anderson", "triangular", "deq-ddim" or a solver object.
    tol: relative L2 error of the final sample against the serial chain that is aimed at (None: 1e-2; "deq-ddim": the
    paper's 1e-3 on the residual). The solve ends when all relative residuals are below `solver.safety` times that.
    max_rounds: batched model calls before giving up (None: the solver's own limit, else T).
    window: number of timesteps solved at a time, or "auto" (all of them).
    on_failure: what to do when the rounds run out: finish the chain one step after the other ("serial"), raise
    NotConvergedError ("raise"), or warn and return the best iterate ("warn").
    spectrum: the data's power spectrum (`SpectralSlope`), a better slope for "auto" and
    `QuasiNewton(slope="spectral")`. max_batch: most rows in one model call (None: all of them on a GPU; on a CPU 2^18
    elements and at least 64 rows, since more only push the activations out of the cache). backend: "auto",
    "reference", "cpp" or "triton". gradient: "implicit", the adjoint system solved like the chain itself. memory: a
    `SolverMemory` of one's own; by default all samplers share one pool. deterministic: sums are added in a fixed order
    whatever is given. cuda_graph: "auto" or False; capturing is not part of this version.

    Raises TypeError for unknown arguments and ValueError for bad values.
    """

    def __init__(
        self,
        model: Model,
        schedule: Schedule,
        *,
        solver: str | Solver = "auto",
        tol: float | None = None,
        max_rounds: int | None = None,
        window: int | str = "auto",
        backend: Backend = "auto",
        gradient: str = "implicit",
        on_failure: OnFailure = "serial",
        max_batch: int | None = None,
        cuda_graph: bool | str = "auto",
        deterministic: bool = True,
        spectrum: SpectralSlope | None = None,
        memory: SolverMemory | None = None,
    ) -> None:
        arguments.check_model(model)
        arguments.check_schedule(schedule)
        self.model, self.schedule, self.spectrum = model, schedule, spectrum
        self.solver = resolve(solver)
        if spectrum is not None and not isinstance(spectrum, SpectralSlope):
            raise TypeError(f"spectrum: expected a SpectralSlope or None, got {type(spectrum).__name__}")
        if spectrum is None and getattr(self.solver, "slope", None) == "spectral":
            raise ValueError(
                "solver: slope='spectral' needs DEQSampler(spectrum=SpectralSlope...) to take the slope from"
            )
        self.tol = arguments.positive("tol", tol)
        self.max_rounds = arguments.count("max_rounds", max_rounds)
        self.max_batch = arguments.count("max_batch", max_batch)
        self.window = arguments.window(window)
        self.backend = arguments.choice("backend", backend, ("auto", "reference", "cpp", "triton"))
        self.gradient = arguments.choice("gradient", gradient, ("implicit",))
        self.on_failure = arguments.choice("on_failure", on_failure, ("serial", "raise", "warn"))
        self.cuda_graph = arguments.choice("cuda_graph", cuda_graph, ("auto", False))
        self.deterministic = arguments.choice("deterministic", deterministic, (True, False))
        self.memory = memory if memory is not None else default_memory()

    def tolerance(self, dtype: torch.dtype) -> float:
        """The relative residual below which the solve ends, for states of that dtype."""
        default = getattr(self.solver, "tol", None)
        if self.tol is None and default is not None:
            return float(default)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return max(self.solver.safety * (DEFAULT_TOL if self.tol is None else self.tol), FLOOR[wide])

    def sample(
        self,
        noise: Tensor,
        model_kwargs: dict[str, Any] | None = None,
        generator: Generators = None,
        callback: Callback | None = None,
        progress: bool = False,
        *,
        init_trajectory: Tensor | None = None,
        return_trajectory: bool = False,
    ) -> Solution:
        """Solve the chain that starts at `noise`.

        noise: (B, *shape), the initial state of the chain, floating point. model_kwargs: passed to every model call;
        tensors whose first dimension is B belong to the samples and are repeated for the timesteps of a batch.
        generator: for the frozen noise of stochastic schedules, one or one for each sample; the draws are those of a
        serial sampler. callback: called after every round with a `RoundInfo`; returning True stops. progress: a bar.
        init_trajectory: (T + 1, B, *shape) starting guess, say the solution of a neighbouring problem.

        Differentiable with respect to noise, the parameters of the model (an nn.Module) and tensors in model_kwargs.
        A model whose parameters need no gradient is best called under torch.no_grad(): nothing is kept then.

        Returns a `Solution`. Raises NonFiniteError, ModelOutputError, NotConvergedError, ValueError, TypeError.
        """
        system = self._system(noise, model_kwargs, generator)
        arguments.check_trajectory(init_trajectory, noise, self.schedule.num_steps)
        arguments.check_callback(callback)

        def solve(keep: bool) -> Solution:
            return self._solve(system, noise, generator, callback, progress, init_trajectory, keep)

        parameters = [p for p in getattr(self.model, "parameters", list)() if p.requires_grad]
        kwargs = [x for x in tree_leaves(system.model_kwargs) if isinstance(x, Tensor) and x.requires_grad]
        if noise.shape[0] == 0 or not torch.is_grad_enabled() or not (noise.requires_grad or parameters or kwargs):
            return solve(return_trajectory)
        solution = differentiable(system, lambda: solve(True), self._adjoint, noise, parameters)
        solution.trajectory = solution.trajectory if return_trajectory else None
        return solution

    def _adjoint(self, model: Model, schedule: Schedule, start: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
        """Solve the adjoint chain with this sampler's settings; returns its trajectory (T + 1, B, D)."""
        tol = min(ADJOINT_TOL, self.tol or ADJOINT_TOL)
        plain = getattr(self.solver, "slope", None) in ("auto", "scalar", None)  # a spectrum has the shape of an image
        solver = self.solver if plain and self.solver.max_rounds is None else "auto"
        sampler = DEQSampler(model, schedule, solver=solver, tol=tol, max_batch=self.max_batch, backend=self.backend)
        with torch.no_grad():
            trajectory = sampler.sample(start, model_kwargs, return_trajectory=True).trajectory
        assert trajectory is not None
        return trajectory

    def _solve(
        self,
        system: System,
        noise: Tensor,
        generator: Generators,
        callback: Callback | None,
        progress: bool,
        init_trajectory: Tensor | None,
        return_trajectory: bool,
    ) -> Solution:
        clock = time.perf_counter()
        steps, batch = self.schedule.num_steps, noise.shape[0]
        window = steps if self.window == "auto" else min(int(self.window), steps)
        stats = Stats(solver=self.solver.name, window=window)
        if batch == 0:
            return Solution(noise.detach().clone(), torch.ones(0, dtype=torch.bool), stats)
        limit = self.max_rounds or getattr(self.solver, "max_rounds", None) or steps
        with torch.no_grad():
            work = Workspace.open(system, self.solver, window, self.memory, self.backend)
            with work.lease, Reporter(work, self.tolerance(noise.dtype), limit, callback, progress) as report:
                work.begin(noise, generator)
                work.guess(self.solver.guess, init_trajectory)
                outcome = iterate(
                    work.chain,
                    self.solver,
                    work.memory,
                    evaluate=work.evaluate,
                    rebuild=work.rebuild,
                    diagnose=lambda step, sample, at: non_finite(work, step, sample, at),
                    freeze=max(FREEZE * report.tolerance, FLOOR[system.dtype]),
                    finish=report.tolerance,
                    max_rounds=limit,
                    report=report,
                )
                stats.rounds, stats.repairs = outcome.rounds, outcome.repairs
                stats.residual_trace = torch.stack(outcome.trace) if outcome.trace else stats.residual_trace
                return self._conclude(work, outcome.window.lo, outcome.stopped, stats, clock, return_trajectory)

    def serial(
        self,
        noise: Tensor,
        model_kwargs: dict[str, Any] | None = None,
        generator: Generators = None,
        callback: Callback | None = None,
        progress: bool = False,
        *,
        return_trajectory: bool = False,
    ) -> Solution:
        """The plain chain, one model call after the other; arguments and result as for `sample`."""
        clock = time.perf_counter()
        system = self._system(noise, model_kwargs, generator, serial=True)
        stats = Stats(solver="serial", window=1, stop_reason="serial")
        if noise.shape[0] == 0:
            return Solution(noise.detach().clone(), torch.ones(0, dtype=torch.bool), stats)
        with torch.no_grad():
            work = Workspace.open(system, Picard(), 1, self.memory, self.backend)
            with work.lease, Reporter(work, 0.0, system.num_steps, callback, progress) as report:
                work.begin(noise, generator)
                fronts = [0] * noise.shape[0]
                stats.finished_serially, stopped = finish(work, fronts, 0, report)
                stats.rounds = stats.finished_serially
                return self._conclude(work, fronts, stopped, stats, clock, return_trajectory)

    def _slope(self, noise: Tensor) -> SpectralSlope | str | None:
        slope = getattr(self.solver, "slope", "scalar")
        if isinstance(slope, str) and slope in ("auto", "spectral"):
            slope = self.spectrum if self.spectrum is not None else "scalar"
        if isinstance(slope, SpectralSlope) and noise.dim() > 1 and slope.shape != tuple(noise.shape[1:]):
            raise ValueError(
                f"noise: expected samples of the spectrum's shape {slope.shape}, got {tuple(noise.shape[1:])}"
            )
        return slope

    def _system(
        self, noise: Tensor, model_kwargs: dict[str, Any] | None, generator: Generators, serial: bool = False
    ) -> System:
        arguments.check_noise(noise)
        arguments.check_kwargs(model_kwargs)
        check_generator(generator, noise.shape[0])
        slope = "scalar" if serial else self._slope(noise)
        limit = self.max_batch
        if limit is None and noise.device.type == "cpu":
            limit = max(CPU_ROWS, CPU_ELEMENTS // max(noise[:1].numel(), 1))
        return System(self.model, self.schedule, noise, model_kwargs, limit, slope)

    def _conclude(
        self, work: Workspace, fronts: list[int], stopped: bool, stats: Stats, clock: float, keep: bool
    ) -> Solution:
        """Finish, raise or warn where rows are left; then copy the sample out of the slab."""
        system, chain = work.system, work.chain
        left = max(system.num_steps - front for front in fronts)
        rounds_ran_out = left > 0 and not stopped
        if stopped:
            stats.stop_reason = "callback"
        elif rounds_ran_out:
            stats.stop_reason = "max_rounds"
            if self.on_failure == "serial":
                stats.finished_serially, _ = finish(work, fronts, stats.rounds, None)
        done = torch.tensor([front == system.num_steps for front in fronts])
        stats.model_evals, stats.model_calls = system.model_evals, system.model_calls
        shape = (system.batch, *system.shape)
        trajectory = None
        if keep:
            trajectory = system.from_basis(chain.states.flatten(0, 1)).view(-1, *shape).to(system.model_dtype)
        sample = system.from_basis(chain.states[-1]).view(shape).to(system.model_dtype)
        stats.wall_seconds = time.perf_counter() - clock
        solution = Solution(sample, done, stats, trajectory)
        if rounds_ran_out and self.on_failure != "serial":
            worst = float(stats.residual_trace[-1].max()) if len(stats.residual_trace) else float("nan")
            message = (
                f"{int((~done).sum())} of {system.batch} samples did not converge in {stats.rounds} rounds (largest "
                f"residual {worst:.1e}); raise max_rounds, loosen tol, or use on_failure='serial'"
            )
            if self.on_failure == "raise":
                raise NotConvergedError(message, solution)
            warnings.warn(message, ConvergenceWarning, stacklevel=3)
        return solution
