"""DEQSampler: the same sample as the serial chain, in a few rounds of batched model calls."""

from __future__ import annotations

from copy import copy
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from ._devices import methods_with_torch_defaults
from ._types import Backend, Generators, Model, OnFailure, parameters_of
from .engine.begin import begun
from .engine.node_only import check_options
from .engine.node_solve import without_other_states
from .engine.options import Options
from .engine.sample_guess import Init, resolve_init
from .engine.solve import Request, solve_parallel, solve_serially
from .gradient import Gradient, Problem, Unrolled
from .gradient import resolve as resolve_gradient
from .gradient.adjoint_solve import adjoint_solve
from .loop.base import Solver
from .memory import SolverMemory
from .model.recording import Recording
from .plan import Plan
from .planner.free_memory import usable_bytes
from .planner.planner import Planner
from .planner.run import solve_planned
from .planner.warmup import compile_sizes, example_noise, warm_up
from .schedule import Schedule, SpectralSlope
from .solution import Callback, Solution

_begun = partial(begun, usable_bytes)


@methods_with_torch_defaults
class DEQSampler:
    """The sample of a diffusion chain, all timesteps solved at once (Pokle, Geng, Kolter 2022, arXiv 2210.12867).

    Args:
        model: `model(x, t, **model_kwargs)` -> prediction, a tensor or an object with `.sample`; x: (n, *shape), t:
            (n,), n any batch size. It must treat the rows of a batch independently and be deterministic (no dropout, no
            batch norm in training mode).
        schedule: see `Schedule`.
        solver: "auto", "quasi-newton", "picard", "anderson", "triangular", or published methods for comparison,
            "deq-ddim", "paradigms", "parataa", "parareal"; or a solver object. "auto" is "quasi-newton", or "draft"
            where there is one. With window="auto" it plans: `sample` does what is predicted to be the fastest, rounds
            over all timesteps or over a window, or the serial chain; see `plan` and `warmup`.
        tol: relative L2 error of the final sample against the serial chain that is aimed at (None: 1e-2; "deq-ddim":
            the paper's 1e-3 on the residual). Rounds on nodes end where the estimate of the error is below it, rounds
            on all timesteps where all relative residuals are below `solver.safety` times that.
        max_rounds: batched model calls before giving up (None: the solver's own limit, else T).
        window: number of timesteps solved at a time, or "auto": planned if the solver is "auto" too, else all of them.
        backend: "auto", "reference", "cpp" or "triton".
        gradient: "implicit", "phantom", "unrolled", "reversible", or an object (`Implicit`, ...), see "Gradients".
        on_failure: what to do when the rounds run out: finish the chain one step after the other ("serial"), raise
            NotConvergedError ("raise"), or warn and return the best iterate ("warn").
        max_batch: most rows in one model call (None: all on a GPU; on a CPU 2^18 elements and at least 64 rows).
        cuda_graph: True records the model and the solver's step in rounds on all timesteps as CUDA graphs, for a few
            padded batch sizes; "auto" does so from the second solve of a shape on, for an nn.Module in evaluation mode
            that is not compiled, on CUDA only; what cannot be recorded is called plainly, with a line in the log.
        deterministic: True or False, to the same effect: samples of a named solver never depend on earlier solves.
        spectrum: the data's power spectrum, a better slope for "auto" and `QuasiNewton(slope="spectral")`.
        certify: "estimate" ends a solve where the estimate of its error is within `tol`. It takes the model for smooth
            in time between the timesteps evaluated: what it does for a few in between is not seen. "full" evaluates
            every timestep first, as do solves with gradients or `return_trajectory`.
        draft: a cheap stand-in for the model, called like it, for fewer rounds (see `Drafted`; `distill` makes one).
        weight: of the norm in which `tol` and all errors are meant, the root of the sum of weight times squared error:
            broadcastable to a sample, >= 0, zero for entries that nobody reads (padding, what is known). No spectrum is
            used then.
        memory: "offload" keeps the history of rounds on nodes in (on CUDA: pinned) memory of the host, most of it in
            bfloat16, for states so large that the device has no room for it; or a `SolverMemory` of one's own, by
            default ("device", None) all samplers share one pool.
        group: a torch.distributed ProcessGroup, a DeviceMesh of one dimension, or "world": every model call is shared
            out over its ranks, which all call with the same arguments and get the same bits, see `sharded`.
        shard_states: with a group, every rank holds its share of each state's elements only; for large states. Both
            this and "offload" are for rounds on nodes (solver "auto" or "quasi-newton"), what these leave is made
            serially; there are no gradients, drafts and trajectories.

    Raises:
        TypeError: unknown arguments. ValueError: bad values.
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
        gradient: str | Gradient = "implicit",
        on_failure: OnFailure = "serial",
        max_batch: int | None = None,
        cuda_graph: bool | str = "auto",
        deterministic: bool = True,
        spectrum: SpectralSlope | None = None,
        draft: Model | None = None,
        certify: Literal["estimate", "full"] = "estimate",
        weight: Tensor | None = None,
        memory: SolverMemory | Literal["device", "offload"] | None = None,
        group: Any = None,
        shard_states: bool = False,
    ) -> None:
        self.options = Options.check(
            model, schedule, solver, memory, tol=tol, max_rounds=max_rounds, window=window, backend=backend,
            on_failure=on_failure, max_batch=max_batch, cuda_graph=cuda_graph,
            deterministic=deterministic, spectrum=spectrum, draft=draft, certify=certify, weight=weight, group=group,
            shard_states=shard_states,
        )  # fmt: skip
        check_options(self.options)
        self.gradient, self.planner = resolve_gradient(gradient), Planner(self.options)
        self.model, self.schedule, self.solver = self.options.model, self.options.schedule, self.options.solver

    def __copy__(self) -> DEQSampler:
        return self._with(copy(self.options))

    def _with(self, options: Options) -> DEQSampler:
        new, own = object.__new__(type(self)), {"options": options, "model": options.model}
        vars(new).update(vars(self), planner=Planner(options, self.planner.clock), **own)
        return new

    def record(self, recording: Recording) -> DEQSampler:
        """This sampler, its model's predictions kept in `recording` for `distill`. Raises TypeError."""
        return self._with(self.options.recorded(recording))

    def tolerance(self, dtype: torch.dtype) -> float:
        """The relative residual below which the solve ends, for states of that dtype."""
        return self.options.tolerance(dtype)

    def sample(
        self,
        noise: Tensor,
        model_kwargs: dict[str, Any] | None = None,
        generator: Generators = None,
        callback: Callback | None = None,
        progress: bool = False,
        *,
        init: Init = None,
        init_trajectory: Tensor | None = None,
        return_trajectory: bool = False,
    ) -> Solution:
        """Solve the chain that starts at `noise`.

        Differentiable with respect to noise, the parameters of the model (an nn.Module) and tensors in model_kwargs. A
        model whose parameters need no gradient is best called under torch.no_grad(): nothing is stored then.

        Args:
            noise: (B, *shape), the initial state of the chain, floating point.
            model_kwargs: passed to every model call. Tensors whose first dimension is B, and lists or tuples of B
                strings, belong to the samples and are repeated for the timesteps of a batch, in nested containers too;
                all else is passed on as it is, and so is what `shared` marks. A guess is logged, once.
            generator: for the frozen noise of stochastic schedules, one or one a sample, drawn as by a serial chain.
            callback: called after every round and every serial step, with a `RoundInfo`; returning True stops.
            progress: whether to show a bar.
            init: (B, *shape) guess of the sample, or a one-step student that makes it, init(noise, **model_kwargs); for
                fewer rounds, the result does not depend on it. `Unrolled` gradients do without.
            init_trajectory: (T + 1, B, *shape) starting guess, say the solution of a neighbouring problem. Where it
                starts at other noises, solvers on nodes take its sample as `init`, but where gradients are asked for:
                between two neighbours a model may decide, and the states of one fit the other everywhere but there.
            return_trajectory: whether the solution holds all states.

        Returns:
            A `Solution`.

        Raises:
            NonFiniteError, ModelOutputError, NotConvergedError, ValueError, TypeError. NotImplementedError: an argument
                carries a forward-mode tangent or belongs to a torch.func transform.
        """
        request = Request(noise, generator, callback, progress, init_trajectory, return_trajectory)
        reverse, what = isinstance(self.gradient, Unrolled), ("sample", self.gradient)
        with _begun(self.options, what, request, model_kwargs, reverse):
            request.init = resolve_init(init, noise, model_kwargs, init_trajectory)
            return self._sample(request, model_kwargs)

    def _sample(self, request: Request, model_kwargs: dict[str, Any] | None) -> Solution:
        """`sample`, of arguments that are sound."""
        noise = request.noise
        if noise.shape[0] == 0 or not torch.is_grad_enabled():
            return self._solve(without_other_states(request, self.options), model_kwargs)
        parameters = [p for p in parameters_of(self.model) if p.requires_grad]
        own: list[Tensor] = getattr(self.model, "conditioning_tensors", list)()  # a guided model's conditioning
        kwargs = [x for x in (*tree_leaves(model_kwargs), *own) if isinstance(x, Tensor) and x.requires_grad]
        if not (noise.requires_grad or parameters or kwargs):
            return self._solve(without_other_states(request, self.options), model_kwargs)
        options, keep, request.return_trajectory = self.options, request.return_trajectory, True
        if options.node_only:
            raise NotImplementedError(
                "gradients: expected none with shard_states or memory='offload', for they need all timesteps; call "
                "under torch.no_grad(), or model.requires_grad_(False)"
            )
        solution = self.gradient.attach(
            Problem(
                options.system(noise, model_kwargs), noise, parameters,
                lambda: self._solve(request, model_kwargs), adjoint_solve(options),
                self.tolerance(noise.dtype), options.max_rounds, options.on_failure,
                request.generator, request.init_trajectory, request.callback, request.progress,
            )
        )  # fmt: skip
        solution.trajectory = solution.trajectory if keep else None
        return solution

    def _solve(self, request: Request, model_kwargs: dict[str, Any] | None) -> Solution:
        if self.options.planned:
            return solve_planned(self.planner, request, model_kwargs)
        system = self.options.system(request.noise, model_kwargs)
        return solve_parallel(system, self.options, request)

    def serial(
        self, noise: Tensor, model_kwargs: dict[str, Any] | None = None, generator: Generators = None,
        callback: Callback | None = None, progress: bool = False, *, return_trajectory: bool = False,
    ) -> Solution:  # fmt: skip
        """The plain chain, one model call after the other; arguments and result as for `sample`."""
        request = Request(noise, generator, callback, progress, return_trajectory=return_trajectory)
        with _begun(self.options, ("serial",), request, model_kwargs):
            return solve_serially(self.options.system(noise, model_kwargs, serial=True), self.options, request)

    def plan(
        self, shape: tuple[int, ...], *, batch: int = 1, model_kwargs: dict[str, Any] | None = None,
        dtype: torch.dtype | None = None, device: torch.device | str | None = None,
    ) -> Plan:  # fmt: skip
        """What `sample` would do with `batch` samples of that shape, and why; `print` it. Calls no model.

        shape: of one sample. model_kwargs: as `sample` would get them. dtype, device: of the noise; those of the
        model's first parameter unless given. Where nothing was measured yet the plan says so. Raises ValueError where
        the caller has chosen solver or window.
        """
        if not self.options.planned:
            raise ValueError(
                "solver, window: expected 'auto' for both, otherwise nothing is planned; got "
                f"{self.solver.name!r} and {self.options.window!r}"
            )
        noise = example_noise(self.options, shape, batch, dtype, device)
        return self.planner.plan(self.planner.workload(noise, model_kwargs))

    def warmup(
        self, shape: tuple[int, ...], *, batch: int = 1, model_kwargs: dict[str, Any] | None = None,
        dtype: torch.dtype | None = None, device: torch.device | str | None = None,
    ) -> Plan | None:  # fmt: skip
        """Do ahead of the first `sample` what it would have to do: compile, capture, measure.

        A compiled model (torch.compile) is called with every batch size that it can meet later, so that nothing is
        compiled again for such requests, under torch.no_grad() as here. Where solver and window are planned, what
        `plan` rests on is measured, with calls of a few sizes, some steps and a few solves; without that the first
        calls of `sample` measure themselves, a little at a time. Else two samples are drawn. Takes as long as about
        four samples, compilation aside. Arguments and result as for `plan`, None where nothing is planned.
        """
        noise = example_noise(self.options, shape, batch, dtype, device)
        with _begun(self.options, ("warmup",), Request(noise, None), model_kwargs), torch.no_grad():
            if self.options.planned:
                return warm_up(self.planner, noise, model_kwargs)
            compile_sizes(self.options, self.options.system(noise, model_kwargs), noise)
            for _ in range(2):  # CUDA graphs are captured in the second
                self.sample(noise, model_kwargs, torch.Generator(noise.device).manual_seed(0))
        return None
