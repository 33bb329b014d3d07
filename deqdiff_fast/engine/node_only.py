"""Solves that are made by rounds on nodes or not at all: there is no memory for all timesteps."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from .._types import FrozenNoise, Generators
from ..nodes.grid import FEWEST_STEPS
from ..nodes.rounds import UNTOLD
from ..solution import Solution, Stats
from ..solver.picard import Picard
from .checked_timesteps import checked_timesteps
from .node_solve import NodeSolve, begins_on_nodes
from .options import Options
from .progress import Reporter
from .reporting import report_not_converged
from .system import System
from .workspace import Workspace

if TYPE_CHECKING:
    from .solve import Head, Monitor, Request


def check_options(options: Options) -> None:
    """Raises ValueError where a solver, or what is asked of it, needs all timesteps."""
    asked = [name for name, on in (("shard_states", options.shard_states), ("memory", options.offload)) if on]
    if not asked:
        return
    schedule, solver = options.schedule, options.solver
    if options.shard_states and options.ranks is None:
        raise ValueError("shard_states: expected a group whose ranks the states are shared out over, got none")
    if options.draft is not None or not begins_on_nodes(options, options.first_window, warm=False):
        raise ValueError(
            f"{asked[0]}: expected rounds on nodes: solver 'auto' or 'quasi-newton' with nodes and a slope, no draft, "
            f"window 'auto', more than {UNTOLD} rounds, a model that is smooth in time (no DDRM), and a chain of "
            f"{FEWEST_STEPS} timesteps at least and one or two lags; got {solver.name!r}"
            f"{' with a draft' * (options.draft is not None)}, window {options.window!r}, {options.round_limit()} "
            f"rounds, {schedule.num_steps} timesteps and {schedule.lags} lags"
        )
    if options.certify == "full":
        raise ValueError(f"certify: expected 'estimate' with {asked[0]}, got 'full', which needs all timesteps")


def check_request(options: Options, request: Request) -> None:
    """Raises ValueError where all timesteps are asked for."""
    if not options.node_only:
        return
    for name, wanted in (
        ("init_trajectory", request.init_trajectory is not None),
        ("return_trajectory", request.return_trajectory),
    ):
        if wanted:
            raise ValueError(f"{name}: expected none with shard_states or memory='offload': it has all timesteps")


def solve_on_nodes(
    system: System, options: Options, request: Request, stats: Stats, started: float, head: Head | None,
    monitor: Monitor | None, serially: Callable[[System, Options, Request], Solution],
) -> Solution:  # fmt: skip
    """By rounds on nodes; what these leave is made serially, unless `on_failure` says otherwise.

    Where somebody looks on, the chain is in memory as well.

    Args:
        head: a chain that was begun already, whose noise is taken over.
        serially: makes the plain chain.
    """
    limit, rewind = options.round_limit(), rewinder(request.generator, system.device)
    checked = checked_timesteps(options, request.noise, system.model_kwargs)
    skipped, begun = checked.skip_nodes(), None if head is None else head.work.chain
    nodes = None if skipped else NodeSolve(system, options, request, begun, checked)
    if head is not None:
        head.work.lease.release()
    if nodes is None:
        return _note_serial(serially(system, options, request), stats, started, None)
    if request.callback is None and not request.progress:
        nodes.run(limit, None if monitor is None else monitor.start(system, None))
    else:
        _run_watched(nodes, options, request, limit, monitor)
    if nodes.finished:
        return nodes.solution(stats, started)
    gave_up = monitor is not None and monitor.gave_up
    stats.stop_reason = "replanned" if gave_up else "callback" if nodes.stopped else "max_rounds"
    if not gave_up and nodes.usable and (nodes.stopped or options.on_failure != "serial"):
        solution = nodes.solution(stats, started)
        solution.converged = torch.tensor(nodes.final)
        if not nodes.stopped:
            report_not_converged(
                solution, options.on_failure, f"samples did not converge in {stats.rounds} rounds on nodes",
                "raise max_rounds, loosen tol, or use on_failure='serial'", stacklevel=5,
            )  # fmt: skip
        return solution
    nodes.lease.release()
    rewind()
    callback, made = request.callback, nodes.rounds
    if callback is not None:
        request = replace(request, callback=lambda info: callback(replace(info, round=info.round + made)))
    return _note_serial(serially(system, options, request), stats, started, nodes)


def _run_watched(
    nodes: NodeSolve, options: Options, request: Request, limit: int, monitor: Monitor | None
) -> None:  # fmt: skip
    """The rounds, with the chain in memory for the callback and the bar."""
    system, finish = nodes.system, options.stopping_rule(request.noise.dtype).finish
    work = Workspace.open(system, Picard(), 1, options.memory, options.backend)
    with work.lease, Reporter(work, finish, limit, request.callback, request.progress) as report:
        nodes.run(limit, report if monitor is None else monitor.start(system, report), work)


def _note_serial(found: Solution, stats: Stats, started: float, nodes: NodeSolve | None) -> Solution:
    """The plain chain's solution, with the statistics of the rounds that came before it."""
    serial = found.stats
    if nodes is not None:
        stats.residual_trace = torch.stack(nodes.note(stats, more=False))
    else:
        stats.stop_reason = "serial"
    stats.stop_reason = "callback" if serial.stop_reason == "callback" else stats.stop_reason
    for name in ("finished_serially", "model_evals", "model_calls", "error_estimate", "timesteps_evaluated"):
        setattr(stats, name, getattr(serial, name))
    stats.wall_seconds = time.perf_counter() - started
    return Solution(found.sample, found.converged, stats)


def rewinder(generator: Generators, device: torch.device) -> Callable[[], None]:
    """What sets random numbers back to where they are now."""
    if isinstance(generator, FrozenNoise):
        return lambda: None
    if generator is None:
        source: Any = torch if device.type == "cpu" else torch.get_device_module(device)
        where = (device,) if device.type == "cuda" else ()
        known = source.get_rng_state(*where)
        return lambda: source.set_rng_state(known, *where)
    several = generator if isinstance(generator, (list, tuple)) else [generator]
    states = [one.get_state() for one in several]

    def rewind() -> None:
        for one, state in zip(several, states, strict=True):
            one.set_state(state)

    return rewind
