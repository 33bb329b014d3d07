"""The settings of a sampler: checked once, then read by everything that a solve is made of."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .._types import Backend, Generators, Model, OnFailure
from ..loop.base import Solver
from ..loop.stopping import StoppingRule
from ..memory import SolverMemory, default_memory
from ..model.batched import BatchedModel
from ..model.draft_calls import DraftCalls
from ..model.knowledge import shared_with_model
from ..model.recording import RecordedModel, Recording
from ..model.row_tables import amplifies, rough_in_time
from ..model.sample_kwargs import warn_of_guesses
from ..model.stand_in import stand_in
from ..model.transforms import check_inputs
from ..model.weighted_norm import Weight, WeightedNorm
from ..nodes.grid import ALONE, is_noisy, round_sizes
from ..ranks import sharded
from ..ranks.group import Ranks
from ..schedule import Schedule, SpectralSlope
from ..schedule.noise import check_generator
from ..schedule.prior import prior_spectrum
from ..solver import resolve
from . import arguments
from .graph_cache import GraphCache
from .row_limit import row_limit
from .system import System

DEFAULT_TOL = 1e-2
FLOOR = {torch.float64: 1e-14, torch.float32: 5e-7}  # what rounding alone leaves of a residual


@dataclass(frozen=True)
class Options:
    """What `DEQSampler` was asked for, see there; names resolved and values checked."""

    model: Model
    schedule: Schedule
    solver: Solver
    tol: float | None
    max_rounds: int | None
    window: int | str
    backend: Backend
    on_failure: OnFailure
    max_batch: int | None
    cuda_graph: bool | str
    deterministic: bool
    spectrum: SpectralSlope | None
    memory: SolverMemory
    graph_cache: GraphCache
    planned: bool
    """solver="auto" with window="auto": each solve is made as is predicted to be the fastest."""
    draft: Model | None = None
    certify: str = "estimate"
    weight: Weight | None = None
    shard_states: bool = False
    offload: bool = False
    learned: dict[str, int] = field(default_factory=dict)
    """What solves have told of the model, see `BatchedModel.learned`."""
    unshared: dict[Any, Any] = field(default_factory=dict)
    """`knowledge` of a model that nothing can be kept with."""

    @classmethod
    def check(
        cls, model: Model, schedule: Schedule, solver: str | Solver, memory: SolverMemory | str | None, **given: Any
    ) -> Options:
        """Raises ValueError or TypeError, naming the argument, what was expected and what came."""
        arguments.check_model(model)
        arguments.check_schedule(schedule)
        if given["group"] is not None:
            model = sharded(model, given["group"])
        graphs = arguments.cuda_graph(given["cuda_graph"])
        if getattr(model, "deqdiff_ranks", None) is not None:  # an exchange between processes is in no recording
            if graphs is True:
                raise ValueError("cuda_graph: expected 'auto' or False with a group, got True")
            graphs = False
        resolved, spectrum, draft = resolve(solver), given["spectrum"], given["draft"]
        if draft is not None:
            arguments.check_draft(draft, schedule)
            resolved = resolve("draft") if isinstance(solver, str) and solver == "auto" else resolved
        elif resolved.needs_draft:
            raise ValueError("solver: 'draft' needs DEQSampler(draft=...), a cheap stand-in for the model; got None")
        if spectrum is not None and not isinstance(spectrum, SpectralSlope):
            raise TypeError(f"spectrum: expected a SpectralSlope or None, got {type(spectrum).__name__}")
        if spectrum is None and isinstance(resolved.slope, str) and resolved.slope == "spectral":
            raise ValueError(
                "solver: slope='spectral' needs DEQSampler(spectrum=SpectralSlope...) to take the slope from"
            )
        pool = None if isinstance(memory, str) else memory
        arguments.check_memory(pool)
        if isinstance(memory, str):
            arguments.choice("memory", memory, ("device", "offload"))
        window = arguments.window(given["window"])
        resolved.check(schedule.num_steps, schedule.lags, window)
        return cls(
            model=model,
            schedule=schedule,
            solver=resolved,
            tol=arguments.positive("tol", given["tol"]),
            max_rounds=arguments.count("max_rounds", given["max_rounds"]),
            window=window,
            backend=arguments.choice("backend", given["backend"], ("auto", "reference", "cpp", "triton")),
            on_failure=arguments.choice("on_failure", given["on_failure"], ("serial", "raise", "warn")),
            max_batch=arguments.count("max_batch", given["max_batch"]),
            cuda_graph=graphs,
            graph_cache=GraphCache(graphs),
            deterministic=arguments.choice("deterministic", given["deterministic"], (True, False)),
            spectrum=spectrum,
            memory=default_memory() if pool is None else pool,
            offload=pool is None and memory == "offload",
            shard_states=arguments.choice("shard_states", given["shard_states"], (True, False)),
            draft=draft,
            certify=arguments.choice("certify", given["certify"], ("estimate", "full")),
            weight=Weight.given(given["weight"], spectrum is not None or isinstance(resolved.slope, SpectralSlope)),
            planned=isinstance(solver, str) and solver == "auto" and given["window"] == "auto",
        )

    def __copy__(self) -> Options:
        """The same settings and model; nothing that a solve writes to is shared."""
        memory, graphs = copy(self.memory), copy(self.graph_cache)
        return replace(self, memory=memory, graph_cache=graphs, learned=dict(self.learned), unshared={})

    @property
    def ranks(self) -> Ranks | None:
        """Those that the model's rows are shared out over, if any."""
        found: Ranks | None = getattr(self.model, "deqdiff_ranks", None)
        return found

    @property
    def node_only(self) -> bool:
        """Whether there is memory for rounds on nodes alone."""
        return self.shard_states or self.offload

    @cached_property
    def node_sizes(self) -> list[int]:
        """Numbers of nodes of the first rounds: all timesteps where they add so much noise that fewer would not do."""
        noisy, rough = self.drafted and is_noisy(self.schedule), self.schedule.stochastic and not self.drafted
        smooth = not (rough_in_time(self.model) or (rough and not self.node_only and is_noisy(self.schedule, ALONE)))
        return round_sizes(self.schedule.num_steps, noisy, smooth, rough, self.requested_tol)

    @property
    def drafted(self) -> bool:
        """Whether solves are made with a draft."""
        return self.solver.needs_draft and self.draft is not None

    @property
    def knowledge(self) -> dict[Any, Any]:
        """What all samplers of the model have learned of it."""
        shared = shared_with_model(self.model)
        return self.unshared if shared is None else shared

    def recorded(self, recording: Recording) -> Options:
        """The same, the model's predictions kept; nothing is recorded as a CUDA graph. Raises TypeError, ValueError."""
        if not isinstance(recording, Recording):
            raise TypeError(f"recording: expected a deqdiff_fast.Recording, got {type(recording).__name__}")
        if self.shard_states:
            raise ValueError("recording: expected a sampler without shard_states, whose ranks see some rows each")
        model = RecordedModel(self.model, recording)
        return replace(copy(self), model=model, cuda_graph=False, graph_cache=GraphCache(False))

    @property
    def requested_tol(self) -> float:
        """The relative error that samples may have, as it was asked for."""
        return DEFAULT_TOL if self.tol is None else self.tol

    def tolerance(self, dtype: torch.dtype) -> float:
        """The relative residual below which the solve ends, for states of that dtype."""
        if self.tol is None and self.solver.tol is not None:
            return float(self.solver.tol)
        return max(self.solver.safety * self.requested_tol, self.floor(dtype))

    def allowed(self, dtype: torch.dtype) -> float:
        """The relative error allowed in a sample."""
        return max(self.tolerance(dtype) / self.solver.safety, self.floor(dtype))

    def stopping_rule(self, dtype: torch.dtype) -> StoppingRule:
        """When rows and samples are done, for states of that dtype."""
        solver, finish = self.solver, self.tolerance(dtype)
        freeze = solver.freeze * (solver.strict or 1.0 if amplifies(self.model) else 1.0)
        return StoppingRule(freeze * finish / solver.safety, finish, self.floor(dtype), solver.by_step)

    @property
    def first_window(self) -> int:
        """How many timesteps are solved at a time, where no plan says otherwise."""
        steps = self.schedule.num_steps
        return steps if self.window == "auto" else min(int(self.window), steps)

    @staticmethod
    def floor(dtype: torch.dtype) -> float:
        """What rounding alone leaves of a residual."""
        return FLOOR[torch.float64 if dtype == torch.float64 else torch.float32]

    def round_limit(self) -> int:
        """Most model calls that wait for each other, before the rest is finished otherwise."""
        return int(self.max_rounds or self.solver.max_rounds or self.solver.round_limit(self.schedule.num_steps))

    def row_limit(self, noise: Tensor) -> int | None:
        """Most rows in one model call, over all ranks."""
        limit = row_limit(self.max_batch, noise, self.ranks)
        known = [rows for rows in (limit, self.learned.get("max_batch")) if rows is not None]
        return min(known, default=None)

    def slope(self, noise: Tensor, prior: bool = True) -> SpectralSlope | str | None:
        """What the solver wants; raises ValueError where the spectrum is one of other samples. prior: see `system`."""
        slope = self.solver.slope
        if self.weight is not None:
            return None if slope is None else "scalar"  # the norm has coordinates of its own
        if isinstance(slope, str) and slope in ("auto", "spectral"):
            slope = self.spectrum or (prior_spectrum(tuple(noise.shape[1:])) if prior else None) or "scalar"
        if isinstance(slope, SpectralSlope) and noise.dim() > 1 and slope.shape != tuple(noise.shape[1:]):
            raise ValueError(
                f"noise: expected samples of the spectrum's shape {slope.shape}, got {tuple(noise.shape[1:])}"
            )
        chosen: SpectralSlope | str | None = slope
        return chosen

    def norm(self, noise: Tensor) -> WeightedNorm | None:
        """In which errors of such samples are meant, None for L2; raises ValueError where it is of others."""
        return None if self.weight is None else self.weight.on(tuple(noise.shape[1:]))

    def check_request(
        self, noise: Tensor, model_kwargs: dict[str, Any] | None, generator: Generators, reverse: bool = False
    ) -> None:
        """Raises ValueError, TypeError or NotImplementedError where a solve cannot begin."""
        check_inputs(self.model, reverse, noise=noise, model_kwargs=model_kwargs)
        arguments.check_noise(noise)
        arguments.check_kwargs(model_kwargs)
        check_generator(generator, noise.shape[0])
        warn_of_guesses(model_kwargs or {}, noise.shape[0])
        self.norm(noise)

    def system(
        self, noise: Tensor, model_kwargs: dict[str, Any] | None, serial: bool = False, prior: bool = True
    ) -> System:
        """The chain from `noise`, of a request that was checked. prior: whether the sample's shape may give a slope."""
        slope, norm = ("scalar", None) if serial else (self.slope(noise, prior), self.norm(noise))
        system = System(self.model, self.schedule, noise, model_kwargs, self.row_limit(noise), slope, norm)
        system.learned, system.give_way = self.learned, self.graph_cache.on_shortage()
        system.node_sizes, system.all_nodes = self.node_sizes, not self.node_only and not self.schedule.stochastic
        if self.draft is not None and self.drafted and not serial:
            arguments.check_draft_shape(self.draft, noise)
            limit = system.max_batch if self.ranks is None else row_limit(self.max_batch, noise)  # not shared out
            rows = BatchedModel(stand_in(self.draft, self.model), self.schedule, noise, model_kwargs, limit)
            system.draft = DraftCalls(rows)
        if not serial:  # windows, and rounds on nodes, come and go: a compiled model is to see the same sizes in all
            system.largest = self.most_rows(noise)
        return system

    def most_rows(self, noise: Tensor) -> int:
        """Rows of the largest model call that a solve can make."""
        return min(rows := self.first_window * noise.shape[0], self.row_limit(noise) or rows)
